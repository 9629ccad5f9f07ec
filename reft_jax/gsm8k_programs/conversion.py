"""Converts one official GSM8K row into a training row: a program derived from its solution, or the solution as text."""

import re
from typing import NamedTuple

from reft_jax.gsm8k_programs.derivation import Underivable, derive
from reft_jax.gsm8k_programs.equations import plain_text
from reft_jax.gsm8k_programs.naming import Unnameable
from reft_jax.gsm8k_programs.program_rules import broken_rules
from reft_jax.gsm8k_programs.programs import write_program
from reft_jax.types import Example

TRIES = 4  # the most derivations that are tried per row, the likeliest first


class Official(NamedTuple):
    """One row as published; `answer_value` is the text after "####", without commas."""

    item_id: str
    question: str
    answer: str
    answer_value: str


class Conversion(NamedTuple):
    """The program of a row; or None, and the reason."""

    program: str | None
    reason: str


def nl_example(row: Official) -> Example:
    """The row in the answer format `nl`: the solution without its calculator marks."""
    return Example(row.item_id, row.question, row.answer_value, plain_text(row.answer))


def nl_problem(example: Example) -> str:
    """Says why a solution in words cannot be used; "" if it can."""
    if not example.answer_cot:
        return "no solution before '####'"
    if re.search(r"<<|>>|####", example.answer_cot):
        return "a calculator mark that does not close"
    return ""


def convert_row(row: Official) -> Conversion:
    """Derives a program that keeps the rules of program_rules.py. It does not run it: the caller must do that."""
    if row.question.endswith('"') or '"""' in row.question or "\\" in row.question:
        return Conversion(None, "a docstring cannot hold the question")
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
        reason = f"no different name is left for another {error}"
    return Conversion(None, reason)
