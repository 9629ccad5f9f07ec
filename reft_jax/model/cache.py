"""The key-value cache: fixed shapes, every row at its own position.

Keys keep the cache position last and values keep it second to last: the two layouts in which the matrix
products of a decode step read memory in order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

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


def init_cache(config: LlamaConfig, batch: int, length: int, dtype=jnp.float32) -> KVCache:
    """An empty cache of `batch` rows and `length` positions; `dtype` is the model's compute dtype."""
    rows = (config.num_layers, batch, config.num_kv_heads)
    return KVCache(
        k=jnp.zeros((*rows, config.head_dim, length), dtype),
        v=jnp.zeros((*rows, length, config.head_dim), dtype),
    )
