"""A Llama as rollouts run it: parameters in the compute dtype, layer by layer, each matrix in the form in which a
decode step reads it without copying it first (`Block.form`)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.llama import Llama


def for_rollouts(model: Llama, mesh: jax.sharding.Mesh) -> Llama:
    """The model that takes these parameters on the mesh's devices."""
    return model.clone(unrolled=True, tpu=mesh.devices.flat[0].platform == "tpu")


def rollout_layer(model: Llama, layers, i):
    """Layer i of stacked layers in the form that `model` (`for_rollouts`) takes, with its logical axes (boxed)."""

    def form(x, axes):
        if "head_dim" in axes:  # becomes one axis with the heads before it
            at = axes.index("head_dim")
            x, axes = x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :]), (*axes[:at], *axes[at + 1 :])
        if x.ndim == 2 and (axes[0] == "embed" or not model.tpu):
            x, axes = x.T, axes[::-1]
        return _rollout_form(model, x, axes)

    axes = _axes(model)["layers"]
    return {name: form(x[i], tuple(axes[name][1:])) for name, x in layers.items()}


def rollout_rest(model: Llama, lm):
    """The same of everything but the layers."""

    def form(x, axes):
        axes = tuple(axes)
        if axes == ("embed", "vocab") and not model.tpu:
            x, axes = x.T, axes[::-1]
        return _rollout_form(model, x, axes)

    axes = _axes(model)
    return {name: jax.tree.map(form, lm[name], axes[name]) for name in lm if name != "layers"}


def _rollout_form(model: Llama, x, axes):
    return nn.LogicallyPartitioned(x.astype(model.dtype), axes)


def _axes(model: Llama):
    """The logical axes of the parameters as training has them."""

    def init():
        return model.clone(unrolled=False).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    return nn.get_partition_spec(jax.eval_shape(init))
