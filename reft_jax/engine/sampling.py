"""Draws the next token. A row's random numbers depend on its item and sample, never on where or when it decodes."""

import jax
import jax.numpy as jnp

BLOCK = 256


def row_keys(key, iteration: int, items, samples):
    """`fold_in(fold_in(fold_in(key, iteration), item), sample)` for items, samples int32[B]: keys [B]."""
    key = jax.random.fold_in(key, iteration)
    return jax.vmap(lambda item, sample: jax.random.fold_in(jax.random.fold_in(key, item), sample))(items, samples)


def reach(weights, goal):
    """Where the running sum of weights float32[N,B] reaches goal float32[B]: index int32[B], and what is left of goal
    before that entry, float32[B].

    The sums round, so a goal near the end may be past it or at an entry of weight 0; then the heaviest is drawn.
    """
    ends = jnp.cumsum(weights, 0)
    index = jnp.minimum((ends < goal[None]).sum(0), weights.shape[0] - 1)
    index = jnp.where(_at(weights, index) > 0, index, weights.argmax(0))
    return index, goal - jnp.where(index > 0, _at(ends, jnp.maximum(index - 1, 0)), 0.0)


def _at(x, index):
    """x[index[b], b] of x [N,B]; of x [N,M,B] and index [1,B] x[index[0, b], :, b]."""
    return jnp.take_along_axis(x, index[None], 0)[0]


def inverse_cdf(weights, uniform):
    """Draw an entry per row in proportion to the weights: int32[B], and the sum of the weights, float32[B].

    Args: weights float32[V,B] >= 0; uniform float32[B] in (0,1], one number per row.

    In two levels, blocks of 256 and then inside the block: on a CPU 25 times faster than V Gumbel numbers per row (2 ms
    against 55 for 64 rows of 49,152).
    """
    vocab, rows = weights.shape
    weights = jnp.pad(weights, ((0, -vocab % BLOCK), (0, 0))).reshape(-1, BLOCK, rows)
    sums = weights.sum(1)
    total = sums.sum(0)
    block, left = reach(sums, uniform * total)
    inside, _ = reach(_at(weights, block[None]), left)
    return (block * BLOCK + inside).astype(jnp.int32), total


@jax.named_scope("draw")
def draw(logits, keys, t, *, temperature: float, top_k: int):
    """Draw the next token of each row, int32[B], with its log-probability at `temperature`, float32[B].

    The log-probability is over the whole vocabulary, also with top_k. Args: logits float32[V,B]; keys [B] of
    `row_keys`; t int32[B], the index of the token in its response; temperature 0 is greedy; top_k 0 is the whole
    vocabulary.
    """
    # Without the barrier XLA's CPU backend fuses the maximum into the product that makes the logits, which is slower.
    logits = jax.lax.optimization_barrier(logits / (temperature or 1.0))
    peak = logits.max(0, keepdims=True)
    weights = jnp.exp(logits - peak)  # once, for the draw and for the log-probability
    uniform = 1.0 - jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(keys, t)
    token, total = inverse_cdf(weights, uniform)  # greedy and top_k use the total only
    if temperature == 0:
        token = logits.argmax(0).astype(jnp.int32)
    elif top_k:
        best, ids = jax.lax.top_k(logits.T, min(top_k, len(logits)))
        token = _at(ids.T, inverse_cdf(jnp.exp(best.T - peak), uniform)[0])
    return token, _at(logits, token) - peak[0] - jnp.log(total)
