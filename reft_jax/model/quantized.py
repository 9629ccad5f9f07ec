"""Arrays of int8 with scales: weights and cache of rollouts, if `engine.weights` or `engine.cache` says so.

Symmetric: x ≈ q · scale with q from -127 to 127. One scale stands for the numbers along one axis; it is their largest
absolute value divided by 127, so no number is clipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """The array q · scale: q int8; scale float32 has q's axes but one, whose numbers share a scale."""

    q: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def ndim(self) -> int:
        return self.q.ndim

    def numbers(self, axis: int, dtype) -> jax.Array:
        """The array itself, in `dtype`; `axis` is the one that shares a scale."""
        return (self.q * jnp.expand_dims(self.scale, axis)).astype(dtype)


Array = jax.Array | Quantized


def quantize(x: jax.Array, axis: int) -> Quantized:
    """x with one scale for all numbers along `axis`. A number that is NaN or infinite makes its scale so too: int8 does
    not hide it."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale.squeeze(axis))


def like(x: jax.Array, stored: Array) -> Array:
    """x [...,H] in the form of the array that will hold it: quantized along H, or in its type."""
    return quantize(x, -1) if isinstance(stored, Quantized) else x.astype(stored.dtype)


def turned(x: Array) -> Array:
    """x with its last two axes exchanged."""
    return x._replace(q=x.q.mT) if isinstance(x, Quantized) else x.mT


def matmul(a: Array, b: Array) -> jax.Array:
    """a @ b -> float32, also summed in float32. One of the two may be quantized, with a scale for each of its outputs.

    Its q is then a factor in the type of the other one, and the scale multiplies the sums. So a compiler that makes the
    conversion part of the product reads one byte per number.
    """
    scale = None
    if isinstance(a, Quantized):
        a, scale = a.q.astype(b.dtype), a.scale[..., :, None]
    elif isinstance(b, Quantized):
        b, scale = b.q.astype(a.dtype), b.scale[..., None, :]
    sums = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return sums if scale is None else sums * jnp.expand_dims(scale, range(sums.ndim - scale.ndim))
