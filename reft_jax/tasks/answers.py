"""Grades completions: runs the programs, reads the answers, and lets the task judge them."""

from collections.abc import Callable, Sequence

from reft_jax.executor import ExecResult
from reft_jax.tasks.registry import PAPER, Answer, Task
from reft_jax.types import Example, Verdict

RunPrograms = Callable[..., list[ExecResult]]  # (programs, want="number" | "text")


def grade(
    completions: Sequence[str],
    examples: Sequence[Example],
    answer_format: str,
    task: Task = PAPER,
    *,
    run_programs: RunPrograms,
) -> list[Verdict]:
    """Grade `completions[i]`, an answer to `examples[i]`.

    For `python` the task names the program of a completion. All that must return a number go through one call of
    `run_programs(programs, want=...)`, all that must return text through another. The status of a verdict is then the
    executor's, or `task.other` for a program that ran and returned something that is no answer. For `nl` it is "ok" or
    "no_answer".

    Raises ValueError if the lists differ in length, InputError for an item whose task is not known. An error of
    `run_programs` (the executor is broken) passes through and is never a reward of 0.
    """
    if len(completions) != len(examples):
        raise ValueError(f"{len(completions)} completions for {len(examples)} examples")
    tasks = [task.of(example.item_id) for example in examples]
    if answer_format == "python":
        named = zip(tasks, completions, examples, strict=True)
        answers = _run([one.program(text, example) for one, text, example in named], tasks, run_programs)
    else:
        answers = [one.stated(text) for one, text in zip(tasks, completions, strict=True)]
    graded = zip(tasks, answers, examples, strict=True)
    return [one.judge(value, status, example) for one, (value, status), example in graded]


def _run(programs: Sequence[str], tasks: Sequence[Task], run_programs: RunPrograms) -> list[Answer]:
    """Run all programs, those that must return the same kind of answer in one call."""
    by_want: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_want.setdefault(task.returns, []).append(index)
    answers: dict[int, Answer] = {}
    for want, indices in by_want.items():
        results = run_programs([programs[index] for index in indices], want=want)
        for index, result in zip(indices, results, strict=True):
            answers[index] = tasks[index].returned(result)
    return [answers[index] for index in range(len(tasks))]
