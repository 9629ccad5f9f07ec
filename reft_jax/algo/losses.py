"""The losses as pure functions of arrays, float32: sums over decisions, each times its weight.

The weights make the sum a mean over the whole batch, so that sums and gradients of micro-batches add up to those of the
whole. A decision with weight 0 does not count, whatever its values are.
"""

import jax
import jax.numpy as jnp


def decision_weights(mask, mean: str, constant: int = 1):
    """The weight of each decision, float32[B,T], in one of the means that a loss can be; 0 where mask bool[B,T] is not.

    "rows": over a row's decisions, then over rows. "tokens": over all decisions. "sum": summed over a row's decisions,
    then the mean over rows. "constant": the same, divided by `constant` (tokens).
    """
    if mean == "rows":
        return row_weights(mask)
    return mask / {"tokens": jnp.maximum(mask.sum(), 1), "sum": len(mask), "constant": len(mask) * constant}[mean]


def row_weights(mask):
    """The weight of each decision in a mean over a row's decisions, then over rows: mask bool[B,T] -> float32[B,T]."""
    return mask / jnp.maximum(mask.sum(1, keepdims=True), 1) / mask.shape[0]


def _weighted(x, weight):
    return jnp.where(weight > 0, x * weight, 0.0).sum()


def policy_loss(logprob, old_logprob, advantage, weight, *, clip: float, clip_high: float | None = None):
    """PPO's clipped surrogate: `Σ w max(−Â ρ, −Â clip(ρ, 1−c, 1+h))`, ρ = exp(log π − log π_old).

    arXiv 1707.06347, eq. 7; with h = clip_high other than c = clip, arXiv 2503.14476, eq. 10. Args: float32, all of one
    shape. Returns a scalar.
    """
    high = 1 + (clip if clip_high is None else clip_high)
    ratio = jnp.exp(jnp.where(weight > 0, logprob - old_logprob, 0.0))
    return _weighted(jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, high)), weight)


def kl_loss(logprob, ref_logprob, weight, estimator: str):
    """`Σ w k`, k an estimate of KL(π ‖ π_ref) from the sampled token (J. Schulman, joschu.net/blog/kl-approx.html).

    With d = log π − log π_ref: k1 = d, k2 = d²/2, k3 = exp(−d) − 1 + d. On the policy's own samples the mean gradient
    of k1 is 0, that of k2 is the gradient of KL(π ‖ π_ref), that of k3 the gradient of KL(π_ref ‖ π).
    """
    d = jnp.where(weight > 0, logprob - ref_logprob, 0.0)
    return _weighted({"k1": d, "k2": 0.5 * jnp.square(d), "k3": jnp.exp(-d) - 1 + d}[estimator], weight)


def value_loss(value, old_value, return_, weight, *, clip: float):
    """`Σ w ½ max((V−R)², (clip(V, V_old ± c) − R)²)`, a scalar; arguments as in `policy_loss`."""
    clipped = jnp.clip(value, old_value - clip, old_value + clip)
    return _weighted(0.5 * jnp.maximum(jnp.square(value - return_), jnp.square(clipped - return_)), weight)


def token_loss(logprob, weight):
    """Cross-entropy, a scalar: `−Σ w log π`. In SFT a target token weighs 1 / (target tokens of the global batch)."""
    return -_weighted(logprob, weight)


def class_loss(logits, labels, weight):
    """Cross-entropy of classes, a scalar. Args: logits float32[…,2], labels int32[…], weight float32[…]."""
    return _weighted(jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0], weight)
