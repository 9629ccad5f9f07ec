"""The key-value cache: fixed shapes, every row at its own position, one pair of arrays a layer.

Keys keep the cache position last and values keep it second to last: the two layouts in which the matrix products of a
decode step read memory in order. Layers are separate arrays, and as long as the longest row needs (`grow`): a product
cannot read a slice of a larger array in place, so one stacked cache would be copied, layer by layer, in every step.

A decode step writes to it in place (`in_place`), each row at a position of its own. Not on a TPU, which would lay the
whole cache out anew for that, and back again: there, what a few steps add is kept beside it (`init_recent`, `beside`),
where all rows write at one place, and joined to it after them (`join`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from reft_jax.model.llama_config import LlamaConfig


class KVCache(NamedTuple):
    """One layer: k dtype[B,K,H,S], v dtype[B,K,S,H]. How many positions of a row are valid is the caller's to know."""

    k: jax.Array
    v: jax.Array


CACHE_AXES = KVCache(
    k=PartitionSpec("batch", "kv_heads", "head_dim", "cache_length"),
    v=PartitionSpec("batch", "kv_heads", "cache_length", "head_dim"),
)
RECENT_AXES = KVCache(CACHE_AXES.v, CACHE_AXES.v)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[KVCache, ...]:
    """An empty cache of `batch` rows and `length` positions, layer by layer; `dtype` is the model's compute dtype."""
    rows = (batch, config.num_kv_heads)
    return tuple(
        KVCache(
            k=jnp.zeros((*rows, config.head_dim, length), dtype),
            v=jnp.zeros((*rows, length, config.head_dim), dtype),
        )
        for _ in range(config.num_layers)
    )


def grow(cache: KVCache, length: int) -> KVCache:
    """The same rows with room for `length` positions."""
    more = length - cache.k.shape[-1]
    return KVCache(
        k=jnp.pad(cache.k, ((0, 0), (0, 0), (0, 0), (0, more))),
        v=jnp.pad(cache.v, ((0, 0), (0, 0), (0, more), (0, 0))),
    )


def init_recent(config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> tuple[KVCache, ...]:
    """Room for what `length` decode steps add to a cache, layer by layer: k and v are [B,K,length,H] both."""
    zeros = jnp.zeros((batch, config.num_kv_heads, length, config.head_dim), dtype)
    return (KVCache(zeros, zeros),) * config.num_layers


def beside(cache: KVCache, recent: KVCache, step: jax.Array, old: jax.Array, new: jax.Array, k, v):
    """What k [B,K,H,1], v [B,K,1,H] of step int32[] attend to, themselves included, for `attend`; and `recent` with
    them: the same place in every row, so nothing is scattered. old, new: what is seen of the cache and of `recent`."""
    recent = KVCache(
        *(
            jax.lax.dynamic_update_slice_in_dim(there, added.astype(there.dtype), step, 2)
            for there, added in zip(recent, (k.swapaxes(2, 3), v), strict=True)
        )
    )
    return [(*cache, old), (recent.k.swapaxes(2, 3), recent.v, new)], recent


def in_place(cache: KVCache, at: jax.Array, seen: jax.Array, k, v):
    """The same where the cache takes k [B,K,H,1], v [B,K,1,H] at the positions at int32[B]."""

    def one_row(old, new, at, axis):
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis)

    write = jax.vmap(one_row, (0, 0, 0, None))
    cache = KVCache(write(cache.k, k, at, 2), write(cache.v, v, at, 1))
    return [(*cache, seen)], cache


def join(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first count int32[B] of a row's recent positions at begin int32[B] and after.

    What lies past the end of the cache is dropped. The product with a matrix of zeros and ones only moves numbers.
    """
    place = jnp.arange(cache.v.shape[2])[None] - begin[:, None]  # among the recent ones, [B,S]
    fresh = (place >= 0) & (place < count[:, None])
    moved = (jnp.arange(recent.v.shape[2])[None, :, None] == place[:, None]).astype(cache.v.dtype)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    k = jnp.einsum("BKRH,BRS->BKHS", recent.k, moved, **exact)
    v = jnp.einsum("BKRH,BRS->BKSH", recent.v, moved, **exact)
    return KVCache(jnp.where(fresh[:, None, None, :], k, cache.k), jnp.where(fresh[:, None, :, None], v, cache.v))
