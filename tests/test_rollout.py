"""Programs run while the engine decodes; verdicts are the graded ones; a broken executor is an error."""

import time

import numpy as np
import pytest

from reft_jax import executor
from reft_jax.config import default_config
from reft_jax.run.executions import ExecutionLog, read_executions
from reft_jax.run.guards import Guards
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.machine import Machine
from reft_jax.run.open import Run, Workdir
from reft_jax.stages.rollout import Clock, roll_out, top1
from reft_jax.types import Completion, Example, Prompt

PROGRAMS = [
    "def solution():\n    return 7",
    "def solution():\n    return 8",
    "def solution():\n    return 1 / 0",
    "def solution():\n    return 7",
]
EXAMPLES = [Example(f"gsm8k_{i}", "", "7") for i in range(4)]
PROMPTS = [Prompt(example.item_id, 0, np.zeros(1, np.int32)) for example in EXAMPLES]


class FakeEngine:
    """Yields the completions in an order of its own; `wait` is called before the last."""

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
