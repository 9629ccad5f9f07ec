"""The updates: SFT, online self-training, reinforcement learning, reranker. One maker, and a loss for each.

A loss is `loss(model, params, lines, batch) -> (loss, metrics)` of one micro-batch [b,…]. Losses and metrics are summed
over micro-batches, gradients too. Two endings of a metric's name mean something: "_max" is a maximum instead of a sum,
"_share" is divided by the number of decisions at the end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.algo import losses
from reft_jax.algo.algorithms import Algorithm
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.lora import Lora, whole
from reft_jax.train.packing import Lines
from reft_jax.train.scoring import add_up, decision_loss, for_micro_batches, hidden_states, zeros_of
from reft_jax.train.state import TrainState, apply_gradients
from reft_jax.types import PPOBatch


def make_step(loss, model, optimizer, shardings, lora: Lora | None = None):
    """Jitted `step(state, (Lines, batch) [M,b,…], count, base) -> (state, metrics)`; the state is donated.

    `count` micro-batches of M hold rows. base: with `lora`, the frozen language model. metrics: "loss", "grad_norm"
    (before clipping) and those of the loss.
    """

    def step(state: TrainState, rows, count, base=None):
        def of_rows(params, rows):
            return loss(model, whole(params, base, lora), *rows)

        grads, total, metrics = over_micro_batches(of_rows, state.params, rows, count)
        decisions = (rows[0].decisions >= 0).sum()
        metrics = {name: x / decisions if name.endswith("_share") else x for name, x in metrics.items()}
        with jax.named_scope("optimizer"):
            state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": total} | metrics | {"grad_norm": grad_norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def over_micro_batches(loss_fn, params, rows, count):
    """Gradient, loss and metrics of `loss_fn(params, micro_batch) -> (loss, metrics)`, added up over the first `count`
    micro-batches of the leading axis M."""

    def one(i):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, jax.tree.map(lambda x: x[i], rows))

    if len(jax.tree.leaves(rows)[0]) == 1:  # no loop, as in `for_micro_batches`
        (loss, metrics), grads = one(0)
        return grads, loss, metrics

    def step(i, total):
        (sums, grads), (more, new) = total, one(i)
        return add_up(sums, more), jax.tree.map(jnp.add, grads, new)

    with jax.named_scope("micro_batches"):
        (loss, metrics), grads = jax.lax.fori_loop(0, count, step, zeros_of(one, 0))
    return grads, loss, metrics


def sft_loss(model, params, lines: Lines, weight):
    """Cross-entropy of the decisions, each times its weight float32[b,W]."""

    def cross_entropy(logprob, weight):
        return losses.token_loss(logprob, weight), {}

    hidden = hidden_states(model, params["lm"], lines)
    return decision_loss(cross_entropy, model, params["lm"], hidden, lines, weight)


class SelfTrainBatch(NamedTuple):
    """What each decision weighs in the two halves of the loss, float32[M,b,W]: 1 / (2 · tokens of the half) on the
    response of a correct sample, or on a worked solution, 0 elsewhere."""

    sampled: Any
    gold: Any


def self_train_loss(model, params, lines: Lines, weight: SelfTrainBatch):
    """Online self-training: ½ cross-entropy of the correct samples + ½ that of the worked solutions.

    Each is a mean over its tokens in the global batch. Metrics: the two halves, sampled_loss and gold_loss.
    """

    def halves(logprob, weight):
        sampled, gold = losses.token_loss(logprob, weight.sampled), losses.token_loss(logprob, weight.gold)
        return sampled + gold, {"sampled_loss": sampled, "gold_loss": gold}

    hidden = hidden_states(model, params["lm"], lines)
    return decision_loss(halves, model, params["lm"], hidden, lines, weight)


def rl_loss(algorithm: Algorithm, model, params, lines: Lines, old: PPOBatch):
    """The algorithm's policy loss + vf_coef · its value loss. Metrics: those two, and the algorithm's own."""
    hidden = hidden_states(model, params["lm"], lines)
    policy, metrics = decision_loss(algorithm.loss, model, params["lm"], hidden, lines, old, algorithm.temperature)
    metrics = metrics | {"policy_loss": policy}
    if not algorithm.critic:
        return policy, metrics
    critic = algorithm.value_loss(ValueHead().apply({"params": params["value_head"]}, hidden), old)
    return policy + algorithm.vf_coef * critic, metrics | {"value_loss": critic}


class RerankBatch(NamedTuple):
    """At the last token of each row: labels (1 = correct) int32[M,b,W]; weight float32[M,b,W], 1 / rows."""

    labels: Any
    weight: Any


def rerank_logits(model, params, lines: Lines):
    """Class logits float32[b,W,2] at the decisions of one micro-batch."""
    return RerankHead().apply({"params": params["rerank_head"]}, hidden_states(model, params["lm"], lines))


def rerank_loss(model, params, lines: Lines, judged: RerankBatch):
    """Cross-entropy of the two classes, a mean over the rows. Metric: accuracy."""
    logits = rerank_logits(model, params, lines)
    right = ((logits.argmax(-1) == judged.labels) * judged.weight).sum()
    return losses.class_loss(logits, judged.labels, judged.weight), {"accuracy": right}


def make_rerank_scorer(model):
    """Jitted `score(params, Lines [M,b,…], count) -> float32[M,b,W]`, the probability of class 1."""

    def score(params, lines: Lines, count):
        def one(lines):
            return jax.nn.softmax(rerank_logits(model, params, lines), -1)[..., 1]

        return for_micro_batches(one, lines, count, jnp.zeros(lines.decisions.shape, jnp.float32))

    return jax.jit(score)
