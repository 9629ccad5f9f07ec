"""Arrays of int8 with scales: weights and cache of rollouts, if `engine.weights` or `engine.cache` says so.

Symmetric: x ≈ q · scale with q from -127 to 127. One scale stands for the numbers along one axis; it is their largest
absolute value divided by 127, so no number is clipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Quantized(NamedTuple):
    """The array q · scale: q int8, scale float32 in q's shape, but of size 1 along the axis that shares a scale."""

    q: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def ndim(self) -> int:
        return self.q.ndim

    def numbers(self, dtype) -> jax.Array:
        """The array itself, in `dtype`."""
        return (self.q * self.scale).astype(dtype)


Array = jax.Array | Quantized


def quantize(x: jax.Array, axis: int) -> Quantized:
    """x with one scale for all numbers along `axis`. A number that is NaN or infinite makes its scale so too: int8 does
    not hide it."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / 127)
    return Quantized(jnp.round(x / scale).astype(jnp.int8), scale)


def like(x: jax.Array, stored: Array) -> Array:
    """x [...,H] in the form of the array that will hold it: quantized along H, or in its type."""
    return quantize(x, -1) if isinstance(stored, Quantized) else x.astype(stored.dtype)


def matmul(a: Array, b: Array) -> jax.Array:
    """a @ b -> float32, also summed in float32. One of the two may be quantized, with a scale for each of its outputs.

    Its q is then a factor in the type of the other one, and the scale multiplies the sums. So a compiler that makes the
    conversion part of the product reads one byte per number.
    """
    scale = next((x.scale for x in (a, b) if isinstance(x, Quantized)), None)
    a, b = (x.q.astype(y.dtype) if isinstance(x, Quantized) else x for x, y in ((a, b), (b, a)))
    sums = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return sums if scale is None else sums * jnp.expand_dims(scale, range(sums.ndim - scale.ndim))
