"""A model as rollouts run it (decode.py), and its weights: in the compute dtype, layer by layer.

Each matrix has the form that a decode step reads without copying it first, heads and head dimension as one axis. Off
TPUs that is [out, in]. On a TPU it is [other axis, D] in a layer and [D,V] for the output matrix: from another form a
TPU would first copy the weights into this one.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from reft_jax.model.llama import LAYER_AXES, Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.lora import merged


@dataclass(frozen=True)
class RolloutModel:
    """`dtype`: of weights, cache and computation. `tpu`: weights and cache have the forms that a TPU wants."""

    config: LlamaConfig
    dtype: Any
    tpu: bool


def for_rollouts(model: Llama, mesh: jax.sharding.Mesh) -> RolloutModel:
    """The model in the form for the mesh's devices."""
    return RolloutModel(model.config, model.dtype, tpu=mesh.devices.flat[0].platform == "tpu")


def rollout_layer(model: RolloutModel, layers, i):
    """Layer i of stacked layers in the form for rollouts, its adapter merged, with its logical axes (boxed)."""

    def form(x, axes):
        if "head_dim" in axes[1:]:  # becomes one axis with the heads before it
            at = axes.index("head_dim")
            x, axes = x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :]), (*axes[:at], *axes[at + 1 :])
        return _boxed(model, x, axes, turn=x.ndim == 2 and (axes[0] == "embed" or not model.tpu))

    own = merged({name: x[i] for name, x in layers.items()})
    return {name: form(x, LAYER_AXES[name]) for name, x in own.items()}


def rollout_rest(model: RolloutModel, lm):
    """The same of everything but the layers."""
    rest = {"embed": _boxed(model, lm["embed"], ("vocab", "embed"))}
    rest["final_norm"] = _boxed(model, lm["final_norm"], ("embed",))
    if "lm_head" in lm:
        kernel = _boxed(model, lm["lm_head"]["kernel"], ("embed", "vocab"), turn=not model.tpu)
        rest["lm_head"] = {"kernel": kernel}
    return rest


def _boxed(model: RolloutModel, x, axes: tuple[str, ...], turn: bool = False) -> nn.LogicallyPartitioned:
    if turn:
        x, axes = x.T, axes[::-1]
    return nn.LogicallyPartitioned(x.astype(model.dtype), axes)
