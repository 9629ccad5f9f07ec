"""Sampler against trainer: figures of the gap, importance weights, the stop. And questions that are drawn again."""

import functools
import gzip
import json
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from step_rows import MODEL, PARAMS, PROMPT_LEN, ROWS, TOTAL_LEN
from tiny import tiny_state

from reft_jax import __main__
from reft_jax.algo.algorithms import DAPO, GRPO
from reft_jax.parallel.mesh import make_mesh
from reft_jax.run.executions import LOG_NAME, ExecutionLog
from reft_jax.stages import reft
from reft_jax.stages.rollout import Graded, prompts_of_iteration
from reft_jax.train.iteration import Iteration, Scores, gap_metrics, importance_weights
from reft_jax.train.packing import Packing
from reft_jax.train.state import make_optimizer
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


OPTIMIZER, MESH = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0), make_mesh(1, 1, 1)


@functools.cache
def compiled() -> Iteration:
    where = tiny_state(MODEL, {"lm": PARAMS["lm"]}, OPTIMIZER, MESH)[1]
    return Iteration(MODEL, MESH, OPTIMIZER, made(GRPO, 0), where, micro_batch=8, max_len=40, multiple=8)


class Iterated:
    """One iteration of GRPO on the rows of step_rows.py. Its sampler's log-probabilities are the trainer's, but on
    every `nth` token, where they are 3 nats less."""

    def __init__(self, tmp_path, monkeypatch, nth: int, max_gap: float, of_first: dict):
        params, self.functions = {"lm": PARAMS["lm"]}, compiled()
        self.state, _ = tiny_state(MODEL, params, OPTIMIZER, MESH)
        prompts = [Prompt(f"q_{row // 2}", row % 2, ROWS[row][:n]) for row, n in enumerate(PROMPT_LEN)]
        answers = [np.array(ROWS[row][n:], np.int32) for row, n in enumerate(PROMPT_LEN)]
        self.rewards = [1.0, 0.0, 1.0, 0.1, 0.0, 0.0, 0.1, 0.0]
        rollout = reft.rollout_rows(prompts, [SimpleNamespace(tokens=ids) for ids in answers], self.rewards, 40)
        scores, packing = self.functions.score(params, None, rollout)
        ours = scores.logprob[packing.at]
        ours[::nth] -= 3.0
        parts = np.split(ours, np.cumsum([len(ids) for ids in answers])[:-1])
        graded = [
            Graded(Completion(prompt.item_id, 0, ids, part, True), "text", Verdict(1.0, True, paid, "ok"), {"row": row})
            for row, (prompt, ids, part, paid) in enumerate(zip(prompts, answers, parts, self.rewards, strict=True))
        ]
        seconds = {"seconds_rollout": 0.0, "seconds_reward": 0.0}
        monkeypatch.setattr(reft, "sampled", lambda *args: (prompts, graded, seconds | of_first))
        rl = {"max_len": 40, "minibatches": 1, "ppo_epochs": 1, "max_gap": max_gap, "sampler_correction": "none"}
        self.run = SimpleNamespace(
            config=SimpleNamespace(seed=1, rl=SimpleNamespace(**rl), data=SimpleNamespace(pad_multiple=8)),
            workdir=SimpleNamespace(executions=ExecutionLog(tmp_path)),
            programs=Counter(),
        )
        self.before = jax.device_get(self.state)

    def go(self):
        return reft.iterate(self.run, self.functions, self.state, (self.state.params, None, None), [], 7, None)


def test_a_run_ends_before_an_update_if_the_gap_is_too_large_and_its_rollout_is_logged(tmp_path, monkeypatch):
    one = Iterated(tmp_path, monkeypatch, nth=4, max_gap=0.2, of_first={})
    with pytest.raises(SamplerGapError, match=r"^reft 7: .* on 2\d\.\d\d% .* allows 20\.00%; .* is 3\.00 nats"):
        one.go()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one.state), one.before)
    with gzip.open(tmp_path / LOG_NAME, "rt") as lines:
        logged = [json.loads(line) for line in lines]
    assert [(line["iteration"], line["row"], line["completion"]) for line in logged] == [
        (7, i, "text") for i in range(8)
    ]
    assert max(line["sampler_gap"] for line in logged) == pytest.approx(3, abs=1e-4)


@pytest.mark.parametrize("of_first", [{}, {"reward": 0.625}])
def test_an_iteration_within_the_limit_updates_and_reports_the_reward_of_the_first_rollout(
    tmp_path, monkeypatch, of_first
):
    """What `sampled` says of the first rollout, where questions may be replaced; else that of the rows."""
    one = Iterated(tmp_path, monkeypatch, nth=4, max_gap=0.3, of_first=of_first)
    state, metrics, _, rollout = one.go()
    assert 0.2 < metrics["sampler_outside"] < 0.3 and int(state.step) == 1
    changed = jax.tree.map(lambda x, y: np.abs(x - y).max(), jax.device_get(state.params), one.before.params)
    assert changed["lm"]["embed"] > 1e-3
    of_rows = np.float32(one.rewards).mean()
    np.testing.assert_array_equal(rollout.score, np.float32(one.rewards))
    found = {
        name: float(value) for name, value in metrics.items() if name.startswith("reward") and name != "reward_std"
    }
    assert found == pytest.approx({"reward": 0.625, "reward_trained": of_rows} if of_first else {"reward": of_rows})


def test_the_exit_code_of_such_a_run_is_3(monkeypatch, capsys):
    def run_command(argv):
        raise SamplerGapError("reft 7: trainer and sampler disagree")

    monkeypatch.setattr(__main__, "run_command", run_command)
    monkeypatch.setattr(__main__.terminal, "prepare", lambda: None)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 3 and capsys.readouterr().err == "error: reft 7: trainer and sampler disagree\n"


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
    assert metrics["reward"] == 3 / 6  # of the first rollout, as train_correct and the parts of a reward of one's own
    everything = Counter(pair for pairs in asked for pair in pairs)
    assert set(everything.values()) == {1}  # a question that comes again has other sample numbers, so other solutions
    assert drawn_again(monkeypatch, made(DAPO, 5), [first, second, third])[3] == asked

    _, rewards, metrics, asked = drawn_again(monkeypatch, made(DAPO, 1), [first, second])
    assert rewards == [0.1, 0.1, 1, 0, 0, 1] and len(asked) == 2 and metrics["redrawn"] == 2
    assert metrics["reward"] == 3 / 6


def test_other_algorithms_draw_nothing_again(monkeypatch):
    for algorithm in (made(GRPO, 5), made(DAPO, 0)):
        _, rewards, metrics, asked = drawn_again(monkeypatch, algorithm, [[[1, 1], [1, 0], [0, 0]]])
        assert len(asked) == 1 and rewards == [1, 1, 1, 0, 0, 0] and not metrics.keys() & {"redrawn", "reward"}
