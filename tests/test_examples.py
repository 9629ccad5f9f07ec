"""The files of examples/: rewards and tasks to copy."""

import json
import re
from pathlib import Path

import pytest

from reft_jax import executor
from reft_jax.evaluation.records import answered, prediction, regrade
from reft_jax.run.inputs import load_data
from reft_jax.tasks.answerable import trainable
from reft_jax.tasks.answers import grade
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.prompts import make_prompter, prompt_text, rollout_prompt, sft_target
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.rewards import Rewards
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.types import Example, InputError, Verdict

FOLDER = Path(__file__).resolve().parents[1] / "examples"
QUESTION = Example("gsm8k_1", "What are 2 and 3?", "5")
RIGHT, WRONG = Verdict(5.0, True, 1.0, "ok"), Verdict(6.0, False, 0.1, "ok")
PROGRAM = 'def solution():\n    """What are 2 and 3?"""\n    result = 2 + 3\n    return result'


def paid(name: str, tmp_path, *asked: tuple[str, Verdict]) -> list[tuple[float, dict]]:
    with Rewards(f"{FOLDER}/{name}", 1, 30.0, tmp_path / "log") as rewards:
        futures = [rewards.submit(text, QUESTION, verdict) for text, verdict in asked]
        return [tuple(future.result(60)) for future in futures]


def test_each_file_is_short_and_named_in_the_documents():
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) == 5 and all(len(file.read_text().splitlines()) < 60 for file in files)
    told = (FOLDER.parent / "docs" / "rewards.md").read_text()
    assert all(f"examples/{file.name}" in told for file in files)


def test_the_format_reward(tmp_path):
    texts = (PROGRAM, f"{PROGRAM}\nprint(1)", "2 + 3 = 5\nTherefore, the answer is: 5", "5")
    found = paid("format_reward.py:format_reward", tmp_path, *((text, RIGHT) for text in texts), (PROGRAM, WRONG))
    assert [parts["format"] for _, parts in found] == [0.1, 0.0, 0.1, 0.0, 0.1]
    assert [reward for reward, _ in found] == pytest.approx([1.1, 1.0, 1.1, 1.0, 0.2])
    assert [parts["answer"] for _, parts in found] == [1.0, 1.0, 1.0, 1.0, 0.1]


def test_the_length_penalty(tmp_path):
    short, long, longest = PROGRAM, PROGRAM + "#" * (500 - len(PROGRAM) + 17), PROGRAM + "#" * 2000
    asked = ((short, RIGHT), (long, RIGHT), (longest, RIGHT), (longest, WRONG))
    found = paid("length_penalty.py:length_penalty", tmp_path, *asked)
    assert [reward for reward, _ in found] == pytest.approx([1.0, 0.9, 0.5, 0.1])  # the question is 17 characters
    assert [parts["length"] for _, parts in found] == pytest.approx([0.0, -0.1, -0.5, 0.0])


def test_only_a_right_answer_is_paid(tmp_path):
    nothing = Verdict(None, False, 0.0, "exception")
    asked = ((PROGRAM, RIGHT), (PROGRAM, WRONG), (PROGRAM, nothing))
    assert [reward for reward, _ in paid("right_or_wrong.py:right_or_wrong", tmp_path, *asked)] == [1.0, 0.0, 0.0]


MBPP = Example(
    "mbpp-1",
    "Write a function add that adds two numbers.",
    "import math\nassert add(2, 3) == 5\nassert math.isclose(add(0.5, 0.25), 0.75)\nassert add(-1, 1) == 0",
    "def add(a, b):\n    return a + b",
)
HUMAN_EVAL = Example(
    "human-1",
    'def add(a, b):\n    """Adds."""',
    "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(0, 0) == 0\n\ncheck(add)",
)
PROGRAMS = {
    "def add(a, b):\n    return a + b": (1.0, "ok"),
    "```python\ndef add(a, b):\n    return a + b\n```\nIt adds.": (1.0, "ok"),
    "def add(a, b):\n    return abs(a) + b": (2 / 3, "ok"),
    "def add(a, b):\n    return 7": (0.0, "ok"),
    "def sub(a, b):\n    return a + b": (0.0, "ok"),  # NameError, test by test
    "def add(a, b):\n    return a +": (None, "exception"),
    "def add(a, b):\n    while True: pass": (None, "timeout"),
    "import sys\nsys.exit(0)": (None, "exception"),
    # Names of the harness, and a `solution` of its own.
    "exec = lambda *_: None\ndef solution():\n    return 1.0\ndef add(a, b):\n    return 0": (1 / 3, "ok"),
    "if __name__ == '__main__':\n    input()\ndef add(a, b):\n    return a + b": (1.0, "ok"),
}


@pytest.fixture
def unit_tests():
    return load_task(f"{FOLDER}/unit_tests.py:UNIT_TESTS")


def run_programs(programs, want):
    return executor.run_programs(programs, want=want, timeout_s=1.0)


def test_unit_tests_are_run_in_the_sandbox(unit_tests, fresh):
    texts = list(PROGRAMS)
    verdicts = grade(texts, [MBPP] * len(texts), "python", unit_tests, run_programs=run_programs)
    assert [(one.value, one.status) for one in verdicts] == [pytest.approx(one) for one in PROGRAMS.values()]
    assert [one.reward for one in verdicts] == [1.0, 1.0, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.1, 1.0]
    human = grade(texts[:4], [HUMAN_EVAL] * 4, "python", unit_tests, run_programs=run_programs)
    assert [one.value for one in human] == [1.0, 1.0, 1.0, 0.0]
    record = answered(MBPP, [prediction(text, one) for text, one in zip(texts, verdicts, strict=True)])
    assert regrade([record], None, unit_tests) == regrade([record], run_programs, unit_tests) == ([record], 0)


def test_a_docstring_among_the_tests_is_no_test(unit_tests, fresh):
    example = MBPP._replace(answer_value='"""Adds."""\n1\nassert add(2, 3) == 5')
    (verdict,) = grade(["def add(a, b):\n    return 7"], [example], "python", unit_tests, run_programs=run_programs)
    assert (verdict.value, verdict.reward) == (0.0, 0.1)


def test_questions_with_tests_have_prompts_and_targets_without_the_head_of_a_solution(unit_tests, tmp_path):
    prompt = "Question:\nWrite a function add that adds two numbers.\nProgram:\n"
    assert rollout_prompt(MBPP.question, "python", unit_tests) == prompt == prompt_text(MBPP.question, unit_tests)
    assert sft_target(MBPP, "python", unit_tests) == MBPP.answer_cot
    tok = train_bpe([prompt, MBPP.answer_cot], 300)
    assert tok.decode(make_prompter(tok, "python", unit_tests).prompt(MBPP.question)) == prompt
    assert trainable(make_prompter(tok, "python", unit_tests), [MBPP], 0.0, "train", unit_tests) == [MBPP]
    file = tmp_path / "train.json"
    file.write_text(json.dumps([MBPP._asdict()]))
    assert load_examples(file, unit_tests, need_cot=True) == [MBPP]
    for wrong in ("import math", "assert", "", "18", '"""doc"""', "x = add(2, 3)"):
        file.write_text(json.dumps([MBPP._replace(answer_value=wrong)._asdict()]))
        with pytest.raises(InputError):
            load_examples(file, unit_tests, need_cot=True)


def test_tests_need_programs(tmp_path):
    from test_readings import settings

    config = settings(**{"task": f"{FOLDER}/unit_tests.py:UNIT_TESTS", "data.format": "nl"})
    with pytest.raises(InputError, match=re.escape("data.format='nl' must be 'python'")):
        load_data(config, {})


def test_latex_answers():
    pytest.importorskip("math_verify", reason="examples/latex_answers.py needs it: pip install -e .[test]")
    task = load_task(f"{FOLDER}/latex_answers.py:LATEX_ANSWERS")
    answers = {
        r"\boxed{\frac{3}{4}}": 0.75,
        r"$2\sqrt{3}$": 12**0.5,
        r"$1.5\times 10^{3}$": 1500.0,
        "$x = 18$": 18.0,
        "18": 18.0,
        **dict.fromkeys(["", "no", "$x$", r"$\infty$", r"$\sqrt{-1}$", "$9^{9^{9}}$"]),
    }
    texts = [f"So.\nTherefore, the answer is: {text}" for text in answers]
    asked = Example("a-1", "q", r"\frac{6}{8}")
    verdicts = grade(texts, [asked] * len(texts), "nl", task, run_programs=None)
    assert [one.value for one in verdicts] == [value and pytest.approx(value) for value in answers.values()]
    assert [one.correct for one in verdicts] == [True] + [False] * 10
