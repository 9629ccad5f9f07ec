"""The key-value cache: fixed shapes, every row at its own position, one pair of arrays per layer.

Keys keep the cache position last and values keep it second to last: in these layouts the matrix products of a decode
step read memory in order. Layers are separate arrays, as long as the longest row needs (`grow`).

Off TPUs keys are in blocks: a product takes 64 positions at a time and reads a block from end to end, at 1.3 times the
rate. A decode step writes into the cache in place (`write`). On a TPU it writes beside the cache (`init_recent`,
`write_recent`), and after a few steps `join` adds what they wrote. decode.py says why.

With `engine.cache=int8` keys and values are quantized, with a scale for each position and kv head. Every step sees them
so, its own included: what a row draws does not depend on when `join` runs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.quantized import Array, Quantized, like

BLOCK = 64  # positions of a block of keys


class KVCache(NamedTuple):
    """One layer: k dtype[B,K,H,S], or in blocks dtype[B,K,S/64,H,64]; v dtype[B,K,S,H]. Scales have 1 instead of H.

    The caller knows how many positions of a row are valid.
    """

    k: Array
    v: Array

    @property
    def length(self) -> int:
        return self.v.shape[2]

    @property
    def key_axis(self) -> int:
        """The axis of k along which positions, or blocks of them, follow each other."""
        return 2 if self.k.ndim == 5 else 3

    @property
    def axes(self) -> "KVCache":
        """Its logical axes."""
        k = ("cache_length", "head_dim", None) if self.k.ndim == 5 else ("head_dim", "cache_length")
        spec = PartitionSpec("batch", "kv_heads", *k)
        return KVCache(jax.tree.map(lambda _: spec, self.k), jax.tree.map(lambda _: VALUE_AXES, self.v))


VALUE_AXES = PartitionSpec("batch", "kv_heads", "cache_length", "head_dim")


def init_cache(config: LlamaConfig, batch: int, length: int, dtype, *, blocks: bool) -> tuple[KVCache, ...]:
    """An empty cache of `batch` rows and `length` positions, layer by layer; `dtype` int8: a quantized one.

    With `blocks` the keys are in blocks, and `length` must be a multiple of BLOCK.
    """
    rows, size = (batch, config.num_kv_heads), config.head_dim
    k = (length // BLOCK, size, BLOCK) if blocks else (size, length)
    return tuple(
        KVCache(_zeros((*rows, *k), len(k), dtype), _zeros((*rows, length, size), 3, dtype))
        for _ in range(config.num_layers)
    )


def _zeros(shape: tuple[int, ...], heads: int, dtype) -> Array:
    """Zeros, of which axis `heads` shares a scale if they are int8."""
    zeros = jnp.zeros(shape, dtype)
    if dtype != jnp.int8:
        return zeros
    return Quantized(zeros, jnp.zeros([1 if axis == heads else size for axis, size in enumerate(shape)], jnp.float32))


def in_blocks(cache: KVCache) -> KVCache:
    """The same cache with its keys [B,K,H,S] in blocks; zeros fill up the last block, in keys and values."""
    cache = grow(cache, cache.length + -cache.length % BLOCK)
    return cache._replace(k=jax.tree.map(lambda k: k.reshape(*k.shape[:3], -1, BLOCK).swapaxes(2, 3), cache.k))


def grow(cache: KVCache, length: int) -> KVCache:
    """The same rows with room for `length` positions, a multiple of BLOCK if the keys are in blocks."""
    more = length - cache.length

    def pad(axis, more, x):
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    in_keys = more // BLOCK if cache.k.ndim == 5 else more
    k = jax.tree.map(partial(pad, cache.key_axis, in_keys), cache.k)
    return KVCache(k, jax.tree.map(partial(pad, 2, more), cache.v))


def init_recent(config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[KVCache, ...]:
    """Room for the keys and values of `length` decode steps, layer by layer: k and v are both [B,K,length,H]."""
    zeros = _zeros((batch, config.num_kv_heads, length, config.head_dim), 3, dtype)
    return (KVCache(zeros, zeros),) * config.num_layers


@jax.named_scope("cache")
def write_recent(recent: KVCache, step: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """`recent` with k, v [B,K,H] of step int32[]: one place for all rows, so nothing is scattered."""

    def put(old, new):
        return jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None], step, 2)

    return KVCache(jax.tree.map(put, recent.k, like(k, recent.k)), jax.tree.map(put, recent.v, like(v, recent.v)))


@jax.named_scope("cache")
def write(cache: KVCache, at: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """The cache, its keys in blocks, with k, v [B,K,H] at the positions at int32[B]. Past its end nothing is written:
    that is the position of a row that has ended with a full cache."""
    rows, whole = jnp.arange(len(at)), slice(None)

    def put(where, old, new):
        return old.at[where].set(new, mode="drop", unique_indices=True)

    in_block = partial(put, (rows, whole, at // BLOCK, whole, at % BLOCK))
    k = jax.tree.map(in_block, cache.k, like(k, cache.k))
    return KVCache(k, jax.tree.map(partial(put, (rows, whole, at)), cache.v, like(v, cache.v)))


@jax.named_scope("cache")
def join(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first count int32[B] of each row's recent positions written at begin int32[B] and after.

    Positions past the end of the cache are dropped. The product with a matrix of zeros and ones only moves numbers.
    """
    place = jnp.arange(cache.length)[None] - begin[:, None]  # among the recent ones, [B,S]
    fresh = (place >= 0) & (place < count[:, None])
    moves = jnp.arange(recent.length)[None, :, None] == place[:, None]

    def merge(axes, fresh, old, new):
        moved = jnp.einsum(f"BKRH,BRS->{axes}", new, moves.astype(new.dtype), precision=jax.lax.Precision.HIGHEST)
        return jnp.where(fresh, moved, old)

    k = jax.tree.map(partial(merge, "BKHS", fresh[:, None, None, :]), cache.k, recent.k)
    return KVCache(k, jax.tree.map(partial(merge, "BKSH", fresh[:, None, :, None]), cache.v, recent.v))
