"""SFT and PPO updates and the PPO batch against slow versions that share no code with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_rows import (
    ACTIONS,
    LENGTH,
    MASK,
    MODEL,
    ORDER,
    PARAMS,
    PROMPT_LEN,
    RATE,
    SETTINGS,
    TOKENS,
    TOTAL_LEN,
    B,
    Packed,
    T,
    assert_same,
    global_norm,
    gradient,
    laid_by_hand,
    numbers,
    packed,
    packed_otherwise,
    prepared,
    rng,
)

from reft_jax.algo import losses
from reft_jax.train.iteration import Scores, make_batch
from reft_jax.train.scoring import make_scorer
from reft_jax.train.state import constant_schedule, linear_schedule
from reft_jax.types import PPOBatch, Rollout


def test_the_packings_differ():
    """In what they are meant to: line lengths, rows a line, micro-batches in use; all hold the same decisions."""
    found = {"plain": packed()} | packed_otherwise()
    shapes = {name: (*rows.lines.tokens.shape, rows.count) for name, rows in found.items()}
    assert shapes == {
        "plain": (4, 2, 40, 3),
        "another order": (4, 2, 40, 3),
        "one row a line, by hand": (4, 2, 40, 4),
        "lines of 48": (4, 2, 48, 2),
        "one micro-batch": (1, 8, 40, 1),
        "micro-batches of one long line": (8, 1, 88, 2),
    }
    most = {name: int(rows.lines.segments.max()) for name, rows in found.items() if "hand" not in name}
    assert set(most.values()) == {2, 3, 5}
    x = np.where(MASK, rng(0).normal(size=MASK.shape), 0).astype(np.float32)
    for rows in found.values():
        np.testing.assert_array_equal(rows.collect(rows.spread(x)), x)


# --- SFT


def run_sft(rows: Packed, count: int = 0):
    """(gradient, metrics) of one step; a target weighs 1 / targets of the batch."""
    step, fresh = prepared("sft")
    weight = rows.spread(np.full((8, LENGTH), 1 / len(rows.at[0]), np.float32))
    state, metrics = step(fresh(), (rows.lines, weight), count or rows.count)
    return gradient(state, metrics), numbers(metrics)


@jax.jit
def slow_sft(params, real):
    """Loss and gradient over the first `real` rows: log-softmax of all logits, target by target."""

    def loss(params):
        logprobs = jax.nn.log_softmax(MODEL.apply({"params": params["lm"]}, TOKENS))[B, T, TOKENS[B, T + 1]]
        return -jnp.mean(logprobs, where=B < real)

    return jax.value_and_grad(loss)(params)


def test_sft_loss_is_the_mean_over_target_tokens_whatever_the_micro_batch():
    loss, expected = slow_sft(PARAMS, 8)
    for micro_batch in (8, 4, 2):
        found, metrics = run_sft(packed(micro_batch=micro_batch, micro_batches=8 // micro_batch))
        assert metrics == pytest.approx({"loss": float(loss), "grad_norm": global_norm(expected)}, rel=1e-5)
        assert_same(found, expected, atol=1e-6)
    assert not np.any(found["value_head"]["weight"])  # SFT leaves the value head alone


def test_order_and_packing_of_sft_rows_change_nothing():
    expected, metrics = run_sft(packed())
    for name, rows in packed_otherwise().items():
        found, other = run_sft(rows)
        assert_same(found, expected, atol=1e-6)
        assert other == pytest.approx(metrics, rel=1e-5), name


def test_micro_batches_without_rows_change_nothing_run_or_not():
    loss, expected = slow_sft(PARAMS, 5)
    rows = packed(range(5))
    assert rows.count == 2
    for count in (2, 3, 4):
        found, metrics = run_sft(rows, count)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert_same(found, expected, atol=1e-6)


# --- PPO


scorer = make_scorer(MODEL, SETTINGS.temperature)


def scores(params=PARAMS) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and values [8,T] of the actions."""
    rows = packed()
    return tuple(rows.collect(x) for x in scorer(params, rows.lines, rows.count))


def row_weights(mask) -> np.ndarray:
    return np.asarray(losses.row_weights(mask))


def ppo_batch() -> PPOBatch:
    """Some ratios and values are outside their clip ranges."""
    logprob, value = scores()
    noise = rng(2).normal(size=(4, 8, LENGTH)).astype(np.float32)
    return PPOBatch(row_weights(MASK), logprob - 0.3 * noise[0], value + 0.5 * noise[1], noise[2], value + noise[3])


def spread(rows: Packed, batch: PPOBatch) -> PPOBatch:
    """The batch [8,T] as an update reads it; where the weight is 0 all else is garbage."""
    old = jax.tree.map(rows.spread, batch)
    garbage = [rng(3 + i).normal(0, 100, x.shape).astype(np.float32) for i, x in enumerate(old[:5])]
    spoilt = [np.where(old.weight > 0, x, wild) for x, wild in zip(old[:5], garbage, strict=True)]
    return PPOBatch(old.weight, *spoilt[1:])


def run_ppo(batch: PPOBatch, rows: Packed | None = None, count: int = 0):
    """(gradient, metrics) of one step."""
    step, fresh = prepared("ppo")
    rows = rows or packed()
    state, metrics = step(fresh(), (rows.lines, spread(rows, batch)), count or rows.count)
    return gradient(state, metrics), numbers(metrics)


@jax.jit
def slow_ppo(params, batch: PPOBatch):
    """(loss, metrics), gradient: from all logits, action by action.

    In a mean over each row's actions and then over rows an action weighs 1 / (rows · actions of its row).
    """
    weight = 1 / (8 * MASK.sum(1)[B])

    def loss(params):
        hidden = MODEL.apply({"params": params["lm"]}, TOKENS, method="hidden")
        logits = MODEL.apply({"params": params["lm"]}, hidden, method="unembed")
        logprob = jax.nn.log_softmax(logits / SETTINGS.temperature)[B, T, TOKENS[B, T + 1]]
        value = (hidden[B, T] * params["value_head"]["weight"][None]).sum(-1) + params["value_head"]["bias"]
        old_logprob, old_value, advantage, return_ = (x[B, T] for x in batch[1:5])
        ratio = jnp.exp(logprob - old_logprob)
        clipped_ratio = jnp.minimum(jnp.maximum(ratio, 1 - SETTINGS.clip), 1 + SETTINGS.clip)
        policy = (weight * jnp.maximum(-advantage * ratio, -advantage * clipped_ratio)).sum()
        moved = jnp.minimum(jnp.maximum(value - old_value, -SETTINGS.value_clip), SETTINGS.value_clip)
        critic = (weight * jnp.maximum((value - return_) ** 2, (old_value + moved - return_) ** 2)).sum() / 2
        parts = {"policy_loss": policy, "value_loss": critic, "loss": policy + SETTINGS.vf_coef * critic}
        outside = (ratio > 1 + SETTINGS.clip) | (ratio < 1 - SETTINGS.clip)
        return parts["loss"], parts | {"clip_share": outside.mean(), "ratio_error_max": jnp.abs(ratio - 1).max()}

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_a_ppo_step_equals_its_slow_twin():
    batch = ppo_batch()
    (_, expected_metrics), expected = slow_ppo(PARAMS, batch)
    found, metrics = run_ppo(batch)
    expected_metrics = numbers(expected_metrics | {"grad_norm": global_norm(expected)})
    assert 0.1 < metrics["clip_share"] < 0.9
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)
    assert_same(found, expected, atol=1e-5)
    assert abs(found["value_head"]["bias"]) > 0.1  # the bias of the value head is trained too


def test_order_packing_and_micro_batches_of_ppo_rows_change_nothing():
    batch = ppo_batch()
    expected, metrics = run_ppo(batch)
    for name, rows in packed_otherwise().items():
        found, other = run_ppo(batch, rows)
        assert_same(found, expected, atol=1e-5)
        assert other == pytest.approx(metrics, rel=1e-4), name
    found, other = run_ppo(batch, count=4)  # the micro-batch without rows is run too
    assert_same(found, expected, atol=1e-5)
    assert other == pytest.approx(metrics, rel=1e-4)


def test_a_step_is_adam_donates_its_state_and_compiles_once():
    step, fresh = prepared("ppo")
    rows, state = packed(), fresh()
    batch, before = (rows.lines, spread(rows, ppo_batch())), state.params
    state, metrics = step(state, batch, rows.count)
    assert before["lm"]["embed"].is_deleted()
    assert metrics["grad_norm"] > 1

    def first_adam_step(p, g):  # bias correction makes the moments g and g²
        g = g / metrics["grad_norm"]
        return np.asarray(p) - RATE * g / (np.abs(g) + 1e-8)

    assert_same(state.params, jax.tree.map(first_adam_step, PARAMS, gradient(state, metrics)), atol=1e-6)
    compiled = step._cache_size()
    for count in (rows.count, 4):  # however many micro-batches hold rows
        state, _ = step(state, batch, count)
    assert int(state.step) == 3
    assert step._cache_size() == compiled


def whole_iteration(ref_noise: float, **settings):
    """Rollout, its scores under policy and reference, and what make_batch makes of them."""
    logprob, value = scores()
    value = value / 10  # a critic too poor has an explained variance of -1, whatever it is
    ref_logprob = logprob - ref_noise * rng(8).normal(size=logprob.shape).astype(np.float32)
    rollout = Rollout(TOKENS, PROMPT_LEN, TOTAL_LEN, np.array([1, 0, 0.1, 1, 0, 0, 0.1, 1], np.float32))
    minibatches = settings.pop("minibatches", 1)
    algorithm = dataclasses.replace(SETTINGS, **{"kl_coef": 0.05, "gamma": 0.97, "lam": 0.95} | settings)
    batch, metrics = batch_of(algorithm, rollout, Scores(logprob, ref_logprob, value), minibatches=minibatches)
    return rollout, (logprob, value, ref_logprob), jax.device_get(batch), numbers(metrics)


batch_of = jax.jit(make_batch, static_argnums=0, static_argnames="minibatches")


def test_on_the_first_pass_the_ratio_is_1_and_the_loss_minus_the_mean_advantage():
    _, _, batch, _ = whole_iteration(ref_noise=0.5)
    _, metrics = run_ppo(batch)
    means = [batch.advantage[b, actions].mean() for b, actions in enumerate(ACTIONS)]
    assert metrics["ratio_error_max"] < 1e-5 and metrics["clip_share"] == 0
    assert metrics["policy_loss"] == pytest.approx(-np.mean(means), abs=1e-6)


def slow_ppo_batch(rollout, logprob, value, ref_logprob, kl_coef, gamma, lam):
    """One action at a time, in float64. Returns advantage before whitening, return and kl of each action."""
    advantages, returns, kls = [], [], []
    for b, actions in enumerate(ACTIONS):
        following_value = following_advantage = 0.0
        row = []
        for t in reversed(actions):
            kl = float(logprob[b, t]) - float(ref_logprob[b, t])
            reward = -kl_coef * kl + (float(rollout.score[b]) if t == actions[-1] else 0.0)
            delta = reward + gamma * following_value - float(value[b, t])
            following_advantage = delta + gamma * lam * following_advantage
            following_value = float(value[b, t])
            row.insert(0, (following_advantage, following_advantage + following_value, kl))
        for collected, column in zip((advantages, returns, kls), zip(*row, strict=True), strict=True):
            collected.append(column)
    return advantages, returns, kls


def test_a_ppo_batch_equals_its_slow_twin():
    rollout, (logprob, value, ref_logprob), batch, metrics = whole_iteration(ref_noise=0.5)
    advantages, returns, kls = slow_ppo_batch(rollout, logprob, value, ref_logprob, 0.05, 0.97, 0.95)
    flat, all_returns = np.concatenate(advantages), np.concatenate(returns)
    mean, std = flat.mean(), flat.std(ddof=1)
    for b, actions in enumerate(ACTIONS):
        np.testing.assert_allclose(batch.advantage[b, actions], (advantages[b] - mean) / std, atol=1e-4)
        np.testing.assert_allclose(batch.return_[b, actions], returns[b], atol=1e-5)
        np.testing.assert_array_equal(batch.old_logprob[b, actions], logprob[b, actions])
        np.testing.assert_array_equal(batch.old_value[b, actions], value[b, actions])
    np.testing.assert_allclose(batch.weight, MASK / MASK.sum(1, keepdims=True) / 8, rtol=1e-6)
    assert batch.ref_logprob is None  # there is no penalty in the loss
    for x in batch[:5]:
        assert x.dtype == np.float32 and not x[~MASK].any()
    values = np.concatenate([value[b, actions] for b, actions in enumerate(ACTIONS)])
    expected = {
        "reward": np.mean([1, 0, 0.1, 1, 0, 0, 0.1, 1]),
        "kl": np.mean([sum(row) for row in kls]),
        "response_length": np.mean(TOTAL_LEN - PROMPT_LEN),
        "vf_expl_var": max(-1, 1 - (all_returns - values).var(ddof=1) / all_returns.var(ddof=1)),
        "advantage_std": std,
        "return_mean": all_returns.mean(),
    }
    assert expected["vf_expl_var"] > -0.9
    assert metrics == pytest.approx(numbers(expected), rel=1e-4)


def test_weights_of_a_minibatch_make_a_mean_over_its_rows():
    """Of each part of the rows the weights sum to 1, if the parts are equal."""
    _, _, whole, metrics = whole_iteration(ref_noise=0.5)
    _, _, batch, same = whole_iteration(ref_noise=0.5, minibatches=4)
    np.testing.assert_allclose(batch.weight, 4 * whole.weight, rtol=1e-6)
    np.testing.assert_allclose([batch.weight[part].sum() for part in ORDER.reshape(4, 2)], [1] * 4, rtol=1e-6)
    assert same == metrics
    for x, y in zip(batch[1:5], whole[1:5], strict=True):
        np.testing.assert_array_equal(x, y)

    chosen = np.array([1, 5])  # and an update of a part is one of these rows alone
    _, found = run_ppo(batch, packed(chosen))
    means = [whole.advantage[b, ACTIONS[b]].mean() for b in chosen]
    assert found["policy_loss"] == pytest.approx(-np.mean(means), abs=1e-6)


def test_a_policy_that_is_its_own_reference_earns_its_score_and_no_more():
    rollout, _, batch, metrics = whole_iteration(ref_noise=0.0, gamma=1.0, lam=1.0)
    assert metrics["kl"] == 0
    for b, actions in enumerate(ACTIONS):  # undiscounted, the return of every action is the sum of what is still paid
        np.testing.assert_allclose(batch.return_[b, actions], rollout.score[b], atol=1e-5)


def test_the_decision_to_stop_is_trained_and_nothing_after_it():
    logprob, value = scores()
    nothing = np.zeros_like(value)
    batch = PPOBatch(row_weights(MASK), logprob, value, nothing, value)  # no advantage, no error of the critic
    stop, after = nothing.copy(), nothing.copy()
    stop[4, TOTAL_LEN[4] - 2], after[4, TOTAL_LEN[4] - 1] = 1.0, 1.0
    size = [global_norm(run_ppo(batch._replace(advantage=x))[0]) for x in (stop, after)]
    assert size[0] > 0.01 and size[1] < 1e-5
    found, _ = run_ppo(batch._replace(advantage=stop))
    better, _ = scores(jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, found))
    assert better[4, TOTAL_LEN[4] - 2] > logprob[4, TOTAL_LEN[4] - 2]


def test_rows_without_actions_count_as_rows_and_leave_the_gradient_finite():
    batch, few = ppo_batch(), np.arange(8) < 4
    expected, metrics = run_ppo(batch._replace(weight=np.where(few[:, None], 2 * batch.weight, 0)))
    batch = batch._replace(weight=row_weights(MASK & few[:, None]))
    rows = packed(decisions=np.where(few, TOTAL_LEN - PROMPT_LEN, 0))
    assert len(rows.at[0]) < len(B) and rows.count == 3
    for found, other in (run_ppo(batch, rows), run_ppo(batch), run_ppo(batch, laid_by_hand())):
        assert other["loss"] == pytest.approx(metrics["loss"] / 2, rel=1e-5)
        assert_same(found, jax.tree.map(lambda x: x / 2, expected), atol=1e-5)


def test_bfloat16_compute_keeps_losses_and_parameters_in_float32():
    step, fresh = prepared("ppo", model=MODEL.clone(dtype=jnp.bfloat16))
    rows = packed()
    state, metrics = step(fresh(), (rows.lines, spread(rows, ppo_batch())), rows.count)
    _, exact = run_ppo(ppo_batch())
    assert {leaf.dtype for leaf in jax.tree.leaves((metrics, state.params))} == {jnp.dtype(jnp.float32)}
    assert numbers(metrics) == pytest.approx(exact, rel=0.1, abs=0.01)


# --- learning rates


def test_learning_rates_by_hand():
    linear = linear_schedule(2.0, 0.1, 40)  # 4 updates up, 36 down
    np.testing.assert_allclose([linear(i) for i in (0, 1, 4, 22, 40)], [0, 0.5, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose([linear_schedule(2.0, 0.0, 4)(i) for i in (0, 1, 4)], [2, 1.5, 0], atol=1e-6)
    np.testing.assert_allclose([constant_schedule(3.0, 2)(i) for i in (0, 1, 2, 9)], [1, 2, 3, 3], atol=1e-6)
    np.testing.assert_allclose([constant_schedule(3.0, 0)(i) for i in (0, 9)], [3, 3])
