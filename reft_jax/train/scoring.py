"""Log-probabilities and values of given rows. Full logits [B,T,V] never exist: 32 × 700 × 32,016 floats are 2.9 GB."""

import jax
import jax.numpy as jnp

from reft_jax.model.heads import ValueHead

CHUNK = 32  # positions whose logits exist at once


def next_token_logprobs(model, lm, hidden, tokens, start, width: int, temperature: float = 1.0):
    """Log-probability of token t+1 for the window `start <= t < start+width` of each row, 0 elsewhere.

    Args: hidden dtype[B,T,D], tokens int32[B,T], start int32[B], width static, a multiple of CHUNK.
    Returns: float32[B,T]. Positions of the window past T-2 are dropped.
    """
    rows, length = tokens.shape
    index = start[:, None] + jnp.arange(width)[None, :]
    inside = jnp.minimum(index, length - 2)
    window = jnp.take_along_axis(hidden, inside[..., None], 1)
    targets = jnp.take_along_axis(tokens, inside + 1, 1)

    def chunked(x):  # [B,W,…] -> [W/CHUNK,B,CHUNK,…]
        return jnp.moveaxis(x.reshape(rows, width // CHUNK, CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def logprobs(hidden, targets):
        logits = model.apply({"params": lm}, hidden, method="unembed") / temperature
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return picked - jax.nn.logsumexp(logits, -1)

    picked = jax.lax.map(lambda xs: logprobs(*xs), (chunked(window), chunked(targets)))
    picked = jnp.moveaxis(picked, 0, 1).reshape(rows, width)
    index = jnp.where(index <= length - 2, index, length)
    return jnp.zeros((rows, length), jnp.float32).at[jnp.arange(rows)[:, None], index].set(picked, mode="drop")


def score_rows(model, params, tokens, start, width: int, temperature: float = 1.0):
    """Log-probabilities and, where `params` has a value head, values: float32[B,T] each (or None)."""
    hidden, _ = model.apply({"params": params["lm"]}, tokens, method="hidden")
    logprob = next_token_logprobs(model, params["lm"], hidden, tokens, start, width, temperature)
    if "value_head" not in params:
        return logprob, None
    return logprob, ValueHead().apply({"params": params["value_head"]}, hidden)


def make_scorer(model, temperature: float):
    """Jitted `score(params, tokens [M,b,T], start [M,b], width) -> (logprob, value)`, [M,b,T] each, one b at a time."""

    def score(params, tokens, start, width):
        return jax.lax.map(lambda xs: score_rows(model, params, *xs, width, temperature), (tokens, start))

    return jax.jit(score, static_argnames="width")
