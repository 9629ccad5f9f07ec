"""Tiny fakes, the only ones: models small enough to compile in a second, with every feature of a large one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.algo.algorithms import PPO
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.rollout_weights import RolloutModel
from reft_jax.parallel.mesh import make_mesh, unboxed
from reft_jax.train.state import TrainState, abstract_params, new_state, state_shardings


def tiny_config(**overrides) -> LlamaConfig:
    """Two layers, four heads over two kv heads; head_dim is not hidden_size / num_heads."""
    fields = dict(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return LlamaConfig(**fields | overrides)


def tiny_model(seed: int = 0, **overrides) -> tuple[Llama, dict]:
    """A model and float32 parameters, norms included, far enough from their initial values to matter."""
    model = Llama(tiny_config(**overrides))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    return model, drawn(shapes, seed)


def drawn(shapes, seed: int):
    """Parameters drawn by NumPy: XLA takes seconds to compile an init, which tests of other things need not pay."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(float("norm" in path[-1].key), 0.2, leaf.shape), jnp.float32)

    return jax.tree.map_with_path(draw, shapes)


HEADS = {"value_head": ValueHead(), "rerank_head": RerankHead()}


def tiny_policy(head: str = "value_head", **overrides) -> tuple[Llama, dict]:
    """A model and the parameters {'lm', head} of a policy or a reranker; with head "" {'lm'}."""
    model = Llama(tiny_config(**overrides))
    return model, drawn(unboxed(abstract_params(model, HEADS.get(head), head)), seed=0)


def tiny_state(model, params, optimizer, mesh=None) -> tuple[TrainState, TrainState]:
    """A state at step 0 around a copy of `params` (a step may take it over), and its shardings."""
    mesh = mesh or make_mesh(1, 1, 1)
    head = "".join(params.keys() - {"lm"})
    abstract = abstract_params(model, HEADS.get(head), head)
    where = state_shardings(mesh, optimizer, abstract)
    params = jax.tree.map(lambda x, at: jax.device_put(np.array(x), at), params, where.params)
    return new_state(mesh, optimizer, abstract, params), where


def rollouts_on(platform: str):
    """A stand-in for `for_rollouts`: weights and cache have the forms of that platform."""
    return lambda model, mesh, int8=(): RolloutModel(model.config, model.dtype, platform, int8)


def tiny_ppo(**settings) -> PPO:
    """The paper's coefficients, with some changed."""
    paper = {"kl_coef": 0.01, "gamma": 1.0, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "vf_coef": 5.0}
    return PPO(**paper | {"temperature": 1.0} | settings)
