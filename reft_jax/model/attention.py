"""Grouped-query attention: of a text to itself, with a gradient, and of one token to the positions of a cache.

Axes as in `reft_jax.types`. Scores and their softmax are float32, products in the compute dtype.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

QUERY_BLOCK = 256  # positions: half of the scores of a long row are masked, and most of those are not computed
TILE_ROWS = 8  # of a TPU's registers


@jax.named_scope("attention")
def attend_causally(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B,T,N,H], k [B,K,H,T], v [B,K,T,H], mask bool[1 or B,T,T] -> [B,T,N,H]; no position may see a later one.

    A block of queries computes no score of positions after its last query.
    """
    length, parts = q.shape[1], []
    for queries in np.array_split(np.arange(length), -(-length // QUERY_BLOCK)):
        block, seen = slice(queries[0], queries[-1] + 1), queries[-1] + 1
        grouped = _grouped(q[:, block], k.shape[1])
        out = _attend(grouped, k[..., :seen], v[:, :, :seen], mask[:, block, :seen])
        parts.append(_ungrouped(out, len(queries)))
    return jnp.concatenate(parts, axis=1)


@jax.named_scope("attention")
def attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """One token per row, q [B,N,H], to the positions of a cache with keys in blocks -> [B,N,H]. Not for a TPU.

    Args:
        k, v: [B,K,S/64,H,64] and [B,K,S,H].
        seen: the mask of seen positions, bool[1 or B,S].

    All arrays stay in the blocks of the keys. XLA's CPU backend then fuses each product with what follows it and
    divides the batch among the cores. A batch of small products that is not fused runs on one core.
    """
    grouped = q.reshape(q.shape[0], v.shape[1], 1, -1, q.shape[-1])
    to_each = jnp.broadcast_to(grouped, (*k.shape[:3], *grouped.shape[3:]))  # else matmul would transpose the keys
    scores = _masked(to_each, k, seen.reshape(len(seen), 1, k.shape[2], 1, k.shape[4]))
    weights = jnp.exp(scores - scores.max((2, 4), keepdims=True))
    weights /= weights.sum((2, 4), keepdims=True)
    v = v.reshape(*v.shape[:2], k.shape[2], -1, v.shape[3])
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32).sum(2)
    return out.astype(q.dtype).reshape(q.shape)


@jax.named_scope("attention")
def attend_parts(q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """One token per row, q [B,N,H], to the positions of all `parts` -> [B,N,H]. For a TPU.

    Args:
        parts: each (k [B,K,H,S], v [B,K,S,H], the mask of seen positions bool[1 or B,S]).

    The queries of a group are padded to 8 rows. The TPU compiler makes a product with fewer rows a sum on the vector
    unit: with one row that was three quarters of a step (docs/performance.md). The parts stay apart, because to join
    their scores is a copy.
    """
    batch, _, size = q.shape
    grouped = q.reshape(batch, parts[0][1].shape[1], -1, size)
    group = grouped.shape[2]
    grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, -group % TILE_ROWS), (0, 0)))
    scores = [_masked(grouped, k, seen[:, None, None]) for k, _, seen in parts]
    highest = functools.reduce(jnp.maximum, (one.max(-1, keepdims=True) for one in scores))
    weights = [jnp.exp(one - highest) for one in scores]
    total, out = sum(one.sum(-1, keepdims=True) for one in weights), 0
    for one, (_, v, _) in zip(weights, parts, strict=True):
        out += jnp.matmul((one / total).astype(v.dtype), v, preferred_element_type=jnp.float32)[:, :, :group]
    return out.astype(q.dtype).reshape(q.shape)


def _masked(q, k, seen):
    """The scores of q and k, products of their last two axes, in float32, and those of unseen positions very low.

    The mask is added, because a selection would be a separate kernel. So scores of unseen positions must be finite.
    """
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return scores + jnp.where(seen, 0, jnp.finfo(jnp.float32).min)


def _grouped(q, kv_heads: int):
    """[B,T,N,H] -> [B,K,G*T,H]: the queries of a group are the rows of one matrix, the left side of each product.

    With the keys on the left, as einsum would choose, a batched product transposes them first.
    """
    batch, length, heads, head_dim = q.shape
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    return q.reshape(batch, kv_heads, -1, head_dim)


def _ungrouped(out, length: int):
    """[B,K,G*T,H] -> [B,T,N,H]."""
    batch, kv_heads, _, head_dim = out.shape
    out = out.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, -1, head_dim)


def _scores(q, k, mask):
    """float32[B,K,G,T,S] of q [B,K,G*T,H]."""
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = scores.reshape(*q.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


@jax.custom_vjp
def _attend(q, k, v, mask):
    """Attention of q [B,K,G*T,H].

    The gradient is written out because its cost on a CPU is passes over the scores, not products. Here there are two
    passes forward and one backward, and one array of scores is kept instead of two.
    """
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    scores = _scores(q, k, mask)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1).reshape(*q.shape[:3], 1)
    weights = weights.astype(v.dtype).reshape(*q.shape[:3], -1)
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32) / total
    return out.astype(q.dtype), (q, k, v, weights, total, out)


def _attend_backward(kept, gradient):
    q, k, v, weights, total, out = kept
    gradient = gradient.astype(jnp.float32) / total
    mean = (gradient * out).sum(-1, keepdims=True)
    gradient = gradient.astype(v.dtype)
    to_weights = jnp.matmul(gradient, v.swapaxes(-1, -2), preferred_element_type=jnp.float32)
    to_scores = (weights * (to_weights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q, to_k, to_v = _to_operands(q, k, to_scores, weights, gradient)
    return to_q, to_k, to_v, None


def _to_operands(q, k, to_scores, weights, gradient):
    """The gradients of queries, keys and values from those of the scores and of the output."""
    if q.dtype != jnp.bfloat16:
        to_q, to_k = jnp.matmul(to_scores, k.swapaxes(-1, -2)), jnp.matmul(q.swapaxes(-1, -2), to_scores)
        return to_q, to_k, jnp.matmul(weights.swapaxes(-1, -2), gradient)

    def summed(axes, a, b):
        return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32).astype(q.dtype)

    # A sum over two axes: XLA transposes the smaller side first. Over one, its CPU backend multiplies in float32.
    halves = 2 - q.shape[2] % 2
    q, gradient, to, by = (x.reshape(*x.shape[:2], halves, -1, x.shape[-1]) for x in (q, gradient, to_scores, weights))
    to_q = summed("BKQS,BKHS->BKQH", to_scores, k)
    to_k, to_v = summed("BKcQH,BKcQS->BKHS", q, to), summed("BKcQH,BKcQS->BKHS", gradient, by)
    return to_q, to_k, to_v.swapaxes(-1, -2)


_attend.defvjp(_attend_forward, _attend_backward)
