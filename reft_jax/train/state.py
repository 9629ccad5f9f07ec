"""TrainState and its optimizer.

Parameters are {'lm': …}, also with 'value_head' or 'rerank_head', float32; with LoRA 'lora' is there instead of 'lm'.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.llama import LORA_B, boxed_shapes
from reft_jax.model.lora import Lora, abstract_adapter
from reft_jax.parallel.mesh import shardings, unboxed


class TrainState(NamedTuple):
    """step int32 (updates so far), params and AdamW moments float32, sharded alike."""

    step: Any
    params: Any
    opt_state: Any


def linear_schedule(peak: float, warmup_share: float, updates: int):
    """Linear warm-up over the first share of the updates, then linear decay to 0."""
    warmup = round(warmup_share * updates)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.linear_schedule(peak, 0.0, max(updates - warmup, 1))],
        [warmup],
    )


def constant_schedule(value: float, warmup: int):
    """Constant, after `warmup` updates of linear warm-up."""
    return optax.linear_schedule(value / (warmup + 1), value, warmup) if warmup else optax.constant_schedule(value)


def make_optimizer(schedule, *, weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW (eps 1e-8; the decay reaches every tensor) after clipping the global norm."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, eps=1e-8, weight_decay=weight_decay))


def abstract_params(model, head: ValueHead | RerankHead | None = None, name: str = ""):
    """Shapes of {'lm', name}, or of {'lm'} without a head, with their logical axes; makes no array."""
    params = {"lm": boxed_shapes(model.config)}
    if head:
        hidden = jax.ShapeDtypeStruct((1, model.config.hidden_size), jnp.float32)
        params[name] = jax.eval_shape(lambda hidden: head.init(jax.random.key(0), hidden)["params"], hidden)
    return params


def init_head(mesh, head: ValueHead | RerankHead, hidden_size: int, seed: int):
    """A new head's parameters on the mesh."""

    def init(key):
        return head.init(key, jnp.zeros((1, hidden_size)))["params"]

    key = jax.random.key(seed)
    where = shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(lambda key: nn.unbox(init(key)), out_shardings=where)(key)


def init_adapter(mesh, lora: Lora, lm, seed: int) -> dict[str, jax.Array]:
    """A new adapter on the mesh, as PEFT draws it: A uniform in ±1/√inputs, B zero. `lm` as for `abstract_adapter`."""
    boxed = abstract_adapter(lora, lm)

    def init(key):
        drawn = {}
        for number, (name, box) in enumerate(boxed.items()):
            shape = box.value.shape
            bound = 0.0 if name.endswith(LORA_B) else math.prod(shape[1:-1]) ** -0.5
            drawn[name] = jax.random.uniform(jax.random.fold_in(key, number), shape, jnp.float32, -bound, bound)
        return drawn

    return jax.jit(init, out_shardings=shardings(mesh, boxed))(jax.random.key(seed))


def abstract_state(optimizer, abstract) -> TrainState:
    """The shapes of a state around `abstract_params`, with their logical axes."""
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), abstract, jax.eval_shape(optimizer.init, abstract))


def state_shardings(mesh, optimizer, abstract) -> TrainState:
    """The sharding of every array of a state; moments are sharded as their parameters."""
    return shardings(mesh, abstract_state(optimizer, abstract))


def new_state(mesh, optimizer, abstract, params) -> TrainState:
    """A state at step 0 around `params`, which it takes over (donated), in the dtypes of `abstract`."""

    def init(params):
        params = jax.tree.map(lambda x, to: x.astype(to.dtype), params, unboxed(abstract))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=state_shardings(mesh, optimizer, abstract), donate_argnums=0)(params)


def apply_gradients(state: TrainState, optimizer, grads) -> tuple[TrainState, Any]:
    """One optimizer update; also the gradient norm before clipping, float32."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), optax.tree.norm(grads)
