"""Which questions no completion can answer, and which worked programs teach nothing: found before anything is trained.

Training leaves them out; in an evaluation they stay and count as wrong.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reft_jax.tasks.datasets import leave_out, named
from reft_jax.tasks.prompts import completion_text, is_text, parsed, sft_target
from reft_jax.tasks.tokenizer import decode, encode_rollout
from reft_jax.types import Example, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_PROGRAM = "no program compiles after the question"
NO_ROOM = "the question leaves no token for an answer"
NOT_PYTHON = "answer_cot is not Python"


def unanswerable(
    tok: PreTrainedTokenizerFast, examples: Sequence[Example], engine: str, max_len: int
) -> dict[str, str]:
    """{item_id: reason} of the questions whose every completion is graded as no answer.

    What is looked at is the text that grading sees: decoded from the prompt's ids, so that a tokenizer which changes
    quotes or spaces is found too. `max_len` are tokens of prompt and response.
    """
    reasons = {}
    for example in examples:
        ids = encode_rollout(tok, example.question, engine)
        if len(ids) >= max_len:
            reasons[example.item_id] = NO_ROOM
        elif engine == "python" and not can_begin_program(completion_text(decode(tok, ids))):
            reasons[example.item_id] = NO_PROGRAM
    return reasons


def can_begin_program(text: str) -> bool:
    """Whether `text` is the head of `solution` and a docstring, so that a program can follow."""
    match parsed(f"{text}\n    return 1"):
        case [ast.FunctionDef(name="solution", body=[first, ast.Return()])]:
            return is_text(first)
    return False


def unteachable(examples: Sequence[Example], engine: str) -> dict[str, str]:
    """{item_id: reason} of the rows whose worked program does not compile. Raises InputError as `sft_target` does."""
    targets = {example.item_id: sft_target(example, engine) for example in examples}
    return {item_id: NOT_PYTHON for item_id, text in targets.items() if engine == "python" and not parsed(text)}


def trainable(
    tok: PreTrainedTokenizerFast, examples: Sequence[Example], engine: str, max_dropped: float, source: str
) -> list[Example]:
    """The rows that training can use: those that can earn a reward, with a worked solution that is one.

    A line names the others. Raises InputError, naming `source`, if they are a larger share than `max_dropped`, or if a
    solution is of the other engine's kind. Length limits are looked at elsewhere.
    """
    try:
        reasons = unteachable(examples, engine)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    return leave_out(examples, reasons | unanswerable(tok, examples, engine, sys.maxsize), max_dropped, source)


def wrong_anyway(
    tok: PreTrainedTokenizerFast, examples: Sequence[Example], engine: str, max_len: int, split: str
) -> str:
    """One line that names the questions of an evaluation that no completion can answer; "" if there are none."""
    reasons = unanswerable(tok, examples, engine, max_len)
    told = f"{len(reasons)} of {len(examples)} {split} questions cannot be answered and count as wrong"
    return f"{told}: {named(reasons)}" if reasons else ""
