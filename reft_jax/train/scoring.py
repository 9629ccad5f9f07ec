"""Log-probabilities and values of given rows. Full logits [B,T,V] never exist: 32 × 700 × 32,016 floats are 2.9 GB."""

import jax
import jax.numpy as jnp

from reft_jax.model.heads import ValueHead
from reft_jax.train.packing import CHUNK, Lines


def at_decisions(x, decisions):
    """x [b,T,…] at the places int32[b,W]: [b,W,…]."""
    return jnp.take_along_axis(x, decisions.reshape(*decisions.shape, *[1] * (x.ndim - 2)), 1)


def hidden_states(model, lm, lines: Lines):
    """Hidden states dtype[b,W,D] at the decisions of one micro-batch."""
    hidden = model.apply({"params": lm}, lines.tokens, lines.positions, lines.segments, method="hidden")
    return at_decisions(hidden, lines.decisions)


def next_token_logprobs(model, lm, hidden, targets, temperature: float = 1.0):
    """Log-probabilities float32[b,W] of `targets` int32[b,W] after hidden [b,W,D]; CHUNK divides W."""
    rows, width = targets.shape

    def chunked(x):  # [b,W,…] -> [W/CHUNK,b,CHUNK,…]
        return jnp.moveaxis(x.reshape(rows, width // CHUNK, CHUNK, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def logprobs(hidden, targets):
        logits = model.apply({"params": lm}, hidden, method="unembed") / temperature
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return picked - jax.nn.logsumexp(logits, -1)

    picked = jax.lax.map(lambda xs: logprobs(*xs), (chunked(hidden), chunked(targets)))
    return jnp.moveaxis(picked, 0, 1).reshape(rows, width)


def score_lines(model, params, lines: Lines, temperature: float = 1.0):
    """Log-probabilities and, where `params` has a value head, values of the decisions: float32[b,W] each (or None)."""
    hidden = hidden_states(model, params["lm"], lines)
    targets = at_decisions(lines.tokens, lines.decisions + 1)
    logprob = next_token_logprobs(model, params["lm"], hidden, targets, temperature)
    if "value_head" not in params:
        return logprob, None
    return logprob, ValueHead().apply({"params": params["value_head"]}, hidden)


def make_scorer(model, temperature: float):
    """Jitted `score(params, Lines [M,b,…], count) -> (logprob, value)`, [M,b,W] each, the first `count` of M."""

    def score(params, lines: Lines, count):
        def one(i, scored):
            new = score_lines(model, params, jax.tree.map(lambda x: x[i], lines), temperature)
            return jax.tree.map(lambda old, new: old.at[i].set(new), scored, new)

        zeros = jnp.zeros(lines.decisions.shape, jnp.float32)
        return jax.lax.fori_loop(0, count, one, (zeros, zeros if "value_head" in params else None))

    return jax.jit(score)
