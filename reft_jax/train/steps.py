"""The three jitted, donated updates: SFT, PPO, reranker. Micro-batches [M,b,…] are scanned, their gradients summed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reft_jax.algo import advantages, losses
from reft_jax.model.heads import RerankHead
from reft_jax.train.scoring import next_token_logprobs, score_rows
from reft_jax.train.state import TrainState, apply_gradients
from reft_jax.types import PPOBatch, TokenBatch


class ClipSettings(NamedTuple):
    """The numbers of the PPO loss (the paper: clip 0.2, value_clip 0.2, vf_coef 5, temperature 1)."""

    clip: float
    value_clip: float
    vf_coef: float
    temperature: float


def sum_over_micro_batches(loss_fn, params, micro_batches):
    """Gradient of `loss_fn(params, micro_batch) -> (loss, aux)` summed over the leading axis M; losses and aux, [M]."""
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(grads, micro_batch):
        (loss, aux), new = jax.value_and_grad(loss_fn, has_aux=True)(params, micro_batch)
        return jax.tree.map(jnp.add, grads, new), (loss, aux)

    return jax.lax.scan(step, zeros, micro_batches)


def make_sft_step(model, optimizer, shardings):
    """`step(state, TokenBatch [M,b,T], width) -> (state, {'loss', 'grad_norm'})`.

    Loss: cross-entropy, the mean over all target tokens of the batch.
    """

    def step(state: TrainState, batch: TokenBatch, width: int):
        count = batch.target_mask.sum()

        def loss_fn(params, rows: TokenBatch):
            hidden, _ = model.apply({"params": params["lm"]}, rows.tokens, method="hidden")
            start = jnp.argmax(rows.target_mask, 1)
            logprob = next_token_logprobs(model, params["lm"], hidden, rows.tokens, start, width)
            return losses.token_loss(logprob, rows.target_mask) / count, None

        grads, (loss, _) = sum_over_micro_batches(loss_fn, state.params, batch)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": loss.sum(), "grad_norm": grad_norm}

    return jax.jit(step, static_argnames="width", donate_argnums=0, out_shardings=(shardings, None))


def make_ppo_step(model, optimizer, settings: ClipSettings, shardings):
    """`step(state, PPOBatch [M,b,T], width) -> (state, metrics)`: loss = policy + vf_coef · value, a mean over rows.

    Metrics, float32 scalars: loss, policy_loss, value_loss, grad_norm, clip_share (actions whose ratio left the clip
    range), ratio_max_error (largest |ρ−1|; 0 on the first pass up to rounding).
    """

    def step(state: TrainState, batch: PPOBatch, width: int):
        rows_in_batch = batch.tokens.shape[0] * batch.tokens.shape[1]
        actions_in_batch = batch.action_mask.sum()

        def loss_fn(params, rows: PPOBatch):
            mask, start = rows.action_mask, jnp.argmax(rows.action_mask, 1)
            logprob, value = score_rows(model, params, rows.tokens, start, width, settings.temperature)
            policy = losses.policy_loss(logprob, rows.old_logprob, rows.advantage, mask, clip=settings.clip)
            critic = losses.value_loss(value, rows.old_value, rows.return_, mask, clip=settings.value_clip)
            policy, critic = policy.sum() / rows_in_batch, critic.sum() / rows_in_batch
            error = jnp.abs(jnp.exp(jnp.where(mask, logprob - rows.old_logprob, 0.0)) - 1)
            clipped = (error > settings.clip).sum() / actions_in_batch
            return policy + settings.vf_coef * critic, (policy, critic, clipped, error.max())

        grads, (loss, (policy, critic, clipped, error)) = sum_over_micro_batches(loss_fn, state.params, batch)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        metrics = {"loss": loss.sum(), "policy_loss": policy.sum(), "value_loss": critic.sum(), "grad_norm": grad_norm}
        return state, metrics | {"clip_share": clipped.sum(), "ratio_max_error": error.max()}

    return jax.jit(step, static_argnames="width", donate_argnums=0, out_shardings=(shardings, None))


def make_ppo_batch(rollout, logprob, value, ref_logprob, *, kl_coef: float, gamma: float, lam: float):
    """What an update reads, and the iteration's metrics, from a Rollout [B,T] and its scores float32[B,T].

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
    return PPOBatch(rollout.tokens, mask, logprob, value, advantages.whiten(advantage, mask), return_), metrics


class RerankBatch(NamedTuple):
    """tokens int32[M,b,T]; total_len, labels (1 = correct) int32[M,b]; weight float32[M,b], 0 for filler rows."""

    tokens: Any
    total_len: Any
    labels: Any
    weight: Any


def rerank_logits(model, params, tokens, total_len):
    """Class logits float32[B,2] read at the last real token."""
    hidden, _ = model.apply({"params": params["lm"]}, tokens, method="hidden")
    last = jnp.take_along_axis(hidden, (total_len - 1)[:, None, None], 1)[:, 0]
    return RerankHead().apply({"params": params["rerank_head"]}, last)


def make_rerank_step(model, optimizer, shardings):
    """`step(state, RerankBatch) -> (state, {'loss', 'accuracy', 'grad_norm'})`; both means over the real rows."""

    def step(state: TrainState, batch: RerankBatch):
        count = batch.weight.sum()

        def loss_fn(params, rows: RerankBatch):
            logits = rerank_logits(model, params, rows.tokens, rows.total_len)
            right = (logits.argmax(-1) == rows.labels) * rows.weight
            return (losses.class_loss(logits, rows.labels) * rows.weight).sum() / count, right.sum() / count

        grads, (loss, accuracy) = sum_over_micro_batches(loss_fn, state.params, batch)
        state, grad_norm = apply_gradients(state, optimizer, grads)
        return state, {"loss": loss.sum(), "accuracy": accuracy.sum(), "grad_norm": grad_norm}

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_rerank_scorer(model):
    """Jitted `score(params, tokens [B,T], total_len [B]) -> float32[B]`, the probability of class 1."""
    return jax.jit(lambda params, tokens, n: jax.nn.softmax(rerank_logits(model, params, tokens, n), -1)[:, 1])
