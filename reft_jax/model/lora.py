"""LoRA (arXiv 2106.09685): the base is frozen, and y = x W + (x A) B · alpha / rank, with A and B trained.

An adapter is a flat dict of float32 arrays, {"q_lora_a": [L,…inputs of W,r], "q_lora_b": [L,r,…outputs of W], …}. With
these arrays beside its matrices, a layer adds the second term (`llama.linear`). So a language model with an adapter is
the tree of the base with more leaves (`joined`), and the adapter is off where they are absent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.llama import LORA_A, LORA_B


@dataclass(frozen=True)
class Lora:
    """Which matrices have an adapter, by their names in a layer; its rank, and alpha."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def make_lora(config) -> Lora | None:
    """The adapter of the settings `lora`; None if its rank is 0."""
    settings = config.lora
    if not settings.rank:
        return None
    return Lora(settings.rank, settings.alpha, tuple(map(str.strip, settings.targets.split(","))))


def inputs(name: str) -> int:
    """How many axes of a layer's matrix are inputs: of the output projection heads and head dimension."""
    return 2 if name == "o" else 1


def abstract_adapter(lora: Lora, lm):
    """The shapes of an adapter with their logical axes, from those of a language model (boxed)."""
    found = {}
    for name in lora.targets:
        box = lm["layers"][name]
        cut = 1 + inputs(name)
        for end, shape, axes in (
            (LORA_A, (*box.value.shape[:cut], lora.rank), (*box.names[:cut], "rank")),
            (LORA_B, (box.value.shape[0], lora.rank, *box.value.shape[cut:]), ("layers", "rank", *box.names[cut:])),
        ):
            found[name + end] = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
    return found


def trained(lora: Lora | None, abstract):
    """What a stage trains and saves of `abstract` {'lm', head}: with an adapter, that instead of 'lm'."""
    if lora is None:
        return abstract
    return {"lora": abstract_adapter(lora, abstract["lm"])} | {name: x for name, x in abstract.items() if name != "lm"}


def joined(lm, adapter: Mapping[str, jax.Array], lora: Lora):
    """The language model with the adapter on. alpha / rank is multiplied into B here, and nowhere else."""
    beside = {name: x * lora.scale if name.endswith(LORA_B) else x for name, x in adapter.items()}
    return lm | {"layers": lm["layers"] | beside}


def whole(params, base, lora: Lora | None):
    """The parameters {'lm', head} of what is trained, `params`, and the frozen `base`; without one, `params`."""
    if base is None:
        return params
    heads = {name: x for name, x in params.items() if name != "lora"}
    return {"lm": joined(base, params["lora"], lora)} | heads


def has_adapter(lm) -> bool:
    """Whether an adapter is on; everything else of this language model is then frozen."""
    return any(name.endswith(LORA_A) for name in lm["layers"])


def merge(weight: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """W + A B of one layer, computed in float32, in the type of W [inputs,outputs]. alpha / rank is in B already."""
    added = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + added).astype(weight.dtype)


def merged(layer: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights of one layer with its adapter, if it has one, in them."""
    plain = [name for name in layer if not name.endswith((LORA_A, LORA_B))]
    return {
        name: merge(layer[name], layer[name + LORA_A], layer[name + LORA_B]) if name + LORA_A in layer else layer[name]
        for name in plain
    }


@cache
def _merge_stack(sharding):
    return jax.jit(jax.vmap(merge), donate_argnums=0, out_shardings=sharding)


def merged_model(lm):
    """The language model with its adapter in its weights. Takes the matrices that have one over (donated)."""
    layers, stacks = lm["layers"], {}
    for name, x in layers.items():
        if name + LORA_A in layers:
            stacks[name] = _merge_stack(x.sharding)(x, layers[name + LORA_A], layers[name + LORA_B])
        elif not name.endswith((LORA_A, LORA_B)):
            stacks[name] = x
    return lm | {"layers": stacks}
