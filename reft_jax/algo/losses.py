"""The losses as pure functions of arrays, float32.

They return one number a row, or a sum over tokens; the caller divides by the size of the global batch, so that the
gradients of micro-batches add up to the gradient of the whole.
"""

import jax
import jax.numpy as jnp


def row_means(x, mask):
    """Mean over each row's masked entries, float32[B]; 0 for a row without any."""
    return jnp.where(mask, x, 0.0).sum(1) / jnp.maximum(mask.sum(1), 1)


def policy_loss(logprob, old_logprob, advantage, mask, *, clip: float):
    """PPO's clipped surrogate: `max(−Â ρ, −Â clip(ρ, 1−c, 1+c))`, ρ = exp(log π − log π_old) (arXiv 1707.06347, eq. 7).

    Args: float32[B,T], mask bool[B,T]. Returns: float32[B], the mean over each row's actions.
    """
    ratio = jnp.exp(jnp.where(mask, logprob - old_logprob, 0.0))
    return row_means(jnp.maximum(-advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)), mask)


def value_loss(value, old_value, return_, mask, *, clip: float):
    """`½ max((V−R)², (clip(V, V_old ± c) − R)²)`, float32[B], the mean over each row's actions."""
    clipped = jnp.clip(value, old_value - clip, old_value + clip)
    return row_means(0.5 * jnp.maximum(jnp.square(value - return_), jnp.square(clipped - return_)), mask)


def token_loss(logprob, mask):
    """Cross-entropy summed over target tokens: scalar. Divide by the target tokens of the global batch."""
    return -jnp.where(mask, logprob, 0.0).sum()


def class_loss(logits, labels):
    """Cross-entropy of each row, float32[B]. Args: logits float32[B,2], labels int32[B]."""
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
