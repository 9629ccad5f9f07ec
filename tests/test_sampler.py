"""Sampler against trainer: figures of the gap, importance weights, the stop. And questions that are drawn again."""

import gzip
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from step_rows import PROMPT_LEN, TOTAL_LEN

from reft_jax.algo.algorithms import DAPO, GRPO
from reft_jax.run.executions import LOG_NAME, ExecutionLog
from reft_jax.stages import reft
from reft_jax.stages.rollout import Graded, prompts_of_iteration
from reft_jax.train.iteration import Scores, gap_metrics, importance_weights
from reft_jax.train.packing import Packing
from reft_jax.types import Completion, Example, PPOBatch, Prompt, SamplerGapError, Verdict

# Ratios of trainer to sampler: 1, 3, 1/4, 1.
GAP = np.log(np.array([1, 3, 1 / 4, 1], np.float32))


def test_figures_of_the_gap_by_hand():
    found = gap_metrics(GAP)
    assert found["sampler_gap"] == pytest.approx(np.log(4), rel=1e-6)
    assert found["sampler_gap_mean"] == pytest.approx((np.log(3) + np.log(4)) / 4, rel=1e-6)
    assert found["sampler_outside"] == 1 / 2
    assert found["sampler_ess"] == pytest.approx(5.25**2 / (4 * (1 + 9 + 1 / 16 + 1)), rel=1e-6)
    many = np.zeros(1001, np.float32)
    many[:2] = -0.5, 0.25
    assert gap_metrics(many)["sampler_gap_p999"] == pytest.approx(0.25)  # one of a thousand is further away
    same = gap_metrics(np.zeros(7, np.float32))
    assert set(same.values()) == {0, 1} and same["sampler_ess"] == 1


def test_importance_weights_by_hand():
    np.testing.assert_allclose(importance_weights(GAP, "tis", 2.0), [1, 2, 1 / 4, 1], rtol=1e-6)
    np.testing.assert_allclose(importance_weights(GAP, "mis", 2.0), [1, 0, 1 / 4, 1], rtol=1e-6)
    for correction, last in (("tis", 2), ("mis", 0)):
        weights = importance_weights(np.array([900.0], np.float32), correction, 2.0)
        assert weights.dtype == np.float32 and weights == last


PACKING = Packing(
    [list(range(n)) for n in TOTAL_LEN],
    PROMPT_LEN - 1,
    TOTAL_LEN - PROMPT_LEN,
    max_len=40,
    micro_batch=2,
    micro_batches=4,
    multiple=8,
)


def test_the_gap_is_that_of_the_trainer_against_the_sampler_token_by_token():
    of_rows = [np.arange(n, dtype=np.float32) + 100 * row for row, n in enumerate(TOTAL_LEN - PROMPT_LEN)]
    completions = [Completion("", 0, [], logprobs, True) for logprobs in of_rows]
    logprob = np.zeros((8, 40), np.float32)
    for row, first in enumerate(PROMPT_LEN - 1):
        logprob[row, first : first + len(of_rows[row])] = of_rows[row] + row + 1
    gap = reft.trainer_gap(Scores(logprob, None, None), PACKING, completions)
    np.testing.assert_array_equal(gap, np.repeat(np.arange(8) + 1, TOTAL_LEN - PROMPT_LEN))


def test_a_correction_weighs_the_advantages_of_its_tokens_alone():
    advantage, others = np.zeros((8, 40), np.float32), np.ones((8, 40), np.float32)
    advantage[PACKING.at] = 2.0
    weights = np.arange(len(PACKING.at[0]), dtype=np.float32)
    before = PPOBatch(others, others, None, advantage, None)
    batch = reft.corrected(before, PACKING, weights)
    np.testing.assert_array_equal(batch.advantage[PACKING.at], 2 * weights)
    assert batch.advantage.sum() == 2 * weights.sum() and np.all(advantage[PACKING.at] == 2.0)
    assert all(x is y for x, y in zip(batch._replace(advantage=None), before._replace(advantage=None), strict=True))


def test_a_run_stops_if_trainer_and_sampler_disagree_too_often():
    metrics = gap_metrics(GAP)
    for allowed in (0.0, 0.5, 0.6):
        reft.check_gap(allowed, metrics, 3)
    with pytest.raises(SamplerGapError, match=r"^reft 3: trainer and sampler disagree: .* 50\.00% .* allows 25\.00%"):
        reft.check_gap(0.25, metrics, 3)


def test_each_rollout_is_logged_with_its_own_advantage_and_gap(tmp_path):
    logprobs = [np.zeros(2, np.float32), np.zeros(0, np.float32), np.zeros(3, np.float32)]
    graded = [
        Graded(
            Completion(f"q_{i}", 0, [], given, True), f"text {i}", Verdict(1.0, True, 1.0, "ok"), {"item_id": f"q_{i}"}
        )
        for i, given in enumerate(logprobs)
    ]
    run = SimpleNamespace(workdir=SimpleNamespace(executions=ExecutionLog(tmp_path)))
    reft.log_rollouts(
        run, 7, graded, np.array([0.5, 0.0, -np.inf]), np.array([0.1, -0.25, 0.5, -0.125, 0.0], np.float32)
    )
    with gzip.open(tmp_path / LOG_NAME, "rt") as lines:
        logged = [json.loads(line) for line in lines]
    assert [line.pop("completion") for line in logged] == ["text 0", "text 1", "text 2"]
    assert logged == [
        {"item_id": "q_0", "iteration": 7, "row": 0, "advantage": 0.5, "sampler_gap": 0.25},
        {"item_id": "q_1", "iteration": 7, "row": 1, "advantage": 0.0, "sampler_gap": 0.0},
        {"item_id": "q_2", "iteration": 7, "row": 2, "advantage": None, "sampler_gap": 0.5},
    ]


# --- questions whose samples all have the same score


EXAMPLES = [Example(f"q_{i}", "", "1") for i in range(6)]


def drawn_again(monkeypatch, algorithm, rewards: list[list[list[float]]]):
    """What `sampled` makes of rollouts with these rewards [question][sample], and what was asked in each rollout."""
    logged_lines = []
    prompts_of = SimpleNamespace(
        prompts=lambda examples, n: [Prompt(e.item_id, 0, [0]) for e in examples for _ in range(n)]
    )
    run = SimpleNamespace(
        inputs=SimpleNamespace(questions=EXAMPLES, prompts=prompts_of.prompts),
        config=SimpleNamespace(seed=1),
        workdir=SimpleNamespace(executions=SimpleNamespace(append=logged_lines.extend)),
    )
    asked = []

    def roll_out(run, lm, examples, purpose, number, samples, rewards_of_ones_own, seen, logged):
        prompts = prompts_of_iteration(run, examples, samples, seen)
        asked.append([(prompt.item_id, prompt.sample) for prompt in prompts])
        flat = np.ravel(rewards[len(asked) - 1])
        graded = [
            Graded(
                Completion(p.item_id, p.sample, [], [], True),
                "",
                Verdict(None, False, float(reward), ""),
                (p.item_id, p.sample),
            )
            for p, reward in zip(prompts, flat, strict=True)
        ]
        names = ("seconds_rollout", "seconds_reward", "seconds_programs", "prompt_tokens", "tokens", "train_correct")
        return prompts, graded, dict.fromkeys(names, len(asked))

    monkeypatch.setattr(reft, "roll_out_once", roll_out)
    prompts, graded, metrics = reft.sampled(run, None, EXAMPLES[:3], 5, algorithm, None)
    kept = {(p.item_id, p.sample) for p in prompts}
    everything = [pair for pairs in asked for pair in pairs]
    assert sorted(logged_lines) == sorted(pair for pair in everything if pair not in kept)  # the others get advantages
    return prompts, [one.verdict.reward for one in graded], metrics, asked


def made(kind, redraws: int):
    paper = {
        "kl_coef": 0.0,
        "gamma": 1.0,
        "lam": 1.0,
        "clip": 0.2,
        "value_clip": 0.2,
        "vf_coef": 0.0,
        "temperature": 1.0,
    }
    return kind(**paper, samples=2, redraws=redraws)


def test_questions_without_a_difference_are_replaced_by_others_up_to_a_limit(monkeypatch):
    first, second, third = [[1, 1], [1, 0], [0, 0]], [[0.1, 0.1], [0, 1]], [[0.1, 0]]
    prompts, rewards, metrics, asked = drawn_again(monkeypatch, made(DAPO, 5), [first, second, third])
    assert rewards == [0.1, 0, 1, 0, 0, 1]  # each where the question was that it replaces
    assert [len(pairs) for pairs in asked] == [6, 4, 2]
    assert [(p.item_id, p.sample) for p in prompts] == [*asked[2], *asked[0][2:4], *asked[1][2:]]
    assert metrics["redrawn"] == 3 and metrics["tokens"] == 1 + 2 + 3 and metrics["train_correct"] == 1
    everything = Counter(pair for pairs in asked for pair in pairs)
    assert set(everything.values()) == {1}  # a question that comes again has other sample numbers, so other solutions
    assert drawn_again(monkeypatch, made(DAPO, 5), [first, second, third])[3] == asked

    _, rewards, metrics, asked = drawn_again(monkeypatch, made(DAPO, 1), [first, second])
    assert rewards == [0.1, 0.1, 1, 0, 0, 1] and len(asked) == 2 and metrics["redrawn"] == 2


def test_other_algorithms_draw_nothing_again(monkeypatch):
    for algorithm in (made(GRPO, 5), made(DAPO, 0)):
        _, rewards, metrics, asked = drawn_again(monkeypatch, algorithm, [[[1, 1], [1, 0], [0, 0]]])
        assert len(asked) == 1 and rewards == [1, 1, 1, 0, 0, 0] and "redrawn" not in metrics
