"""Tiny fakes, the only ones: models small enough to compile in a second, with every feature of a large one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.model.llama import Llama, LlamaConfig


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
    """A model and float32 parameters, norms included, far enough from their initial values to matter.

    Drawn by NumPy: XLA takes seconds to compile a model's init, which tests of other things need not pay.
    """
    model = Llama(tiny_config(**overrides))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(float("norm" in path[-1].key), 0.2, leaf.shape), jnp.float32)

    return model, jax.tree.map_with_path(draw, shapes)
