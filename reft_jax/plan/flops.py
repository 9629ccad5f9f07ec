"""What a Llama costs on paper: the FLOPs that its mathematics needs, whatever a program makes of them.

A product of an m×k and a k×n matrix is 2mkn FLOPs. Everything else (norms, softmax, rotations) is left out, as usual.
"""

from reft_jax.model.llama_config import LlamaConfig


def matrix_parameters(config: LlamaConfig) -> int:
    """Parameters that every token is multiplied with: all but the norms and an embedding that is only looked up."""
    c = config
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size


def parameters(config: LlamaConfig) -> int:
    """All of the language model."""
    embeddings = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    return matrix_parameters(config) + embeddings + (2 * config.num_layers + 1) * config.hidden_size


def trunk_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """Of rows of `length` tokens, without the output layer: 2 a parameter and token, and causal attention, half of all
    pairs, twice (scores and sums): 2·L·N·H·length² a row. A backward pass is twice as much again."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * length**2
    in_layers = matrix_parameters(config) - config.vocab_size * config.hidden_size
    return rows * (2 * in_layers * length + attention)


def forward_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """With the output layer at every token."""
    return trunk_flops(config, rows, length) + 2 * rows * length * config.vocab_size * config.hidden_size


def decode_flops(config: LlamaConfig, rows: int, length: int) -> int:
    """Of one token a row that sees `length` positions."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * length
    return rows * (2 * matrix_parameters(config) + attention)


def cache_bytes(config: LlamaConfig, rows: int, length: int, width: int) -> int:
    """Keys and values of rows of `length` positions, `width` bytes a number."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * length * width
