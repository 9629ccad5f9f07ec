"""The three updates and the PPO batch against slow twins written apart from them.

Most tests update by plain gradient descent with rate 1: the difference of the parameters is then the gradient, which
the first step of Adam would reduce to its sign.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_policy, tiny_state

from reft_jax.train.batches import in_micro_batches, token_batch
from reft_jax.train.scoring import make_scorer
from reft_jax.train.state import constant_schedule, linear_schedule, make_optimizer
from reft_jax.train.steps import (
    ClipSettings,
    RerankBatch,
    make_ppo_batch,
    make_ppo_step,
    make_rerank_scorer,
    make_rerank_step,
    make_sft_step,
)
from reft_jax.types import PPOBatch, Rollout

LENGTH, WIDTH, RATE = 40, 32, 1e-2
MODEL, PARAMS = tiny_policy()
RERANKER, RERANK_PARAMS = tiny_policy("rerank_head")
SETTINGS = ClipSettings(clip=0.2, value_clip=0.3, vf_coef=5.0, temperature=0.8)
# One action; an action at the last place; a prompt of one token; as long a response as the window holds.
PROMPT_LEN = np.array([9, 20, 1, 3, 5, 7, 2, 6], np.int32)
TOTAL_LEN = np.array([10, 40, 12, 35, 20, 30, 9, 18], np.int32)
ACTIONS = [range(p - 1, n - 1) for p, n in zip(PROMPT_LEN, TOTAL_LEN, strict=True)]
MASK = np.array([[t in actions for t in range(LENGTH)] for actions in ACTIONS])


def numbers(metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


TOKENS = rng(1).integers(0, 61, (8, LENGTH)).astype(np.int32)  # padding is not zero: nothing may depend on it
ROWS = [row[:n].tolist() for row, n in zip(TOKENS, TOTAL_LEN, strict=True)]


@functools.cache
def prepared(kind: str, model=MODEL, adam: bool = False):
    """(jitted step, function that makes a state at step 0 around PARAMS)."""
    optimizer = optax.sgd(1.0)
    if adam:
        optimizer = make_optimizer(optax.constant_schedule(RATE), weight_decay=0.0, clip_norm=1.0)
    params = RERANK_PARAMS if kind == "rerank" else PARAMS
    _, where = tiny_state(model, params, optimizer)
    if kind == "ppo":
        step = make_ppo_step(model, optimizer, SETTINGS, where)
    else:
        step = {"sft": make_sft_step, "rerank": make_rerank_step}[kind](model, optimizer, where)
    return step, lambda: tiny_state(model, params, optimizer)[0]


def gradient(before, state):
    """The gradient that a step of `optax.sgd(1.0)` took."""
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, state.params)


def assert_same(found, expected, atol: float):
    for path, leaf in jax.tree.leaves_with_path(expected):
        other = functools.reduce(lambda tree, key: tree[key.key], path, found)
        np.testing.assert_allclose(other, leaf, atol=atol, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def global_norm(tree) -> float:
    return float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree))))


# --- SFT


def run_sft(rows, prompt_lens, micro_batch: int, pad_multiple: int = 8):
    """(gradient, metrics) of one step."""
    step, fresh = prepared("sft")
    state, metrics = step(fresh(), in_micro_batches(token_batch(rows, prompt_lens, pad_multiple), micro_batch), WIDTH)
    return gradient(PARAMS, state), numbers(metrics)


@functools.partial(jax.jit, static_argnames="real")
def slow_sft(params, real: int = 8):
    """Loss and gradient over the first rows: log-softmax of all logits, token by token."""

    def loss(params):
        logprobs = jax.nn.log_softmax(MODEL.apply({"params": params["lm"]}, TOKENS))
        return -jnp.mean(jnp.stack([logprobs[b, t, TOKENS[b, t + 1]] for b in range(real) for t in ACTIONS[b]]))

    return jax.value_and_grad(loss)(params)


def test_sft_loss_is_the_mean_over_target_tokens_whatever_the_micro_batch():
    loss, expected = slow_sft(PARAMS)
    for micro_batch in (8, 4, 2):
        found, metrics = run_sft(ROWS, PROMPT_LEN, micro_batch)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(global_norm(expected), rel=1e-5)
        assert_same(found, expected, atol=1e-6)
    assert not np.any(found["value_head"]["weight"])  # SFT leaves the value head alone


def test_order_and_padding_of_sft_rows_change_nothing():
    expected, metrics = run_sft(ROWS, PROMPT_LEN, 4)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    permuted = run_sft([ROWS[i] for i in order], PROMPT_LEN[order], 4)
    padded = run_sft(ROWS, PROMPT_LEN, 4, pad_multiple=56)
    for found, other in (permuted, padded):
        assert_same(found, expected, atol=1e-6)
        assert other == pytest.approx(metrics, rel=1e-5)


def test_filler_rows_change_nothing_even_where_they_fill_a_micro_batch():
    loss, expected = slow_sft(PARAMS, real=5)
    found, metrics = run_sft(ROWS[:5] + [[]] * 3, np.append(PROMPT_LEN[:5], [1, 1, 1]), 2)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_same(found, expected, atol=1e-6)


# --- PPO


def off_mask_garbage(x, seed: int) -> np.ndarray:
    return np.where(MASK, x, rng(seed).normal(0, 100, x.shape)).astype(np.float32)


@functools.cache
def scores(params_of: str = "value_head") -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and values [8,T] of the rows under PARAMS."""
    start = in_micro_batches(PROMPT_LEN - 1, 4)
    scored = make_scorer(MODEL, SETTINGS.temperature)(PARAMS, in_micro_batches(TOKENS, 4), start, width=WIDTH)
    return tuple(np.asarray(x).reshape(8, LENGTH) for x in scored)


def ppo_batch() -> PPOBatch:
    """Some ratios and values are outside their clip ranges, and what lies off the mask is garbage."""
    logprob, value = scores()
    noise = rng(2).normal(size=(4, 8, LENGTH)).astype(np.float32)
    fields = (logprob - 0.3 * noise[0], value + 0.5 * noise[1], noise[2], value + noise[3])
    return PPOBatch(TOKENS, MASK, *(off_mask_garbage(x, 3 + i) for i, x in enumerate(fields)))


def run_ppo(batch: PPOBatch):
    """(gradient, metrics) of one step in two micro-batches."""
    step, fresh = prepared("ppo")
    state, metrics = step(fresh(), in_micro_batches(batch, 4), WIDTH)
    return gradient(PARAMS, state), numbers(metrics)


@jax.jit
def slow_ppo(params, batch: PPOBatch):
    """(loss, metrics), gradient: RECIPE §4 row by row, from all logits."""

    def loss(params):
        hidden, _ = MODEL.apply({"params": params["lm"]}, batch.tokens, method="hidden")
        logits = MODEL.apply({"params": params["lm"]}, hidden, method="unembed")
        logprobs = jax.nn.log_softmax(logits / SETTINGS.temperature)
        values = (hidden * params["value_head"]["weight"][None, None]).sum(-1) + params["value_head"]["bias"]
        policy, critic, ratios = [], [], []
        for b, actions in enumerate(ACTIONS):
            t = np.array(actions)
            _, _, old_logprob, old_value, advantage, return_ = (x[b, t] for x in batch)
            ratio = jnp.exp(logprobs[b, t, batch.tokens[b, t + 1]] - old_logprob)
            clipped_ratio = jnp.minimum(jnp.maximum(ratio, 1 - SETTINGS.clip), 1 + SETTINGS.clip)
            policy.append(jnp.mean(jnp.maximum(-advantage * ratio, -advantage * clipped_ratio)))
            moved = jnp.minimum(jnp.maximum(values[b, t] - old_value, -SETTINGS.value_clip), SETTINGS.value_clip)
            errors = (values[b, t] - return_) ** 2, (old_value + moved - return_) ** 2
            critic.append(jnp.mean(jnp.maximum(*errors)) / 2)
            ratios.append(ratio)
        policy, critic, change = sum(policy) / 8, sum(critic) / 8, jnp.abs(jnp.concatenate(ratios) - 1)
        total = policy + SETTINGS.vf_coef * critic
        parts = {"policy_loss": policy, "value_loss": critic, "loss": total}
        return total, parts | {"clip_share": jnp.mean(change > SETTINGS.clip), "ratio_max_error": change.max()}

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


def test_an_adam_step_is_clipped_and_donated_and_compiles_once():
    step, fresh = prepared("ppo", adam=True)
    batch, state = in_micro_batches(ppo_batch(), 4), fresh()
    before = state.params
    state, metrics = step(state, batch, WIDTH)
    assert before["lm"]["embed"].is_deleted()
    assert metrics["grad_norm"] > 1

    # Adam's first moments are (1 - β1) times the clipped gradient; its step is g / (|g| + eps), both moments unbiased.
    plain, _ = run_ppo(ppo_batch())
    clipped = jax.tree.map(lambda x: np.asarray(x) / 0.1, optax.tree.get(state.opt_state, "mu"))
    assert_same(clipped, jax.tree.map(lambda g: g / global_norm(plain), plain), atol=1e-6)
    expected = jax.tree.map(lambda p, g: np.asarray(p) - RATE * g / (np.abs(g) + 1e-8), PARAMS, clipped)
    assert_same(state.params, expected, atol=2e-6)

    for _ in range(2):
        state, _ = step(state, batch, WIDTH)
    assert int(state.step) == 3
    assert step._cache_size() == 1


def whole_iteration(ref_noise: float, **settings):
    """Rollout, its scores under policy and reference, and what make_ppo_batch makes of them."""
    logprob, value = scores()
    ref_logprob = logprob - ref_noise * rng(8).normal(size=logprob.shape).astype(np.float32)
    rollout = Rollout(TOKENS, PROMPT_LEN, TOTAL_LEN, np.array([1, 0, 0.1, 1, 0, 0, 0.1, 1], np.float32))
    settings = {"kl_coef": 0.05, "gamma": 0.97, "lam": 0.95} | settings
    batch, metrics = ppo_batch_of(rollout, logprob, value, ref_logprob, **settings)
    return rollout, (logprob, value, ref_logprob), jax.device_get(batch), numbers(metrics)


ppo_batch_of = jax.jit(make_ppo_batch, static_argnames=("kl_coef", "gamma", "lam"))


def test_on_the_first_pass_the_ratio_is_1_and_the_loss_minus_the_mean_advantage():
    _, _, batch, _ = whole_iteration(ref_noise=0.5)
    _, metrics = run_ppo(batch)
    means = [batch.advantage[b, actions].mean() for b, actions in enumerate(ACTIONS)]
    assert metrics["ratio_max_error"] < 1e-5 and metrics["clip_share"] == 0
    assert metrics["policy_loss"] == pytest.approx(-np.mean(means), abs=1e-6)


def slow_ppo_batch(rollout, logprob, value, ref_logprob, kl_coef, gamma, lam):
    """RECIPE §4, one action at a time in float64: returns advantage before whitening, return and kl of each action."""
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
    np.testing.assert_array_equal(batch.action_mask, MASK)
    for x in batch[2:]:
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
    assert metrics == pytest.approx(numbers(expected), rel=1e-4)


def test_a_policy_that_is_its_own_reference_earns_its_score_and_no_more():
    rollout, _, batch, metrics = whole_iteration(ref_noise=0.0, gamma=1.0, lam=1.0)
    assert metrics["kl"] == 0
    for b, actions in enumerate(ACTIONS):  # undiscounted, the return of every action is the sum of what is still paid
        np.testing.assert_allclose(batch.return_[b, actions], rollout.score[b], atol=1e-5)


def test_the_decision_to_stop_is_trained_and_nothing_after_it():
    logprob, value = scores()
    nothing = np.zeros_like(value)
    batch = PPOBatch(TOKENS, MASK, logprob, value, nothing, value)  # no advantage, no error of the critic
    stop, after = nothing.copy(), nothing.copy()
    stop[4, TOTAL_LEN[4] - 2], after[4, TOTAL_LEN[4] - 1] = 1.0, 1.0
    size = [global_norm(run_ppo(batch._replace(advantage=x))[0]) for x in (stop, after)]
    assert size[0] > 0.01 and size[1] < 1e-5
    found, _ = run_ppo(batch._replace(advantage=stop))
    better = jax.tree.map(lambda p, g: p - 0.01 * g, PARAMS["lm"], found["lm"])
    row, t = TOKENS[4:5], int(TOTAL_LEN[4]) - 2
    chance = [
        jax.nn.log_softmax(MODEL.apply({"params": lm}, row))[0, t, row[0, t + 1]] for lm in (PARAMS["lm"], better)
    ]
    assert chance[1] > chance[0]


def test_rows_without_actions_count_as_rows_and_leave_the_gradient_finite():
    batch = ppo_batch()
    half = jax.tree.map(lambda x: np.concatenate([x[:4], x[:4]]), batch)
    expected, metrics = run_ppo(half)
    garbage = jax.tree.map(lambda x: np.concatenate([x[:4], x[4:]]), batch)
    found, other = run_ppo(garbage._replace(action_mask=MASK & (np.arange(8) < 4)[:, None]))
    assert other["loss"] == pytest.approx(metrics["loss"] / 2, rel=1e-5)
    assert_same(found, jax.tree.map(lambda x: x / 2, expected), atol=1e-5)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_bfloat16_compute_keeps_losses_and_parameters_in_float32(kind):
    step, fresh = prepared(kind, model=MODEL.clone(dtype=jnp.bfloat16))
    batch = token_batch(ROWS, PROMPT_LEN, 8) if kind == "sft" else ppo_batch()
    state, metrics = step(fresh(), in_micro_batches(batch, 4), WIDTH)
    exact = run_sft(ROWS, PROMPT_LEN, 4)[1] if kind == "sft" else run_ppo(batch)[1]
    for name, value in metrics.items():
        assert value.dtype == jnp.float32 and np.isfinite(value), name
    assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert global_norm(gradient(PARAMS, state)) == pytest.approx(exact["grad_norm"], rel=0.1)


# --- the reranker

LABELS = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.int32)
REAL = np.array([0, 1, 2, 4, 6])  # the other rows have weight 0
score_rerank = make_rerank_scorer(RERANKER)


@jax.jit
def slow_rerank(params):
    """(loss, logits [8,2]), gradient."""

    def loss(params):
        hidden, _ = RERANKER.apply({"params": params["lm"]}, TOKENS, method="hidden")
        logits = jnp.stack([hidden[b, TOTAL_LEN[b] - 1] for b in range(8)]) @ params["rerank_head"]["weight"]
        return -sum(jax.nn.log_softmax(logits[b])[LABELS[b]] for b in REAL) / len(REAL), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_a_rerank_step_equals_its_slow_twin():
    (loss, logits), expected = slow_rerank(RERANK_PARAMS)
    step, fresh = prepared("rerank")
    weight = np.isin(np.arange(8), REAL).astype(np.float32)
    state, metrics = step(fresh(), in_micro_batches(RerankBatch(TOKENS, TOTAL_LEN, LABELS, weight), 4))
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(float(np.mean(np.argmax(logits, -1)[REAL] == LABELS[REAL])))
    assert 0 < metrics["accuracy"] < 1
    assert_same(gradient(RERANK_PARAMS, state), expected, atol=1e-6)


def test_rerank_scores_are_read_at_the_last_real_token_whatever_the_padding():
    (_, logits), _ = slow_rerank(RERANK_PARAMS)
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(-1)
    padded = np.zeros((8, 48), np.int32)
    for row, ids in zip(padded, ROWS, strict=True):
        row[: len(ids)] = ids
    for tokens in (TOKENS, padded):
        np.testing.assert_allclose(score_rerank(RERANK_PARAMS, tokens, TOTAL_LEN), expected, atol=1e-5)


# --- learning rates


def test_learning_rates_by_hand():
    linear = linear_schedule(2.0, 0.1, 40)  # 4 updates up, 36 down
    np.testing.assert_allclose([linear(i) for i in (0, 1, 4, 22, 40)], [0, 0.5, 2, 1, 0], atol=1e-6)
    np.testing.assert_allclose([linear_schedule(2.0, 0.0, 4)(i) for i in (0, 1, 4)], [2, 1.5, 0], atol=1e-6)
    np.testing.assert_allclose([constant_schedule(3.0, 2)(i) for i in (0, 1, 2, 9)], [1, 2, 3, 3], atol=1e-6)
    np.testing.assert_allclose([constant_schedule(3.0, 0)(i) for i in (0, 9)], [3, 3])
