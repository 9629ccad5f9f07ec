"""A model as rollouts run it (decode.py), and its weights: in the compute dtype or int8, layer by layer.

Each matrix has the form that a decode step reads without copying it first, heads and head dimension as one axis. Off
TPUs that is [out, in]. On a TPU it is [other axis, D] in a layer and [D,V] for the output matrix: from another form a
TPU would first copy the weights into this one.

int8 is for the matrices of the layers, with a scale for each output. The embeddings, the output matrix, norms and
biases stay in the compute dtype (docs/architecture.md says why).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.llama import LAYER_AXES, Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.lora import merged
from reft_jax.model.quantized import Quantized, quantize


@dataclass(frozen=True)
class RolloutModel:
    """`dtype`: of weights and computation. `platform`: "tpu", "cpu" or another, as JAX names it; weights and
    cache have the forms that it wants. `int8`: which of "weights" and "cache" are quantized (model/quantized.py).
    """

    config: LlamaConfig
    dtype: Any
    platform: str
    int8: tuple[str, ...] = ()

    @cached_property
    def tpu(self) -> bool:
        return self.platform == "tpu"

    @cached_property
    def attention_dtype(self) -> Any:
        """Of queries, keys and values in a decode step.

        float32 on a CPU: XLA writes no bfloat16 into an array there. With each write it would convert the whole cache
        to float32 and back, which was more than half of a step.
        """
        return jnp.float32 if self.platform == "cpu" else self.dtype

    @cached_property
    def cache_dtype(self) -> Any:
        return jnp.int8 if "cache" in self.int8 else self.attention_dtype


def for_rollouts(model: Llama, mesh: jax.sharding.Mesh, int8: tuple[str, ...] = ()) -> RolloutModel:
    """The model in the form for the mesh's devices."""
    return RolloutModel(model.config, model.dtype, mesh.devices.flat[0].platform, int8)


def rollout_layer(model: RolloutModel, layers, i):
    """Layer i of stacked layers in the form for rollouts, its adapter merged, with its logical axes (boxed)."""

    def form(x, axes):
        if "head_dim" in axes[1:]:  # becomes one axis with the heads before it
            at = axes.index("head_dim")
            x, axes = x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :]), (*axes[:at], *axes[at + 1 :])
        turn = x.ndim == 2 and (axes[0] == "embed" or not model.tpu)
        if x.ndim == 2 and "weights" in model.int8:
            q, scale = quantize(x, axis=0)
            return Quantized(_boxed(q, axes, turn), _boxed(scale, axes[1:]))
        return _boxed(x.astype(model.dtype), axes, turn)

    own = merged({name: x[i] for name, x in layers.items()})
    return {name: form(x, LAYER_AXES[name]) for name, x in own.items()}


def rollout_rest(model: RolloutModel, lm):
    """The same of everything but the layers."""
    lm = jax.tree.map(lambda x: x.astype(model.dtype), lm)
    rest = {"embed": _boxed(lm["embed"], ("vocab", "embed")), "final_norm": _boxed(lm["final_norm"], ("embed",))}
    if "lm_head" in lm:
        rest["lm_head"] = {"kernel": _boxed(lm["lm_head"]["kernel"], ("embed", "vocab"), turn=not model.tpu)}
    return rest


def _boxed(x, axes: tuple[str | None, ...], turn: bool = False) -> nn.LogicallyPartitioned:
    return nn.LogicallyPartitioned(x.T, axes[::-1]) if turn else nn.LogicallyPartitioned(x, axes)
