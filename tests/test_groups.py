"""Algorithms that compare the samples of a question: tables by hand, identities, and what is not computed for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_rows import LENGTH, MASK, MODEL, PROMPT_LEN, TOKENS, TOTAL_LEN, assert_same, gradient, numbers, packed, rng
from tiny import tiny_policy, tiny_ppo, tiny_state

from reft_jax.algo import advantages, losses
from reft_jax.algo.algorithms import ALGORITHMS, DAPO, GRPO, PPO, RLOO, Algorithm, DrGRPO, Scored, make_algorithm
from reft_jax.config import check_config, load_config
from reft_jax.parallel.mesh import make_mesh
from reft_jax.train.iteration import Iteration, Scores, make_batch
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import make_step, rl_loss
from reft_jax.types import InputError, Rollout

GROUPS = ("rloo", "grpo", "dr_grpo", "dapo")


def chosen(**settings):
    """The algorithm that these settings of `rl` choose."""
    config = load_config("configs/quickstart.py")
    config.rl.update(settings)
    return make_algorithm(check_config(config))


def of_two(name: str, **settings) -> Algorithm:
    """An algorithm with two samples per question and a constant of 10 tokens."""
    made = ALGORITHMS[name]
    own = {field: getattr(made, field) for field in ("kl_in", "loss_mean", "clip_high")}
    paper = dataclasses.asdict(tiny_ppo(samples=2, max_prompt=2, max_len=12))
    return made(**paper | own | settings)


# --- advantages and losses by hand


def test_advantages_of_two_questions_by_hand():
    reward = np.array([[1, 0, 0, 1], [1, 0, 0, 0]], np.float32)
    third, half = 1 / 3, 1 / 2
    np.testing.assert_allclose(
        advantages.leave_one_out(reward),
        [[2 * third, -2 * third, -2 * third, 2 * third], [1, -third, -third, -third]],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        advantages.group_centred(reward), [[half, -half, -half, half], [0.75, -0.25, -0.25, -0.25]], rtol=1e-6
    )
    # Squares of the differences: 4 · ¼ over 3, and 9/16 + 3/16 over 3.
    first, second = half / (third**0.5 + 1e-4), 0.25 / (0.5 + 1e-4)
    np.testing.assert_allclose(
        advantages.group_standardised(reward),
        [[first, -first, -first, first], [3 * second, -second, -second, -second]],
        rtol=1e-6,
    )


def test_equal_rewards_have_no_advantage_at_all():
    reward = np.full((1, 7), 0.1, np.float32)
    assert reward.mean() != reward[0, 0]  # a tenth and its mean differ by rounding
    three = reward[:, :3]
    assert (three.sum() - three[0, 0]) / np.float32(2) != three[0, 0]  # so do a tenth and the mean of the two others
    for compare in (advantages.leave_one_out, advantages.group_centred, advantages.group_standardised):
        for rewards in (reward, three):
            np.testing.assert_array_equal(compare(rewards), np.zeros_like(rewards))


def test_a_group_of_one_is_reinforce_for_rloo_and_refused_by_the_others():
    reward = np.array([[1.0], [0.1], [0.0]], np.float32)
    np.testing.assert_array_equal(advantages.leave_one_out(reward), reward)
    assert chosen(algorithm="rloo", samples=1).samples == 1
    for name in ("grpo", "dr_grpo", "dapo"):
        with pytest.raises(InputError, match=rf"rl\.samples=1: {name} compares.* at least 2, or 0 for 8"):
            chosen(algorithm=name, samples=1)


def test_the_last_tokens_before_the_limit_cost_by_hand():
    # A prompt of 4 of 20 tokens leaves room for 16; the penalty begins after 12.
    mask = advantages.action_mask(np.full(6, 4), 4 + np.array([1, 12, 13, 14, 15, 16]), 20)
    found = advantages.overlong(mask, max_len=20, buffer=4)
    np.testing.assert_allclose(found, [0, 0, -0.25, -0.5, -0.75, -1])


def test_what_a_decision_weighs_in_each_mean():
    mask = np.array([[1, 0, 0], [1, 1, 1]], bool)
    sixth = 1 / 6
    for mean, expected in {
        "rows": [[1 / 2, 0, 0], [sixth] * 3],
        "tokens": [[1 / 4, 0, 0], [1 / 4] * 3],
        "sum": [[1 / 2, 0, 0], [1 / 2] * 3],
        "constant": [[1 / 20, 0, 0], [1 / 20] * 3],
    }.items():
        np.testing.assert_allclose(losses.decision_weights(mask, mean, 10), expected, rtol=1e-6, err_msg=mean)
    np.testing.assert_array_equal(losses.decision_weights(np.zeros((2, 3), bool), "tokens"), np.zeros((2, 3)))


def test_the_clip_range_may_be_wider_above():
    # ρ = 1.25 and 1.5 with A = 1 (the second is clipped to 1.28), ρ = 0.5 with A = -1 (clipped to 0.8)
    ratio, advantage = np.array([1.25, 1.5, 0.5], np.float32), np.array([1, 1, -1], np.float32)
    for t, expected in enumerate([-1.25, -1.28, 0.8]):
        weight = (np.arange(3) == t).astype(np.float32)
        loss = losses.policy_loss(np.log(ratio), np.zeros(3, np.float32), advantage, weight, clip=0.2, clip_high=0.28)
        assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_estimators_of_the_kl_by_hand():
    logprob, reference, weight = np.log(np.float32([[2, 1]])), np.zeros((1, 2), np.float32), np.float32([[1, 0]])
    d = np.log(2)
    for estimator, expected in {"k1": d, "k2": d * d / 2, "k3": 1 / 2 - 1 + d}.items():
        found = losses.kl_loss(logprob, reference, weight, estimator)
        assert float(found) == pytest.approx(expected, rel=1e-6), estimator
    garbage = np.array([[np.log(2), -300.0]], np.float32)  # where the weight is 0
    assert np.isfinite(jax.grad(lambda x: losses.kl_loss(x, reference, weight, "k3"))(garbage)).all()


def test_mean_gradients_of_the_estimators_are_those_that_are_said():
    """Over all tokens, each as often as the policy samples it."""
    logits, other = rng(0).normal(size=(2, 1, 5)).astype(np.float32)
    policy, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)

    def divergence(p, q):
        return (jnp.exp(p) * (p - q)).sum()

    def sampled(logits, estimator):
        return losses.kl_loss(jax.nn.log_softmax(logits), reference, jnp.exp(policy), estimator)

    expected = {
        "k1": np.zeros((1, 5)),
        "k2": jax.grad(lambda x: divergence(jax.nn.log_softmax(x), reference))(logits),
        "k3": jax.grad(lambda x: divergence(reference, jax.nn.log_softmax(x)))(logits),
    }
    for estimator, gradient_ in expected.items():
        np.testing.assert_allclose(jax.grad(sampled)(logits, estimator), gradient_, atol=1e-6, err_msg=estimator)


def four_rows(score=(1, 0, 1, 1), lengths=(1, 3, 2, 2)) -> tuple[Rollout, Scores]:
    """Two questions with two samples each; the reference has other log-probabilities."""
    total = 2 + np.array(lengths, np.int32)
    rollout = Rollout(np.zeros((4, 8), np.int32), np.full(4, 2, np.int32), total, np.array(score, np.float32))
    return rollout, Scores(np.full((4, 8), -1.0, np.float32), np.full((4, 8), -1.5, np.float32), None)


def first_loss(algorithm: Algorithm, rollout: Rollout, scores: Scores) -> float:
    """The loss of the first pass, where the policy is still the one that sampled."""
    batch, _ = make_batch(algorithm, rollout, scores)
    loss, metrics = algorithm.loss(scores.logprob, batch)
    assert metrics["ratio_error_max"] == 0
    return float(loss)


def test_the_first_loss_of_each_algorithm_by_hand():
    """The second question has no difference; the KL is 0.5 nats per token; β 0.01."""
    rollout, scores = four_rows()
    # RLOO: R = score − 0.01 · 0.5 · tokens = 0.995, −0.015, 0.99, 0.99, so A = ±1.01 and 0,
    # summed over tokens, over four rows.
    assert first_loss(of_two("rloo"), rollout, scores) == pytest.approx(-(1.01 - 3 * 1.01) / 4, rel=1e-5)
    # GRPO: A = ±0.5 / (√½ + 1e-4); a mean over rows, so they cancel. k3 of 0.5 is e^−0.5 − 0.5 on every token.
    k3 = np.exp(-0.5) - 0.5
    assert first_loss(of_two("grpo"), rollout, scores) == pytest.approx(0.01 * k3, rel=1e-4)
    # Dr. GRPO: A = ±0.5, summed over tokens, over four rows and the constant of 10 tokens.
    assert first_loss(of_two("dr_grpo"), rollout, scores) == pytest.approx(-(0.5 - 3 * 0.5) / 40, rel=1e-5)
    # DAPO: GRPO's A, the mean over the four tokens of the first question alone.
    one = 0.5 / (0.5**0.5 + 1e-4)
    assert first_loss(of_two("dapo"), rollout, scores) == pytest.approx(-(one - 3 * one) / 4, rel=1e-5)


def test_dapo_pays_less_for_an_overlong_response():
    """Rows have room for 10 tokens, and the last 4 of them cost: 8 tokens cost a half."""
    rollout, scores = four_rows(score=(1, 1, 1, 0), lengths=(2, 2, 3, 5))
    longer = rollout._replace(tokens=np.zeros((4, 12), np.int32), total_len=np.array([4, 4, 10, 7], np.int32))
    scores = scores._replace(logprob=np.zeros((4, 12), np.float32), ref_logprob=None)
    batch, _ = make_batch(of_two("dapo", overlong=4), longer, scores)
    one = 0.25 / (0.5 * 0.5**0.5 + 1e-4)  # rewards ½ and 0
    np.testing.assert_allclose(batch.advantage[[2, 3], 1], [one, -one], rtol=1e-5)
    assert not batch.weight[:2].any() and batch.weight[2:].sum() == pytest.approx(1)


# --- settings


def test_each_algorithm_has_its_own_choices_and_the_settings_go_before():
    table = {
        "ppo": (PPO, True, 1, "reward", "rows", 0.2),
        "rloo": (RLOO, False, 8, "reward", "sum", 0.2),
        "grpo": (GRPO, False, 8, "loss", "rows", 0.2),
        "dr_grpo": (DrGRPO, False, 8, "none", "constant", 0.2),
        "dapo": (DAPO, False, 8, "none", "tokens", 0.28),
    }
    for name, expected in table.items():
        one = chosen(algorithm=name)
        clip_high = one.clip_high or one.clip
        assert (type(one), one.critic, one.samples, one.kl_in, one.loss_mean, clip_high) == expected
        assert one.reference == (one.kl_in != "none") and not chosen(algorithm=name, kl_coef=0.0).reference
    one = chosen(algorithm="dapo", samples=4, kl_in="loss", kl_estimator="k2", loss_mean="rows", clip_high=0.3)
    assert (one.samples, one.kl_in, one.kl_estimator, one.loss_mean, one.clip_high) == (4, "loss", "k2", "rows", 0.3)
    assert one.reference and (one.max_prompt, one.max_len) == (96, 128)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"algorithm": "grpo", "redraws": 1}, r"rl\.redraws=1: grpo replaces no questions; set it to 0, or use dapo"),
        ({"algorithm": "ppo", "redraws": 2}, r"rl\.redraws=2: ppo replaces"),
        ({"algorithm": "rloo", "overlong": 8}, r"rl\.overlong=8: rloo does not read it; set it to 0, or use dapo"),
        ({"algorithm": "ppo", "overlong": 8}, r"rl\.overlong=8: ppo does not read it"),
        ({"algorithm": "dapo", "overlong": 32}, r"rl\.overlong=32: must be below rl\.max_len - rl\.max_prompt = 32"),
    ],
)
def test_a_setting_that_an_algorithm_would_ignore_is_refused(settings, told):
    with pytest.raises(InputError, match=told):
        chosen(**settings)


def test_dapo_and_algorithms_of_ones_own_may_read_them(tmp_path):
    """An algorithm of one's own is believed: nothing but its code shows whether it reads `overlong`."""
    assert (chosen(algorithm="dapo", redraws=1, overlong=31).overlong, chosen(algorithm="dapo", redraws=1).redraws) == (
        31,
        1,
    )
    (tmp_path / "mine.py").write_text(
        "from reft_jax.algo.algorithms import GRPO\nclass Mine(GRPO):\n    leaves_out = True\nclass Keeps(GRPO): ..."
    )
    assert chosen(algorithm=f"{tmp_path}/mine.py:Mine", redraws=1, overlong=31).redraws == 1
    assert chosen(algorithm=f"{tmp_path}/mine.py:Keeps", overlong=31).overlong == 31
    with pytest.raises(InputError, match="Keeps replaces no questions"):  # `leaves_out` says so
        chosen(algorithm=f"{tmp_path}/mine.py:Keeps", redraws=1)


def test_the_algorithms_own_number_of_samples_must_fill_whole_micro_batches():
    assert chosen(algorithm="grpo", questions=16, minibatches=2, micro_batch=16).samples == 8
    with pytest.raises(
        InputError, match=r"rl\.questions=2 \* 8 samples of grpo must be a multiple of rl\.minibatches=2"
    ):
        chosen(algorithm="grpo", questions=2, minibatches=2, micro_batch=16)


def test_ppo_may_have_its_penalty_in_the_loss():
    paid = Scored(
        *(np.ones(2, np.float32), np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32), None),
        np.ones((2, 4), bool),
    )
    in_reward, in_loss = tiny_ppo(kl_coef=0.5), tiny_ppo(kl_coef=0.5, kl_in="loss")
    np.testing.assert_allclose(in_reward.token_rewards(paid), [[0.5, 0.5, 0.5, 1.5]] * 2)
    np.testing.assert_allclose(in_loss.token_rewards(paid), [[0, 0, 0, 1]] * 2)
    assert in_loss.penalty("loss") and not in_reward.penalty("loss")


# --- identities


@functools.cache
def noisy() -> tuple[Rollout, Scores]:
    """The rows of step_rows.py as four questions with two samples each."""
    score = np.array([1, 0, 0.1, 1, 0, 0, 0.1, 0], np.float32)
    logprob, ref_logprob = (np.where(MASK, x, 0).astype(np.float32) for x in rng(4).normal(-1, 0.3, (2, 8, LENGTH)))
    return Rollout(TOKENS, PROMPT_LEN, TOTAL_LEN, score), Scores(logprob, ref_logprob, None)


@pytest.mark.parametrize("name", GROUPS)
def test_a_permuted_batch_changes_nothing(name):
    """Questions and the samples of a question may come in any order."""
    rollout, scores = noisy()
    order = np.array([5, 4, 0, 1, 7, 6, 2, 3])
    batch, metrics = make_batch(of_two(name), rollout, scores)
    permuted = (jax.tree.map(lambda x: x[order], part) for part in (rollout, scores))
    other, same = make_batch(of_two(name), *permuted)
    for x, y in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x[order], y, atol=1e-6)
    assert numbers(same) == pytest.approx(numbers(metrics), rel=1e-5)
    assert metrics["same_score"] == pytest.approx(1 / 4)


def test_advantages_of_rloo_sum_to_0_over_the_samples_of_a_question():
    rollout, scores = noisy()
    batch, _ = make_batch(of_two("rloo"), rollout, scores)
    each = batch.advantage[np.arange(8), PROMPT_LEN - 1]
    np.testing.assert_allclose(each.reshape(4, 2).sum(1), 0, atol=1e-6)
    assert np.abs(each).min() > 1e-4  # the penalty makes a difference in every question
    np.testing.assert_array_equal(batch.advantage, np.where(MASK, each[:, None], 0))


def test_two_minibatches_of_whole_questions_have_the_weights_of_two_batches():
    rollout, scores = noisy()
    batch, _ = make_batch(of_two("grpo"), rollout, scores, minibatches=2)
    for rows in (slice(0, 4), slice(4, 8)):
        part, _ = make_batch(of_two("grpo"), *jax.tree.map(lambda x, rows=rows: x[rows], (rollout, scores)))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, rows=rows: x[rows], batch), part)


def test_an_update_does_not_depend_on_the_packing():
    """Of DAPO with a penalty in the loss: one row per line, several, and another order give one gradient."""
    rollout, scores = noisy()
    algorithm = of_two("dapo", kl_in="loss", kl_coef=0.3)
    batch, _ = make_batch(algorithm, rollout, scores)
    assert batch.old_value is None and batch.return_ is None and batch.ref_logprob is not None
    params = {"lm": tiny_policy()[1]["lm"]}
    optimizer = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0)
    state, where = tiny_state(MODEL, params, optimizer)
    step = make_step(functools.partial(rl_loss, algorithm), MODEL, optimizer, where)
    found = []
    for rows in (packed(), packed([5, 2, 7, 0, 3, 1, 6, 4]), packed(micro_batch=1, micro_batches=8)):
        state = tiny_state(MODEL, params, optimizer)[0]
        state, metrics = step(state, (rows.lines, jax.tree.map(rows.spread, batch)), rows.count)
        found.append((gradient(state, metrics), numbers(metrics)))
    assert found[0][1].keys() == {"loss", "policy_loss", "kl_loss", "clip_share", "ratio_error_max", "grad_norm"}
    assert "value_head" not in found[0][0] and found[0][1]["grad_norm"] > 1e-3
    for other, metrics in found[1:]:
        assert_same(other, found[0][0], atol=1e-5)
        assert metrics == pytest.approx(found[0][1], rel=1e-4)


# --- what is not there


@pytest.mark.parametrize(("kl_coef", "passes"), [(0.1, 2), (0.0, 1)])
def test_without_a_penalty_no_reference_is_scored(kl_coef, passes):
    model, params = tiny_policy("")
    algorithm = of_two("grpo", kl_coef=kl_coef)
    optimizer, mesh = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0), make_mesh(1, 1, 1)
    state, where = tiny_state(model, params, optimizer, mesh)
    one = Iteration(model, mesh, optimizer, algorithm, where, micro_batch=8, max_len=LENGTH, multiple=8)
    calls, score = [], one.score_lines
    one.score_lines = lambda *args: calls.append(set(args[0])) or score(*args)
    rollout = noisy()[0]
    scores, _ = one.score(state.params, state.params["lm"] if algorithm.reference else None, rollout)
    batch, metrics = one.make_batch(rollout, scores)
    assert calls == [{"lm"}] * passes and ("kl" in metrics) == (batch.ref_logprob is not None) == (passes == 2)
    state, numbers = one.update(state, rollout, batch)
    assert numbers["ratio_error_max"] < 1e-5 and numbers["clip_share"] == 0
    assert state.params.keys() == {"lm"}
