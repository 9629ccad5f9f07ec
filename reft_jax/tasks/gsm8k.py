"""Reads official GSM8K rows: `question`, and `answer` with calculator marks and "#### 18" at its end."""

from reft_jax.gsm8k_programs.conversion import Official
from reft_jax.store import read_text
from reft_jax.tasks.datasets import check_text
from reft_jax.tasks.registry import TASKS, plain_answer
from reft_jax.types import InputError


def read_official(source: str, published: list) -> list[Official]:
    """The rows of `source`. InputError, naming line (or row) and field, if one is not an official row."""
    rows = []
    for index, row in enumerate(published):
        if not isinstance(row, dict):
            raise InputError(f"{source}: {_place(source, index)} is not an object; give it question and answer")
        for field in ("question", "answer"):
            try:
                check_text(row, field, index, source)
            except InputError as error:
                raise InputError(str(error).replace(f"row {index}", _place(source, index), 1)) from error
        _, marker, value = row["answer"].rpartition("####")
        value = plain_answer(value)
        if not marker or TASKS["gsm8k"].target(value) is None:
            raise InputError(
                f"{source}: {_place(source, index)}, field 'answer': does not end in '#### ' and a number, as GSM8K's "
                "rows do; correct it, or convert the file as the dataset that it belongs to"
            )
        rows.append(Official(f"gsm8k_{index}", row["question"].strip(), row["answer"].strip(), value))
    return rows


def _place(source: str, index: int) -> str:
    """Where row `index` is, in words: its line in a file with one row per line, else its number."""
    if not source.endswith(".jsonl"):
        return f"row {index}"
    lines = read_text(source).split("\n")
    return f"line {[number for number, line in enumerate(lines, 1) if line.strip()][index]}"
