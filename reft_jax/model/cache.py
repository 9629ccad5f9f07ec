"""The key-value cache: fixed shapes, every row at its own position.

Keys keep the cache position last and values keep it second to last: the two layouts in which the matrix
products of a decode step read memory in order.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

if TYPE_CHECKING:  # llama.py writes to the cache, so it imports this file
    from reft_jax.model.llama import LlamaConfig


class KVCache(NamedTuple):
    """k dtype[L,B,K,H,S], v dtype[L,B,K,S,H]. How many positions of a row are valid is the caller's to know."""

    k: jax.Array
    v: jax.Array


# Logical axes, in the form that `nn.logical_to_mesh_sharding` takes.
CACHE_AXES = KVCache(
    k=PartitionSpec("layers", "batch", "kv_heads", "head_dim", "cache_length"),
    v=PartitionSpec("layers", "batch", "kv_heads", "cache_length", "head_dim"),
)


def init_cache(config: "LlamaConfig", batch: int, length: int, dtype=jnp.float32) -> KVCache:
    """An empty cache of `batch` rows and `length` positions; `dtype` is the model's compute dtype."""
    rows = (config.num_layers, batch, config.num_kv_heads)
    return KVCache(
        k=jnp.zeros((*rows, config.head_dim, length), dtype),
        v=jnp.zeros((*rows, length, config.head_dim), dtype),
    )


def write_prefix(cache: KVCache, layer: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """Writes k [B,K,H,T] and v [B,K,T,H] at positions 0..T-1 of one layer."""
    start = (layer, 0, 0, 0, 0)
    return KVCache(
        k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
        v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
    )


def write_rows(cache: KVCache, layer: jax.Array, positions: jax.Array, k: jax.Array, v: jax.Array) -> KVCache:
    """Writes k, v [B,K,H] of one layer, each row at its own position int32[B]; one outside the cache is dropped."""
    indices = jnp.stack([jnp.full_like(positions, layer), positions], axis=-1)

    def scatter(array, updates, position_axis):
        # What `array.at[layer, arange(B), ...].set` means, with the rows declared a batch dimension: indexed by
        # an arange, rows sharded over devices would be gathered in every layer of every step.
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2),
            inserted_window_dims=(0, position_axis),
            scatter_dims_to_operand_dims=(0, position_axis),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )
        updates = updates.astype(array.dtype)
        return jax.lax.scatter(array, indices, updates, numbers, unique_indices=True, mode="drop")

    return KVCache(k=scatter(cache.k, k, 4), v=scatter(cache.v, v, 3))
