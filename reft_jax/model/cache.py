"""The key-value cache: fixed shapes, every row at its own position, one pair of arrays a layer.

Keys keep the cache position last and values keep it second to last: the two layouts in which the matrix products of a
decode step read memory in order. Layers are separate arrays, and as long as the longest row needs (`grow`): a product
cannot read a slice of a larger array in place, so one stacked cache would be copied, layer by layer, in every step.

Decode steps do not write to it. What a few steps add is kept beside it (`init_recent`), where all rows write at one
place, and joined to it after them.
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


def write_recent(recent: KVCache, step: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """k, v [B,K,1,H] as what step int32[] adds: the same place in every row, so nothing is scattered."""
    return KVCache(
        *(
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), step, 2)
            for old, new in zip(recent, (k, v), strict=True)
        )
    )


def join(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """The cache with the first count int32[B] of a row's recent positions at begin int32[B] and after.

    What lies past the end of the cache is dropped.
    """
    return jax.lax.platform_dependent(cache, recent, begin, count, tpu=join_by_choice, default=join_in_place)


def join_by_choice(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """`join` where writing at a place of its own in every row is dear: a TPU would lay the whole cache out anew for it,
    and back again. The product with a matrix of zeros and ones only moves numbers."""
    place = jnp.arange(cache.v.shape[2])[None] - begin[:, None]  # among the recent ones, [B,S]
    fresh = (place >= 0) & (place < count[:, None])
    moved = (jnp.arange(recent.v.shape[2])[None, :, None] == place[:, None]).astype(cache.v.dtype)
    exact = {"precision": jax.lax.Precision.HIGHEST}
    k = jnp.einsum("BKRH,BRS->BKHS", recent.k, moved, **exact)
    v = jnp.einsum("BKRH,BRS->BKSH", recent.v, moved, **exact)
    return KVCache(jnp.where(fresh[:, None, None, :], k, cache.k), jnp.where(fresh[:, None, :, None], v, cache.v))


def join_in_place(cache: KVCache, recent: KVCache, begin: jax.Array, count: jax.Array) -> KVCache:
    """`join` where that is cheap: touches as many positions of a row as there are recent ones."""
    window = min(recent.v.shape[2], cache.v.shape[2])

    def one_row(k, v, recent_k, recent_v, begin, count):
        first = jnp.minimum(begin, v.shape[1] - window)  # so that the window lies within the cache
        place = first - begin + jnp.arange(window)
        fresh = (place >= 0) & (place < count)

        def write(old, new, axis):
            kept = jax.lax.dynamic_slice_in_dim(old, first, window, axis)
            new = jnp.where(fresh if axis == 2 else fresh[:, None], new, kept)
            return jax.lax.dynamic_update_slice_in_dim(old, new, first, axis)

        chosen = jnp.maximum(place, 0)
        return write(k, recent_k[:, chosen].swapaxes(1, 2), 2), write(v, recent_v[:, chosen], 1)

    return KVCache(*jax.vmap(one_row)(*cache, *recent, begin, count))
