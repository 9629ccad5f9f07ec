"""Log-probabilities and values of given rows. Full logits [B,T,V] never exist: 32 × 700 × 32,016 floats are 2.9 GB."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.heads import ValueHead
from reft_jax.parallel.mesh import rows_per_device
from reft_jax.train.packing import Lines

LOGITS_AT_ONCE = 256  # decisions a device whose logits exist at one time


def at_decisions(x, decisions):
    """x [b,T,…] at the places int32[b,W]: [b,W,…]; where there is no decision, something."""
    places = jnp.clip(decisions, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), 1)


def hidden_states(model, lm, lines: Lines):
    """Hidden states dtype[b,W,D] at the decisions of one micro-batch."""
    hidden = model.apply({"params": lm}, lines.tokens, lines.positions, lines.segments, method="hidden")
    return at_decisions(hidden, lines.decisions)


def decisions_at_once(rows: int, width: int) -> int:
    """Of each of `rows` lines with at most `width` decisions, how many are scored together."""
    return min(width, max(1, LOGITS_AT_ONCE // rows_per_device(rows)))


def next_token_logprobs(model, lm, hidden, targets, used, temperature: float = 1.0):
    """Log-probabilities float32[b,W] of `targets` int32[b,W] after hidden dtype[b,W,D], of the first `used` of W.

    A few decisions at a time, forward and backward, and no more than hold `used` int32[], which may differ between
    batches without another compile: that is why the gradient is written out. What lies beyond `used` means nothing.

    Each row shard adds up its own part of the output matrix's gradient, which is summed over shards once, after the
    last chunk; and the matrix is gathered once, before the first.
    """
    rows, width = targets.shape
    chunk, shards = decisions_at_once(rows, width), rows // rows_per_device(rows)
    padding = ((0, 0), (0, -width % chunk))
    hidden, targets = jnp.pad(hidden, (*padding, (0, 0))), jnp.pad(targets, padding)
    head = {name: lm[name] for name in (["embed"] if model.config.tie_embeddings else ["lm_head"])}
    rest = {name: lm[name] for name in ("embed", "final_norm") if name not in head}

    def whole(head):
        axes = {"embed": ("vocab", "act_embed"), "lm_head": {"kernel": ("act_embed", "vocab")}}
        axes = {name: axes[name] for name in head}
        return jax.tree.map(lambda x, axes: nn.with_logical_constraint(x.astype(model.dtype), axes), head, axes)

    def logprobs(head, rest, hidden, targets):
        logits = model.apply({"params": head | rest}, hidden, method="unembed") / temperature
        return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)

    def part(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1)

    def over_chunks(used, step, start):
        with jax.named_scope("decisions"):
            return jax.lax.fori_loop(0, (used + chunk - 1) // chunk, step, start)

    @jax.custom_vjp
    def scored(head, rest, hidden, targets, used):
        head = whole(head)

        def step(i, out):
            new = logprobs(head, rest, part(hidden, i), part(targets, i))
            return jax.lax.dynamic_update_slice_in_dim(out, new, i * chunk, 1)

        return over_chunks(used, step, jnp.zeros(targets.shape, jnp.float32))

    def backward(kept, gradient):
        head, rest, hidden, targets, used = kept
        zeros = jax.tree.map(jnp.zeros_like, (head, hidden))
        head = whole(head)

        def step(i, sums):
            to_head, to_hidden = sums
            _, pull = jax.vjp(lambda head, h: logprobs(head, rest, h, part(targets, i)), head, part(hidden, i))
            more, new = pull(part(gradient, i))
            to_hidden = jax.lax.dynamic_update_slice_in_dim(to_hidden, new, i * chunk, 1)
            return jax.tree.map(jnp.add, to_head, more), to_hidden  # summed in the parameters' float32

        to_head, to_hidden = over_chunks(used, step, zeros)
        return to_head, None, to_hidden, None, None

    scored.defvjp(lambda *args: (scored(*args), args), backward)
    by_shard = (x.reshape(shards, -1, *x.shape[1:]) for x in (hidden, targets))
    every_shard = jax.vmap(scored, (None, None, 0, 0, None), spmd_axis_name=("data", "fsdp"))
    return every_shard(head, rest, *by_shard, used).reshape(rows, -1)[:, :width]


def score_lines(model, params, lines: Lines, temperature: float = 1.0):
    """Log-probabilities and, where `params` has a value head, values of the decisions: float32[b,W] each (or None)."""
    hidden = hidden_states(model, params["lm"], lines)
    targets = at_decisions(lines.tokens, lines.decisions + 1)
    used = (lines.decisions >= 0).sum(1).max()
    logprob = next_token_logprobs(model, params["lm"], hidden, targets, used, temperature)
    if "value_head" not in params:
        return logprob, None
    return logprob, ValueHead().apply({"params": params["value_head"]}, hidden)


def for_micro_batches(score, lines: Lines, count, zeros):
    """Arrays [M,b,…] like `zeros` with `score` of each of the first `count` micro-batches of lines [M,b,…]."""
    if len(lines.tokens) == 1:  # no loop: XLA would move what never changes in it out of it, and keep it in there too
        return jax.tree.map(lambda x: x[None], score(jax.tree.map(lambda x: x[0], lines)))

    def one(i, scored):
        new = score(jax.tree.map(lambda x: x[i], lines))
        return jax.tree.map(lambda old, new: old.at[i].set(new), scored, new)

    with jax.named_scope("micro_batches"):
        return jax.lax.fori_loop(0, count, one, zeros)


def make_scorer(model, temperature: float):
    """Jitted `score(params, Lines [M,b,…], count) -> (logprob, value)`, [M,b,W] each, the first `count` of M."""

    def score(params, lines: Lines, count):
        zeros = jnp.zeros(lines.decisions.shape, jnp.float32)
        one = partial(score_lines, model, params, temperature=temperature)
        return for_micro_batches(one, lines, count, (zeros, zeros if "value_head" in params else None))

    return jax.jit(score)
