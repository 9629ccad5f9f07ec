"""Tiny fakes, the only ones: models small enough to compile in a second, with every feature of a large one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    """A model and parameters large enough (deviation 0.2) that attention and the MLP matter to the logits."""
    model = Llama(tiny_config(**overrides))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32)))["params"]
    return model, jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 2 else leaf, params)
