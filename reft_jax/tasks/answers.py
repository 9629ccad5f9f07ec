"""From a completion to a reward: read its answer, compare it with the target.

Reward (ReFT, arXiv 2401.08967, eq. 3): 1 for the correct answer, 0.1 for an answer that is wrong, 0 for no answer.
Unlike the paper's released code, NaN, infinity and a MathQA program that returns no letter are no answer.
"""

import math
import re
from collections.abc import Callable, Sequence

from reft_jax.executor import ExecResult
from reft_jax.tasks.prompts import ANSWER_PHRASE, plain_answer
from reft_jax.types import Example, InputError, Verdict

CHOICE_DATASET = "mathqa"  # its answer is one of the letters a-e; every other dataset's is a number
DATASETS = ("gsm8k", "svamp", CHOICE_DATASET, "mathqa-numeric", "toy")
TOLERANCE = 1e-2
Answer = tuple[float | str | None, str]  # value and status
RunPrograms = Callable[..., list[ExecResult]]  # (programs, want="number" | "text")


def dataset_of(item_id: str) -> str:
    """The dataset an item belongs to: its id up to the first underscore. Raises InputError for an unknown one."""
    dataset = item_id.partition("_")[0]
    if dataset not in DATASETS:
        raise InputError(
            f"item_id {item_id!r} names no known dataset; start it with one of {', '.join(DATASETS)} and '_'"
        )
    return dataset


def read_answer(dataset: str, raw: float | str | None) -> float | str | None:
    """What a program returned or a text stated, as an answer of this dataset: a finite float, or a letter a-e.

    None where `raw` is None or not such an answer. Letters may come in upper case, with quotes and spaces.
    """
    if raw is None:
        return None
    if dataset == CHOICE_DATASET:
        letter = re.sub(r"[\s'\"]", "", str(raw)).lower()
        return letter if letter in tuple("abcde") else None
    try:
        number = float(raw)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def read_target(dataset: str, answer_value: str) -> float | str | None:
    """The correct answer, as `read_answer` gives it; a number may have commas between groups of thousands ("1,080"),
    and with any other comma ("1,5") it is None."""
    return read_answer(dataset, plain_answer(answer_value))


def is_correct(dataset: str, value: float | str | None, answer_value: str) -> bool:
    """Whether a value that `read_answer` returned is right: numbers within 0.01 of the target, letters the same."""
    if value is None:
        return False
    target = read_target(dataset, answer_value)
    if dataset == CHOICE_DATASET:
        return value == target
    return abs(value - target) <= TOLERANCE


def grade(
    completions: Sequence[str], examples: Sequence[Example], engine: str, *, run_programs: RunPrograms
) -> list[Verdict]:
    """Grade `completions[i]`, an answer to `examples[i]`.

    `python` completions are programs; all that are to return a number go through one call of `run_programs(programs,
    want=...)`, all that are to return a letter through another. A verdict's status is then the executor's, or
    "not_a_number" or "not_a_letter" for a program that ran and returned something else. For `nl` it is "ok" or
    "no_answer".

    Raises ValueError if the lists differ in length, InputError for an unknown dataset; what `run_programs` raises (the
    executor is broken) passes through and is never a reward of 0.
    """
    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
    if engine == "python":
        answers = _run(completions, examples, run_programs)
    else:
        answers = list(map(stated, completions, examples))
    return [judge(value, status, example) for (value, status), example in zip(answers, examples, strict=True)]


def _run(programs: Sequence[str], examples: Sequence[Example], run_programs: RunPrograms) -> list[Answer]:
    """Run all programs, those of one kind of answer in one call."""
    by_want: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_want.setdefault(wanted(example), []).append(index)
    answers: dict[int, Answer] = {}
    for want, indices in by_want.items():
        results = run_programs([programs[index] for index in indices], want=want)
        for index, result in zip(indices, results, strict=True):
            answers[index] = returned(result, examples[index])
    return [answers[index] for index in range(len(examples))]


def wanted(example: Example) -> str:
    """What a program that answers this example is to return, as the executor has it: "text" or "number"."""
    return "text" if dataset_of(example.item_id) == CHOICE_DATASET else "number"


def returned(result: ExecResult, example: Example) -> Answer:
    """The answer of a program that was run."""
    dataset = dataset_of(example.item_id)
    value = read_answer(dataset, result.value)
    if value is None and result.value is not None:
        return None, "not_a_letter" if dataset == CHOICE_DATASET else "not_a_number"
    return value, result.status


def stated(text: str, example: Example) -> Answer:
    """The answer that a text states."""
    _, phrase, said = text.rpartition(ANSWER_PHRASE)
    value = read_answer(dataset_of(example.item_id), said) if phrase else None
    return value, "no_answer" if value is None else "ok"


def judge(value: float | str | None, status: str, example: Example) -> Verdict:
    """The verdict on an answer that `read_answer` returned: reward 1 if right, 0.1 if wrong, 0 if None."""
    correct = is_correct(dataset_of(example.item_id), value, example.answer_value)
    reward = 1.0 if correct else 0.0 if value is None else 0.1
    return Verdict(value, correct, reward, status)
