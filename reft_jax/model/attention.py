"""Grouped-query attention: of a text to itself, with a gradient, and of one token to the positions of a cache.

Axes as in `reft_jax.types`. Scores and their softmax are float32, products in the compute dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

QUERY_BLOCK = 256  # positions: half of the scores of a long row are masked, and most of those are not computed


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


def attend(q: jax.Array, *parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """One token per row, q [B,N,H], to the positions of all `parts` -> [B,N,H].

    Args:
        parts: each (k [B,K,H,S], or in blocks [B,K,S/64,H,64]; v [B,K,S,H]; the mask of seen positions bool[1 or B,S]).

    All arrays stay in the blocks of the keys. XLA's CPU backend then fuses each product with what follows it and
    divides the batch among the cores. A batch of small products that is not fused runs on one core.
    """
    grouped = q.reshape(q.shape[0], parts[0][1].shape[1], 1, -1, q.shape[-1])
    scores = [_scores_of_one(grouped, k if k.ndim == 5 else k[:, :, None], seen) for k, _, seen in parts]
    scores = jnp.concatenate(scores, axis=-1)
    weights = jnp.exp(scores - scores.max((2, 4), keepdims=True))
    weights /= weights.sum((2, 4), keepdims=True)
    out, begin = 0, 0
    for _, v, _ in parts:
        v = v.reshape(*v.shape[:2], scores.shape[2], -1, v.shape[3])
        end = begin + v.shape[3]
        out += jnp.matmul(weights[..., begin:end].astype(v.dtype), v, preferred_element_type=jnp.float32).sum(2)
        begin = end
    return out.astype(q.dtype).reshape(q.shape)


def _scores_of_one(q, k, seen):
    """float32[B,K,n,G,S/n] of q [B,K,1,G,H] and k [B,K,n,H,S/n].

    The mask is added, because a selection would be a separate kernel. So scores of unseen positions must be finite.
    """
    to_each = jnp.broadcast_to(q, (*k.shape[:3], *q.shape[3:]))  # written out: else matmul would transpose the keys
    scores = jnp.matmul(to_each, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    mask = jnp.where(seen, 0, jnp.finfo(jnp.float32).min)
    return scores + mask.reshape(len(seen), 1, k.shape[2], 1, k.shape[4])


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
    q, gradient, to, by = (x.reshape(*x.shape[:2], 2, -1, x.shape[-1]) for x in (q, gradient, to_scores, weights))
    to_q = summed("BKQS,BKHS->BKQH", to_scores, k)
    to_k, to_v = summed("BKcQH,BKcQS->BKHS", q, to), summed("BKcQH,BKcQS->BKHS", gradient, by)
    return to_q, to_k, to_v.swapaxes(-1, -2)


_attend.defvjp(_attend_forward, _attend_backward)
