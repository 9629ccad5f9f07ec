"""The key-value cache: fixed shapes, every row at its own position, one pair of arrays a layer.

Keys keep the cache position last and values keep it second to last: the two layouts in which the matrix products of a
decode step read memory in order. Layers are separate arrays, and as long as the longest row needs (`grow`): a product
cannot read a slice of a larger array in place, so one stacked cache would be copied, layer by layer, in every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.model.llama_config import LlamaConfig


class KVCache(NamedTuple):
    """One layer: k dtype[B,K,H,S], v dtype[B,K,S,H]. How many positions of a row are valid is the caller's to know."""

    k: jax.Array
    v: jax.Array


CACHE_AXES = KVCache(
    k=("batch", "kv_heads", "head_dim", "cache_length"), v=("batch", "kv_heads", "cache_length", "head_dim")
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


def write_rows(cache: KVCache, positions: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """Writes k, v [B,K,H], each row at its own position int32[B]; one outside the cache is dropped."""

    def scatter(array, updates, position_axis):
        # What `array.at[arange(B), ...].set` means, with the rows declared a batch dimension: indexed by an arange,
        # rows sharded over devices would be gathered in every layer of every step.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2),
            inserted_window_dims=(position_axis,),
            scatter_dims_to_operand_dims=(position_axis,),
            operand_batching_dims=(0,),
            scatter_indices_batching_dims=(0,),
        )
        updates = updates.astype(array.dtype)
        return jax.lax.scatter(array, positions[:, None], updates, numbers, unique_indices=True, mode="drop")

    return KVCache(k=scatter(cache.k, k, 3), v=scatter(cache.v, v, 2))
