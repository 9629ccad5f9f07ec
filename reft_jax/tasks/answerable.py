"""Finds questions that no completion can answer, and worked programs that teach nothing, before a model is trained.

Training leaves them out. An evaluation keeps them, and they count as wrong.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence

from reft_jax.tasks.datasets import leave_out, named
from reft_jax.tasks.prompts import Prompter, is_text, parsed, sft_target
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import Example, InputError

NO_PROGRAM = "no program compiles after the question"
NO_ROOM = "the question leaves no token for an answer"
NOT_PYTHON = "answer_cot is not Python"


def unanswerable(prompter: Prompter, examples: Sequence[Example], max_len: int) -> dict[str, str]:
    """{item_id: reason} of the questions for which every completion is graded as no answer.

    The check reads the text that grading reads: it is decoded from the prompt's ids, so a tokenizer that changes quotes
    or spaces is found too. `max_len` counts the tokens of prompt and response.
    """
    reasons, prompts = {}, prompter.prompts([example.question for example in examples])
    for example, ids in zip(examples, prompts, strict=True):
        if len(ids) >= max_len:
            reasons[example.item_id] = NO_ROOM
        elif prompter.prefix(example.question) and not can_begin_program(prompter.answer(ids)):
            reasons[example.item_id] = NO_PROGRAM
    return reasons


def can_begin_program(text: str) -> bool:
    """Whether `text` is the head of `solution` with a docstring, which a program can continue."""
    match parsed(f"{text}\n    return 1"):
        case [ast.FunctionDef(name="solution", body=[first, ast.Return()])]:
            return is_text(first)
    return False


def unteachable(examples: Sequence[Example], answer_format: str, task: Task = PAPER) -> dict[str, str]:
    """{item_id: reason} of the rows whose worked program does not compile. Raises InputError as `sft_target` does."""
    targets = {example.item_id: sft_target(example, answer_format, task) for example in examples}
    return {item_id: NOT_PYTHON for item_id, text in targets.items() if answer_format == "python" and not parsed(text)}


def trainable(
    prompter: Prompter, examples: Sequence[Example], max_dropped: float, source: str, task: Task = PAPER
) -> list[Example]:
    """The rows that training can use: they can earn a reward, and their worked solution compiles.

    A line names the others. Raises InputError, naming `source`, if they are a larger share than `max_dropped`, or if a
    solution has the other answer format. Length limits are checked elsewhere.
    """
    try:
        reasons = unteachable(examples, prompter.answer_format, task)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    reasons |= unanswerable(prompter, examples, sys.maxsize)
    return leave_out(examples, reasons, max_dropped, source)


def wrong_anyway(prompter: Prompter, examples: Sequence[Example], max_len: int, split: str) -> str:
    """One line that names the questions of an evaluation that no completion can answer; "" if there are none."""
    reasons = unanswerable(prompter, examples, max_len)
    told = f"{len(reasons)} of {len(examples)} {split} questions cannot be answered and count as wrong"
    return f"{told}: {named(reasons)}" if reasons else ""
