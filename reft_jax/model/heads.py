"""Heads on the trunk's last hidden state. They compute in float32, whatever the trunk computes in."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# A float32 product on TPU and GPU is truncated to bfloat16 or TF32 unless asked otherwise.
_EXACT = jax.lax.Precision.HIGHEST


class ValueHead(nn.Module):
    """hidden [...,D] -> value float32[...]: one linear layer with bias, both drawn uniformly from ±1/√D."""

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        width = hidden.shape[-1]

        def init(key, shape):
            return jax.random.uniform(key, shape, jnp.float32, -(width**-0.5), width**-0.5)

        weight = self.param("weight", nn.with_logical_partitioning(init, ("embed",)), (width,))
        bias = self.param("bias", nn.with_logical_partitioning(init, ()), ())
        return jnp.einsum("...D,D->...", hidden.astype(jnp.float32), weight, precision=_EXACT) + bias


class RerankHead(nn.Module):
    """hidden [...,D] -> logits float32[...,2], class 1 = correct: one linear layer without bias, normal 0.02."""

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed", "classes"))
        weight = self.param("weight", init, (hidden.shape[-1], 2))
        return jnp.einsum("...D,DC->...C", hidden.astype(jnp.float32), weight, precision=_EXACT)
