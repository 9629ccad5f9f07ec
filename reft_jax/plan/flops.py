"""The FLOPs and bytes that a Llama needs by its formulas, independent of how a compiled function computes them.

A product of an m×k and a k×n matrix counts as 2mkn FLOPs. The rest (norms, softmax, rotations) is left out, as usual.
"""

from reft_jax.model.llama_config import LlamaConfig


def matrix_parameters(config: LlamaConfig) -> int:
    """Parameters that every token is multiplied with: all except norms and an embedding that is only looked up."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size


def parameters(config: LlamaConfig) -> int:
    """All parameters of the language model."""
    embeddings = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return matrix_parameters(config) + embeddings + config.hidden_size + config.num_layers * _vectors(config)


def _vectors(config: LlamaConfig) -> int:
    """Parameters of a layer's norms and biases."""
    c = config
    biases = c.qkv_bias * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.o_bias * c.hidden_size
    biases += c.mlp_bias * (2 * c.intermediate_size + c.hidden_size)
    return 2 * c.hidden_size + c.qk_norm * 2 * c.head_dim + biases


def attention_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """FLOPs of causal attention in a forward pass: scores and sums over half of all pairs, 2·L·N·H·length² per row."""
    return rows * 2 * config.num_layers * config.num_heads * config.head_dim * length**2


def trunk_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """FLOPs of a forward pass over rows of `length` tokens, without the output layer.

    2 per parameter and token, and attention. A backward pass costs twice as much as a forward pass.
    """
    in_layers = matrix_parameters(config) - config.vocab_size * config.hidden_size
    return rows * 2 * in_layers * length + attention_flops(config, rows, length)


def forward_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """FLOPs of a forward pass with the output layer at every token."""
    return trunk_flops(config, rows, length) + 2 * rows * length * config.vocab_size * config.hidden_size


def decode_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """FLOPs of one decode step: one token per row, which sees `length` positions."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * length
    return rows * (2 * matrix_parameters(config) + attention)


def cache_bytes(config: LlamaConfig, rows: int, length: int, width: int) -> int:
    """Bytes of the keys and values of rows of `length` positions, at `width` bytes per number."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * length * width
