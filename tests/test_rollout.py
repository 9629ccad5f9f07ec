"""Programs run while the engine decodes; verdicts are the graded ones; a broken executor is an error."""

import json
import time

import numpy as np
import pytest

from reft_jax import executor
from reft_jax.config import default_config
from reft_jax.run.executions import LOG_NAME, ExecutionLog, execution, read_executions, replay
from reft_jax.run.guards import Guards
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.machine import Machine
from reft_jax.run.open import Run, Workdir
from reft_jax.stages import rollout
from reft_jax.stages.rollout import Clock, reward_parts, roll_out, top1
from reft_jax.tasks.rewards import RewardError, Rewards
from reft_jax.types import Completion, Example, Prompt, Stopped, Verdict

PROGRAMS = [
    "def solution():\n    return 7",
    "def solution():\n    return 8",
    "def solution():\n    return 1 / 0",
    "def solution():\n    return 7",
]
EXAMPLES = [Example(f"gsm8k_{i}", "", "7") for i in range(4)]
PROMPTS = [Prompt(example.item_id, 0, np.zeros(1, np.int32)) for example in EXAMPLES]


class FakeEngine:
    """Yields the completions in another order; `wait` is called before the last."""

    def __init__(self, wait=lambda: None):
        self.wait = wait

    def generate(self, lm, prompts, **sampling):
        for number, i in enumerate((2, 0, 3, 1)):
            if number == 3:
                self.wait()
            yield i, Completion(prompts[i].item_id, 0, np.array([i], np.int32), np.zeros(1, np.float32), True)


def run_with(engine, tmp_path, monkeypatch, texts=PROGRAMS, kind="python") -> Run:
    config = default_config()
    config.data.format = kind
    monkeypatch.setattr(Inputs, "text", lambda self, prompt, completion: texts[int(completion.tokens[0])])
    inputs = Inputs(config, tmp_path, None, Data([], [], [], ""))
    return Run(inputs, Machine(None, None, engine), Workdir(tmp_path, ExecutionLog(tmp_path)), Guards())


def test_verdicts_belong_to_their_completions_and_are_logged(tmp_path, monkeypatch):
    clock, run = Clock(), run_with(FakeEngine(), tmp_path, monkeypatch)
    found = dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", clock))
    assert [found[i].verdict.reward for i in range(4)] == [1.0, 0.1, 0.0, 1.0]
    assert [found[i].text for i in range(4)] == PROGRAMS
    assert [found[i].completion.item_id for i in range(4)] == [example.item_id for example in EXAMPLES]
    assert top1([found[i] for i in range(4)]) == 0.5
    assert run.programs == {"ok": 3, "exception": 1}
    logged = list(read_executions(tmp_path / "executions.jsonl.gz"))
    assert [line["item_id"] for line in logged] == ["gsm8k_2", "gsm8k_0", "gsm8k_3", "gsm8k_1"]
    assert len(clock.programs) == 3 and all(seconds > 0 for seconds in clock.programs)  # equal programs run once


def test_hosts_exchange_the_times_of_programs_and_not_their_texts(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(rollout.hosts, "gather", lambda what, value: sent.append(json.dumps(value)) or [value])
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    assert len(dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test"))) == 4
    assert len(sent) == 1 and "solution" not in sent[0]
    assert all(line["ms"] > 0 for line in read_executions(tmp_path / LOG_NAME))


def test_a_rollout_that_the_caller_logs_leaves_its_lines_to_the_caller(tmp_path, monkeypatch):
    """So an iteration that ends within its rollout leaves nothing in the log: it is sampled again, and logged then."""
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    found = dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", logged=False))
    assert not (tmp_path / LOG_NAME).exists()
    run.workdir.executions.append([found[i].line for i in range(4)])
    logged = list(read_executions(tmp_path / LOG_NAME))
    assert [(line["item_id"], line["reward"]) for line in logged] == [
        ("gsm8k_0", 1.0),
        ("gsm8k_1", 0.1),
        ("gsm8k_2", 0.0),
        ("gsm8k_3", 1.0),
    ]


def test_programs_run_before_the_last_token_is_drawn(tmp_path, monkeypatch):
    """Were they kept until the end, the engine would wait here for ever."""
    before = executor.counts()["programs"]

    def wait():
        deadline = time.monotonic() + 60
        while executor.counts()["programs"] < before + 2:
            assert time.monotonic() < deadline, "no program was run while the engine was at work"
            time.sleep(0.01)

    run = run_with(FakeEngine(wait), tmp_path, monkeypatch)
    assert len(dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test"))) == 4


def test_texts_are_graded_without_the_executor(tmp_path, monkeypatch):
    texts = ["So 7.\nTherefore, the answer is: 7", "Therefore, the answer is: 9", "I do not know.", ""]
    run, before = run_with(FakeEngine(), tmp_path, monkeypatch, texts, "nl"), executor.counts()["programs"]
    found = dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test"))
    assert [found[i].verdict.reward for i in range(4)] == [1.0, 0.1, 0.0, 0.0]
    assert executor.counts()["programs"] == before


def test_an_executor_that_fails_is_an_error_and_no_reward(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise executor.InfrastructureError("no zygote")

    monkeypatch.setattr(executor.pool, "Zygote", broken)
    monkeypatch.setattr(executor.pool, "take", lambda kind: None)
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    with pytest.raises(executor.InfrastructureError):
        dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test"))


REWARD = """
import time

def reward(completion, example, verdict):
    return 10 + verdict.reward, {"answer": verdict.reward, "item": int(example.item_id[-1])}

def raises(completion, example, verdict):
    return 1.0 if verdict.correct else missing

def slow(completion, example, verdict):
    time.sleep(0.5)
    return 1.0
"""


def paying(tmp_path, name: str, workers: int = 2) -> Rewards:
    (tmp_path / "mine.py").write_text(REWARD)
    return Rewards(f"{tmp_path}/mine.py:{name}", workers, 30.0, tmp_path / "log")


def test_a_reward_of_ones_own_is_paid_for_the_graded_completion(tmp_path, monkeypatch, capsys):
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    with paying(tmp_path, "reward") as rewards:
        found = dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", rewards=rewards))
    verdicts = [found[i].verdict for i in range(4)]
    assert [one.reward for one in verdicts] == [11.0, 10.1, 10.0, 11.0]
    assert [one.correct for one in verdicts] == [True, False, False, True]
    assert [one.parts["item"] for one in verdicts] == [0, 1, 2, 3]
    assert reward_parts(list(found.values())) == {"reward/answer": pytest.approx(2.1 / 4), "reward/item": 1.5}
    assert dict(roll_out(run, None, PROMPTS, EXAMPLES, "another"))[0].verdict == Verdict(7.0, True, 1.0, "ok")
    assert reward_parts([]) == {}

    # The log has what was paid. It does not have the completion, so it is checked only whether the answer is correct.
    logged = list(read_executions(tmp_path / "executions.jsonl.gz"))
    assert [line["reward"] for line in logged] == [10.0, 11.0, 11.0, 10.1, 0.0, 1.0, 1.0, 0.1]
    assert [line["parts"]["item"] for line in logged[:4]] == [2, 0, 3, 1] and "parts" not in logged[4]
    (tmp_path / "config.json").write_text("{}")
    assert replay(tmp_path)
    assert "4 rewards are not checked: the setting `reward` gave them" in capsys.readouterr().out
    wrong = verdicts[0]._replace(correct=False)
    run.workdir.executions.append([execution("a test", EXAMPLES[0], "text", wrong, 1.0)])
    assert not replay(tmp_path)


def test_a_reward_that_fails_stops_the_rollout_and_says_where(tmp_path, monkeypatch, capfd):
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    with paying(tmp_path, "raises") as rewards, pytest.raises(RewardError, match="item 'gsm8k_2': NameError"):
        dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", rewards=rewards))
    assert "in raises\n    return 1.0 if verdict.correct else missing" in capfd.readouterr().err


def test_slow_rewards_are_shown_as_they_come(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rollout, "SHOWN_AFTER_S", 0.1)
    run = run_with(FakeEngine(), tmp_path, monkeypatch)
    with paying(tmp_path, "slow") as rewards:
        assert len(dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", rewards=rewards))) == 4
    assert "a test: grading  4/" in capfd.readouterr().err


def test_a_signal_while_rewards_are_computed_stops_the_run(tmp_path, monkeypatch):
    run = run_with(FakeEngine(lambda: setattr(run.guards, "asked", "SIGTERM")), tmp_path, monkeypatch)
    with paying(tmp_path, "slow") as rewards, pytest.raises(Stopped):
        dict(roll_out(run, None, PROMPTS, EXAMPLES, "a test", rewards=rewards))
