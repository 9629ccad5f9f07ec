"""The key-value cache: fixed shapes, every row at its own position, one pair of arrays per layer.

Keys keep the cache position last and values keep it second to last: in these layouts the matrix products of a decode
step read memory in order. Layers are separate arrays, as long as the longest row needs (`grow`).

Off TPUs keys are in blocks: a product takes 64 positions at a time and reads a block from end to end, at 1.3 times the
rate. A decode step writes into the cache in place (`write`). On a TPU it writes beside the cache (`init_recent`,
`write_recent`), and after a few steps `join` adds what they wrote. decode.py says why.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from reft_jax.model.llama_config import LlamaConfig

BLOCK = 64  # positions of a block of keys


class KVCache(NamedTuple):
    """One layer: k dtype[B,K,H,S], or in blocks dtype[B,K,S/64,H,64]; v dtype[B,K,S,H].

    The caller knows how many positions of a row are valid.
    """

    k: jax.Array
    v: jax.Array

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
        return KVCache(PartitionSpec("batch", "kv_heads", *k), VALUE_AXES)


VALUE_AXES = PartitionSpec("batch", "kv_heads", "cache_length", "head_dim")
RECENT_AXES = KVCache(VALUE_AXES, VALUE_AXES)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype, *, blocks: bool) -> tuple[KVCache, ...]:
    """An empty cache of `batch` rows and `length` positions, layer by layer; `dtype` is the model's compute dtype.

    With `blocks` the keys are in blocks, and `length` must be a multiple of BLOCK.
    """
    rows, size = (batch, config.num_kv_heads), config.head_dim
    k = (length // BLOCK, size, BLOCK) if blocks else (size, length)
    return tuple(
        KVCache(jnp.zeros((*rows, *k), dtype), jnp.zeros((*rows, length, size), dtype))
        for _ in range(config.num_layers)
    )


def in_blocks(cache: KVCache) -> KVCache:
    """The same cache with its keys [B,K,H,S] in blocks; zeros fill up the last block, in keys and values."""
    cache = grow(cache, cache.length + -cache.length % BLOCK)
    *rows, size, _ = cache.k.shape
    return cache._replace(k=cache.k.reshape(*rows, size, -1, BLOCK).swapaxes(2, 3))


def grow(cache: KVCache, length: int) -> KVCache:
    """The same rows with room for `length` positions, a multiple of BLOCK if the keys are in blocks."""
    more = length - cache.length

    def pad(x, axis, more):
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    k = pad(cache.k, cache.key_axis, more // BLOCK if cache.k.ndim == 5 else more)
    return KVCache(k, pad(cache.v, 2, more))


def init_recent(config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[KVCache, ...]:
    """Room for the keys and values of `length` decode steps, layer by layer: k and v are both [B,K,length,H]."""
    zeros = jnp.zeros((batch, config.num_kv_heads, length, config.head_dim), dtype)
    return (KVCache(zeros, zeros),) * config.num_layers


@jax.named_scope("cache")
def write_recent(recent: KVCache, step: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """`recent` with k, v [B,K,H] of step int32[]: one place for all rows, so nothing is scattered."""
    return KVCache(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None].astype(old.dtype), step, 2)
            for old, new in zip(recent, (k, v), strict=True)
        )
    )


@jax.named_scope("cache")
def write(cache: KVCache, at: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """The cache, its keys in blocks, with k, v [B,K,H] at the positions at int32[B]. Past its end nothing is written:
    that is the position of a row that has ended with a full cache."""
    rows = jnp.arange(len(at))
    k = cache.k.at[rows, :, at // BLOCK, :, at % BLOCK].set(k.astype(cache.k.dtype), mode="drop", unique_indices=True)
    v = cache.v.at[rows, :, at].set(v.astype(cache.v.dtype), mode="drop", unique_indices=True)
    return KVCache(k, v)


@jax.named_scope("cache")
def join(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first count int32[B] of each row's recent positions written at begin int32[B] and after.

    Positions past the end of the cache are dropped. The product with a matrix of zeros and ones only moves numbers.
    """
    place = jnp.arange(cache.length)[None] - begin[:, None]  # among the recent ones, [B,S]
    fresh = (place >= 0) & (place < count[:, None])
    moved = (jnp.arange(recent.length)[None, :, None] == place[:, None]).astype(cache.v.dtype)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    k = jnp.einsum("BKRH,BRS->BKHS", recent.k, moved, **exact)
    v = jnp.einsum("BKRH,BRS->BKSH", recent.v, moved, **exact)
    return KVCache(jnp.where(fresh[:, None, None, :], k, cache.k), jnp.where(fresh[:, None, :, None], v, cache.v))
