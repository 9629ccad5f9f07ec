"""Official GSM8K rows (`question`, `answer` with calculator marks, "#### 18") as training rows of both engines."""

import re
from typing import NamedTuple

from reft_jax.task.answers import read_target
from reft_jax.task.datasets import check_text
from reft_jax.task.derivation import Underivable, derive
from reft_jax.task.equations import plain_text
from reft_jax.task.naming import Unnameable
from reft_jax.task.program_rules import broken_rules
from reft_jax.task.programs import write_program
from reft_jax.task.prompts import plain_answer
from reft_jax.types import Example, InputError

TRIES = 4  # derivations of one row, the likeliest first


class Official(NamedTuple):
    """One row as published; `answer_value` is what stands behind "####", commas removed."""

    item_id: str
    question: str
    answer: str
    answer_value: str


class Conversion(NamedTuple):
    """The program of a row, or None and the reason why there is none."""

    program: str | None
    reason: str


def read_official(source: str, published: list) -> list[Official]:
    """The rows that `source` holds. InputError, naming line (or row) and field, if one is no official row."""
    rows = []
    for index, row in enumerate(published):
        if not isinstance(row, dict):
            raise InputError(f"{source}: {_place(source, index)} is no object; make it one with question and answer")
        for field in ("question", "answer"):
            try:
                check_text(row, field, index, source)
            except InputError as error:
                raise InputError(str(error).replace(f"row {index}", _place(source, index), 1)) from error
        _, marker, value = row["answer"].rpartition("####")
        value = plain_answer(value)
        if not marker or read_target("gsm8k", value) is None:
            raise InputError(
                f"{source}: {_place(source, index)}, field 'answer': does not end in '#### ' and a number, as GSM8K's "
                "rows do; correct it, or convert the file as the dataset it belongs to"
            )
        rows.append(Official(f"gsm8k_{index}", row["question"].strip(), row["answer"].strip(), value))
    return rows


def _place(source: str, index: int) -> str:
    """Where row `index` stands: its line, in a file with a row a line."""
    if not source.endswith(".jsonl"):
        return f"row {index}"
    with open(source, encoding="utf-8") as file:
        return f"line {[number for number, line in enumerate(file, 1) if line.strip()][index]}"


def nl_example(row: Official) -> Example:
    """The row for the engine `nl`: the solution without its marks."""
    return Example(row.item_id, row.question, row.answer_value, plain_text(row.answer))


def nl_problem(example: Example) -> str:
    """Why a solution in words cannot be used; "" if it can."""
    if not example.answer_cot:
        return "no solution before '####'"
    if re.search(r"<<|>>|####", example.answer_cot):
        return "a calculator mark that does not close"
    return ""


def convert_row(row: Official) -> Conversion:
    """A program that keeps the rules of program_rules.py. It still has to be executed: nothing here runs it."""
    if row.question.endswith('"') or '"""' in row.question or "\\" in row.question:
        return Conversion(None, "the question cannot stand in a docstring")
    reason = "no derivation"
    try:
        for plan, _ in zip(derive(row.question, row.answer, float(row.answer_value)), range(TRIES), strict=False):
            program = write_program(row.question, row.answer, plan)
            broken = broken_rules(program, row.question, row.answer)
            if not broken:
                return Conversion(program, "")
            reason = f"breaks a rule: {broken[0]}"
    except Underivable as error:
        reason = str(error)
    except Unnameable as error:
        reason = f"no name of its own for another {error}"
    return Conversion(None, reason)
