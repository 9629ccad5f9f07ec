"""Log-probabilities and values of given rows, and losses of them.

Full logits [B,T,V] never exist: 32 × 700 × 32,016 floats are 2.9 GB.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from reft_jax.model.heads import ValueHead
from reft_jax.model.lora import has_adapter
from reft_jax.parallel.mesh import rows_per_device
from reft_jax.train.packing import Lines

LOGITS_AT_ONCE = 256  # decisions per device whose logits exist at one time


def at_decisions(x, decisions):
    """x [b,T,…] at the places int32[b,W]: [b,W,…]. Where there is no decision the value means nothing."""
    places = jnp.clip(decisions, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), 1)


def hidden_states(model, lm, lines: Lines):
    """Hidden states dtype[b,W,D] at the decisions of one micro-batch."""
    hidden = model.apply({"params": lm}, lines.tokens, lines.positions, lines.segments, method="hidden")
    return at_decisions(hidden, lines.decisions)


def decisions_at_once(rows: int, width: int) -> int:
    """How many decisions per line are scored together, for `rows` lines with at most `width` decisions each."""
    return min(width, max(1, LOGITS_AT_ONCE // rows_per_device(rows)))


class Chunks:
    """Takes decisions [b,W] a few at a time, separately in every row shard.

    Only the first `used` int32[] of W are visited; it may differ between batches without compiling again.
    """

    def __init__(self, rows: int, width: int, used):
        self.size, self.shards = decisions_at_once(rows, width), rows // rows_per_device(rows)
        self.rows, self.width, self.count = rows, width, (used + self.size - 1) // self.size

    def split(self, x):
        """[b,W,…] as [shards,b/shards,W',…], W' a whole number of chunks."""
        x = jnp.pad(x, ((0, 0), (0, -self.width % self.size), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(self.shards, -1, *x.shape[1:])

    def part(self, tree, i):
        """Chunk i of every array [b,W',…] of the tree; b: the rows of one shard."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * self.size, self.size, 1), tree)

    def put(self, x, part, i):
        """x [b,W',…] with chunk i replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, part, i * self.size, 1)

    def loop(self, step, start):
        """`carry = step(i, carry)` for every chunk i, from `start`."""
        with jax.named_scope("decisions"):
            return jax.lax.fori_loop(0, self.count, step, start)


def _every_shard(one_shard, *axes):
    """`one_shard` of arrays [shards,…], each row shard on its own devices. axes: as `in_axes` of `jax.vmap`."""
    return jax.vmap(one_shard, axes, spmd_axis_name=("data", "fsdp"))


def _output_matrix(model, lm):
    """The output matrix, and the other parameters that `unembed` takes."""
    head = {name: lm[name] for name in (["embed"] if model.config.tie_embeddings else ["lm_head"])}
    return head, {name: lm[name] for name in ("embed", "final_norm") if name not in head}


def _gathered(model, head):
    """The output matrix in the compute dtype, gathered once for all chunks."""
    axes = {"embed": ("vocab", "act_embed"), "lm_head": {"kernel": ("act_embed", "vocab")}}
    axes = {name: axes[name] for name in head}
    return jax.tree.map(lambda x, axes: nn.with_logical_constraint(x.astype(model.dtype), axes), head, axes)


def _logprobs(model, params, hidden, targets, temperature):
    logits = model.apply({"params": params}, hidden, method="unembed") / temperature
    return jnp.take_along_axis(logits, targets[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)


@jax.named_scope("loss")
def next_token_logprobs(model, lm, hidden, targets, used, temperature: float = 1.0):
    """Log-probabilities float32[b,W] of `targets` int32[b,W] after hidden dtype[b,W,D], of the first `used` of W.

    Values beyond `used` mean nothing. This has no gradient; `decision_loss` has one.
    """
    chunks, (head, rest) = Chunks(*targets.shape, used), _output_matrix(model, lm)

    def one_shard(hidden, targets):
        params = _gathered(model, head) | rest

        def step(i, out):
            return chunks.put(out, _logprobs(model, params, *chunks.part((hidden, targets), i), temperature), i)

        return chunks.loop(step, jnp.zeros(targets.shape, jnp.float32))

    out = _every_shard(one_shard, 0, 0)(chunks.split(hidden), chunks.split(targets))
    return out.reshape(chunks.rows, -1)[:, : chunks.width]


def zeros_of(function, *args):
    """Zeros like what `function(*args)` returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))


def add_up(total, new):
    """The sum of two (loss, metrics); a metric whose name ends in "_max" is the larger of the two instead."""
    (loss, metrics), (more, others) = total, new
    joined = {name: (jnp.maximum if name.endswith("_max") else jnp.add)(x, others[name]) for name, x in metrics.items()}
    return loss + more, joined


@jax.named_scope("loss")
def decision_loss(loss, model, lm, hidden, lines: Lines, about, temperature: float = 1.0):
    """Adds up `loss(logprob float32[b,w], about [b,w]) -> (loss, metrics)` over all decisions, see `add_up`.

    `about` [b,W] belongs to hidden dtype[b,W,D]; where there is no decision it must make the loss 0. Only the logits of
    a few decisions exist at a time, and their gradient is computed while they do: a backward pass would have to compute
    them again. (Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, does this for one loss.)

    Each row shard adds up its own part of the output matrix's gradient; the parts are summed once, after the last
    chunk. The matrix is gathered once, before the first chunk. With an adapter it is frozen and has no gradient.
    """
    targets, used = next_tokens(lines)
    chunks = Chunks(*targets.shape, used)
    arguments = (1,) if has_adapter(lm) else (0, 1)  # of `of_part`, that have a gradient

    def with_gradients(head, rest, hidden, targets, about):
        params = _gathered(model, head)

        def one(params, i):
            def of_part(params, hidden):
                logprob = _logprobs(model, params | rest, hidden, chunks.part(targets, i), temperature)
                return loss(logprob, chunks.part(about, i))

            return jax.value_and_grad(of_part, arguments, has_aux=True)(params, chunks.part(hidden, i))

        def step(i, carry):
            total, *to_head, to_hidden = carry
            new, (*more, part) = one(params, i)
            return add_up(total, new), *jax.tree.map(jnp.add, to_head, more), chunks.put(to_hidden, part, i)

        total = zeros_of(one, params, 0)[0]
        trained = (head, hidden)[-len(arguments) :]
        zeros = jax.tree.map(jnp.zeros_like, trained)  # summed in the parameters' float32
        total, *gradients = chunks.loop(step, (total, *zeros))
        return total, gradients

    @jax.custom_vjp
    def one_shard(*args):
        return with_gradients(*args)[0]

    def backward(gradients, cotangent):
        *to_head, to_hidden = jax.tree.map(lambda x: (x * cotangent[0]).astype(x.dtype), gradients)
        return *(to_head or [None]), None, to_hidden, None, None

    one_shard.defvjp(with_gradients, backward)
    split = jax.tree.map(chunks.split, (hidden, targets, about))
    every_shard = _every_shard(one_shard, None, None, 0, 0, 0)
    total, metrics = every_shard(*_output_matrix(model, lm), *split)
    return total.sum(), {name: x.max() if name.endswith("_max") else x.sum() for name, x in metrics.items()}


def next_tokens(lines: Lines):
    """The targets int32[b,W] of the decisions, and how many places of W are used in the fullest line."""
    return at_decisions(lines.tokens, lines.decisions + 1), (lines.decisions >= 0).sum(1).max()


def score_lines(model, params, lines: Lines, temperature: float = 1.0):
    """Log-probabilities and, where `params` has a value head, values of the decisions: float32[b,W] each (or None).

    This has no gradient; updates use `decision_loss`.
    """
    hidden = hidden_states(model, params["lm"], lines)
    logprob = next_token_logprobs(model, params["lm"], hidden, *next_tokens(lines), temperature)
    if "value_head" not in params:
        return logprob, None
    return logprob, ValueHead().apply({"params": params["value_head"]}, hidden)


def for_micro_batches(score, lines: Lines, count, zeros):
    """Arrays [M,b,…] like `zeros` with `score` of each of the first `count` micro-batches of lines [M,b,…]."""
    if len(lines.tokens) == 1:  # no loop: XLA would hoist its constants out of it and then hold them twice
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
