"""The jitted, donated updates: SFT, online self-training, PPO, reranker.

Micro-batches [M,b,…] one after another, gradients summed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.algo import advantages, losses
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.train.packing import Lines
from reft_jax.train.scoring import add_up, decision_loss, for_micro_batches, hidden_states, zeros_of
from reft_jax.train.state import TrainState, apply_gradients
from reft_jax.types import PPOBatch


class ClipSettings(NamedTuple):
    """The numbers of the PPO loss (the paper: clip 0.2, value_clip 0.2, vf_coef 5, temperature 1)."""

    clip: float
    value_clip: float
    vf_coef: float
    temperature: float


def over_micro_batches(loss_fn, params, batch, count):
    """Gradient, loss, sums and largest of `loss_fn(params, micro_batch) -> (loss, (sums, largest))` over the first
    `count` micro-batches of the leading axis M: added up, `largest` (a scalar) by its maximum."""

    def one(i):
        return jax.value_and_grad(loss_fn, has_aux=True)(params, jax.tree.map(lambda x: x[i], batch))

    if len(jax.tree.leaves(batch)[0]) == 1:  # no loop, as in `for_micro_batches`
        (loss, (sums, largest)), grads = one(0)
        return grads, loss, sums, largest

    def step(i, total):
        (sums, grads), (more, new) = total, one(i)
        return add_up(sums, more), jax.tree.map(jnp.add, grads, new)

    with jax.named_scope("micro_batches"):
        (loss, (sums, largest)), grads = jax.lax.fori_loop(0, count, step, zeros_of(one, 0))
    return grads, loss, sums, largest


def make_sft_step(model, optimizer, shardings):
    """`step(state, (Lines, weight float32[M,b,W]), count) -> (state, {'loss', 'grad_norm'})`: cross-entropy of the
    decisions, each times its weight; `count` micro-batches hold rows."""

    def step(state: TrainState, batch, count):
        def loss_fn(params, rows):
            lines, weight = rows

            def cross_entropy(logprob, weight):
                return losses.token_loss(logprob, weight), ((), jnp.zeros(()))

            hidden = hidden_states(model, params["lm"], lines)
            return decision_loss(cross_entropy, model, params["lm"], hidden, lines, weight)

        grads, loss, _, _ = over_micro_batches(loss_fn, state.params, batch, count)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": loss, "grad_norm": grad_norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


class SelfTrainBatch(NamedTuple):
    """What each decision weighs in the two halves of the loss, float32[M,b,W]: 1 / (2 · tokens of the half) on the
    response of a correct sample, or on a worked solution, 0 elsewhere."""

    sampled: Any
    gold: Any


def make_self_train_step(model, optimizer, shardings):
    """`step(state, (Lines, SelfTrainBatch), count) -> (state, {'loss', 'sampled_loss', 'gold_loss', 'grad_norm'})`.

    Online self-training: ½ cross-entropy of the correct samples + ½ that of the worked solutions, each a mean over its
    tokens in the global batch. The two losses in the metrics are their halves of `loss`.
    """

    def step(state: TrainState, batch, count):
        def loss_fn(params, rows):
            lines, weight = rows

            def halves(logprob, weight):
                sampled, gold = losses.token_loss(logprob, weight.sampled), losses.token_loss(logprob, weight.gold)
                return sampled + gold, ((sampled, gold), jnp.zeros(()))

            hidden = hidden_states(model, params["lm"], lines)
            return decision_loss(halves, model, params["lm"], hidden, lines, weight)

        grads, loss, (sampled, gold), _ = over_micro_batches(loss_fn, state.params, batch, count)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": loss, "sampled_loss": sampled, "gold_loss": gold, "grad_norm": grad_norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_ppo_step(model, optimizer, settings: ClipSettings, shardings):
    """`step(state, (Lines, PPOBatch [M,b,W]), count) -> (state, metrics)`: loss = policy + vf_coef · value.

    Metrics, float32 scalars: loss, policy_loss, value_loss, grad_norm, clip_share (actions whose ratio left the clip
    range), ratio_max_error (largest |ρ−1|; 0 on the first pass up to rounding).
    """

    def step(state: TrainState, batch, count):
        def loss_fn(params, rows):
            lines, old = rows

            def surrogate(logprob, old):
                loss = losses.policy_loss(logprob, old.old_logprob, old.advantage, old.weight, clip=settings.clip)
                error = jnp.abs(jnp.exp(jnp.where(old.weight > 0, logprob - old.old_logprob, 0.0)) - 1)
                return loss, ((error > settings.clip).sum(), error.max())

            hidden = hidden_states(model, params["lm"], lines)
            policy, (clipped, error) = decision_loss(
                surrogate, model, params["lm"], hidden, lines, old, settings.temperature
            )
            value = ValueHead().apply({"params": params["value_head"]}, hidden)
            critic = losses.value_loss(value, old.old_value, old.return_, old.weight, clip=settings.value_clip)
            return policy + settings.vf_coef * critic, ((policy, critic, clipped), error)

        grads, loss, (policy, critic, clipped), error = over_micro_batches(loss_fn, state.params, batch, count)
        actions = (batch[1].weight > 0).sum()
        state, grad_norm = apply_gradients(state, optimizer, grads)
        metrics = {"loss": loss, "policy_loss": policy, "value_loss": critic, "grad_norm": grad_norm}
        return state, metrics | {"clip_share": clipped / actions, "ratio_max_error": error}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_ppo_batch(
    rollout, logprob, value, ref_logprob, *, kl_coef: float, gamma: float, lam: float, minibatches: int = 1
):
    """What the updates read, and the iteration's metrics, from a Rollout [B,T] and its scores float32[B,T].

    Metrics: reward (mean score), kl (log π − log π_ref summed over a row's actions, mean over rows, nats),
    response_length (tokens), vf_expl_var, advantage_std (before whitening), return_mean.
    """
    mask = advantages.action_mask(rollout.prompt_len, rollout.total_len, rollout.tokens.shape[1])
    rewards, _, _ = advantages.token_rewards(rollout.score, logprob, ref_logprob, mask, kl_coef=kl_coef)
    value = jnp.where(mask, value, 0.0)
    advantage, return_ = advantages.gae(rewards, value, mask, gamma=gamma, lam=lam)
    _, variance = advantages.masked_moments(advantage, mask)
    metrics = {
        "reward": rollout.score.mean(),
        "kl": jnp.where(mask, logprob - ref_logprob, 0.0).sum(1).mean(),
        "response_length": mask.sum(1).mean(dtype=jnp.float32),
        "vf_expl_var": advantages.explained_variance(value, return_, mask),
        "advantage_std": jnp.sqrt(variance),
        "return_mean": advantages.masked_moments(return_, mask)[0],
    }
    logprob = jnp.where(mask, logprob, 0.0)
    weight = losses.row_weights(mask) * minibatches
    return PPOBatch(weight, logprob, value, advantages.whiten(advantage, mask), return_), metrics


class RerankBatch(NamedTuple):
    """Of each row, at its last token: labels (1 = correct) int32[M,b,W]; weight float32[M,b,W], 1 / rows."""

    labels: Any
    weight: Any


def rerank_logits(model, params, lines: Lines):
    """Class logits float32[b,W,2] at the decisions of one micro-batch."""
    return RerankHead().apply({"params": params["rerank_head"]}, hidden_states(model, params["lm"], lines))


def make_rerank_step(model, optimizer, shardings):
    """`step(state, (Lines, RerankBatch), count) -> (state, {'loss', 'accuracy', 'grad_norm'})`, means over the rows."""

    def step(state: TrainState, batch, count):
        def loss_fn(params, rows):
            lines, judged = rows
            logits = rerank_logits(model, params, lines)
            right = ((logits.argmax(-1) == judged.labels) * judged.weight).sum()
            return losses.class_loss(logits, judged.labels, judged.weight), (right, jnp.zeros(()))

        grads, loss, accuracy, _ = over_micro_batches(loss_fn, state.params, batch, count)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": loss, "accuracy": accuracy, "grad_norm": grad_norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_rerank_scorer(model):
    """Jitted `score(params, Lines [M,b,…], count) -> float32[M,b,W]`, the probability of class 1."""

    def score(params, lines: Lines, count):
        def one(lines):
            return jax.nn.softmax(rerank_logits(model, params, lines), -1)[..., 1]

        return for_micro_batches(one, lines, count, jnp.zeros(lines.decisions.shape, jnp.float32))

    return jax.jit(score)
