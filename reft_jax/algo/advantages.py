"""From scores to advantages: token rewards, GAE, whitening, groups. Pure functions of arrays, float32.

All arrays are [B,T] in the alignment of types.py: entry t is the decision taken after reading tokens[:t+1].
"""

import jax
import jax.numpy as jnp


def action_mask(prompt_len, total_len, length: int):
    """bool[B,T]: the decisions that chose a response token, `prompt_len-1 <= t <= total_len-2` (EOS included)."""
    t = jnp.arange(length)[None, :]
    return (t >= prompt_len[:, None] - 1) & (t <= total_len[:, None] - 2)


def token_rewards(score, old_logprob, ref_logprob, mask, *, kl_coef: float):
    """`r_t = score·[t is the last action] − β (log π_old − log π_ref)` on actions, 0 elsewhere.

    Args: score float32[B]; old_logprob, ref_logprob float32[B,T]; mask bool[B,T] with at least one action per row.
    Returns: rewards, score_rewards, kl_rewards, each float32[B,T]; the first is the sum of the others.
    """
    kl_rewards = jnp.where(mask, -kl_coef * (old_logprob - ref_logprob), 0.0)
    last = mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
    score_rewards = jnp.where(last, score[:, None], 0.0)
    return score_rewards + kl_rewards, score_rewards, kl_rewards


def gae(rewards, values, mask, *, gamma: float, lam: float):
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) as one reverse scan.

    `δ_t = r_t + γ V_{t+1} − V_t`, `A_t = δ_t + γλ A_{t+1}`, `R_t = A_t + V_t`; values off the mask count as 0.
    Returns: advantages and returns, float32[B,T], 0 off the mask.
    """
    values = jnp.where(mask, values, 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def back(advantage, delta):
        advantage = delta + gamma * lam * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jnp.where(mask, advantages.T, 0.0)
    return advantages, advantages + values


def masked_moments(x, mask):
    """Mean and variance (Bessel's correction) of `x` over the mask, scalars."""
    count = mask.sum()
    mean = jnp.where(mask, x, 0.0).sum() / count
    variance = jnp.where(mask, jnp.square(x - mean), 0.0).sum() / jnp.maximum(count - 1, 1)
    return mean, variance


def whiten(x, mask):
    """`(x − mean)·rsqrt(var + 1e-8)` over all actions of the batch; 0 off the mask."""
    mean, variance = masked_moments(x, mask)
    return jnp.where(mask, (x - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)


def leave_one_out(reward):
    """RLOO: `A_i = R_i − mean of the others`, rewards float32[Q,n] of n samples per question (arXiv 2402.14740, §3.3).

    With one sample there are no others: the baseline is 0, and A = R is REINFORCE's. With several, A is exactly 0 if
    all rewards of a question are equal.
    """
    samples = reward.shape[1]
    if samples == 1:
        return reward
    others = reward.sum(1, keepdims=True) - reward
    return jnp.where(differs(reward), reward - others / (samples - 1), 0.0)


def group_centred(reward):
    """Dr. GRPO: `A_i = R_i − mean of the question`, rewards float32[Q,n] (arXiv 2503.20783, §3.2).

    Exactly 0 if all rewards of a question are equal: the mean of equal numbers may round.
    """
    return jnp.where(differs(reward), reward - reward.mean(1, keepdims=True), 0.0)


def group_standardised(reward):
    """GRPO: `A_i = (R_i − mean) / (std + 1e-4)` of the question (arXiv 2402.03300, §4.1.2).

    reward: float32[Q,n], n > 1. The standard deviation has Bessel's correction.
    """
    return group_centred(reward) / (reward.std(1, keepdims=True, ddof=1) + 1e-4)


def differs(reward):
    """bool[Q,1]: whether the rewards float32[Q,n] of a question are not all equal."""
    return reward.max(1, keepdims=True) > reward.min(1, keepdims=True)


def overlong(mask, *, max_len: int, buffer: int):
    """DAPO's penalty of a long response, float32[B] from 0 to −1 (arXiv 2503.14476, eq. 13).

    It falls over the last `buffer` tokens that a row has room for: `−min(1, max(0, L − (L_max − buffer)) / buffer)`,
    L tokens of the response, L_max = max_len − tokens of the prompt. mask bool[B,T].
    """
    response, prompt = mask.sum(1), mask.argmax(1) + 1
    return -jnp.clip((response - (max_len - prompt - buffer)) / buffer, 0.0, 1.0)


def explained_variance(values, returns, mask):
    """max(−1, 1 − var(R−V) / (var(R)+1e-8)) over actions: 1 is a perfect critic, 0 a constant one."""
    _, residual = masked_moments(returns - values, mask)
    _, total = masked_moments(returns, mask)
    return jnp.maximum(-1.0, 1.0 - residual / (total + 1e-8))
