"""Questions from files and from the Hugging Face hub.

Our format is a JSON list of `{item_id, question, answer_value, answer_cot}`, the last absent in test files. Rows of
official GSM8K (`{question, answer}`, the answer ending in "#### 18") are converted on the way in. Everything a run
relies on is checked here, before a model is loaded.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from reft_jax import plugins
from reft_jax.store import read_text
from reft_jax.tasks.registry import PAPER, Task, plain_answer
from reft_jax.types import Example, InputError

Row = TypeVar("Row")
NAMED = 8  # items that a line names
HUB_SOURCE = re.compile(r"hub:(?P<repo>[^/:]+/[^/:]+)(/(?P<config>[^/:]+))?:(?P<split>.+)")


def load_examples(source: str | Path, task: Task = PAPER, *, need_cot: bool) -> list[Example]:
    """Read and check the questions of `source`, in file order.

    Args:
        source: a JSON file, a JSON-lines file (`.jsonl`), or `hub:owner/name:split` (`hub:owner/name/config:split` for
            a dataset with several configurations, `hub:openai/gsm8k/main:train`).
        task: what the questions ask for.
        need_cot: whether every row must have a worked solution.

    Raises InputError, naming file, row (from 0) and field, if the file cannot be read, a field is missing, blank or of
    the wrong type, a dataset is unknown, an `answer_value` is no answer of its task, or an `item_id` occurs twice.
    """
    source = str(source)
    rows = read_rows(source)
    examples = [_example(row, index, source, task, need_cot) for index, row in enumerate(rows)]
    first: dict[str, int] = {}
    for index, example in enumerate(examples):
        if first.setdefault(example.item_id, index) != index:
            raise InputError(
                f"{source}: row {index}, field 'item_id': {example.item_id!r} already stands in row "
                f"{first[example.item_id]}; give every row its own id"
            )
    return examples


def read_rows(source: str) -> list:
    """The rows of a file or of the hub, unchecked, at least one; `source` as in load_examples. Raises InputError."""
    rows = _hub_rows(source) if source.startswith("hub:") else _file_rows(source)
    if not isinstance(rows, list):
        raise InputError(f"{source}: holds {_json_name(rows)}, not a list; write the rows as a JSON list")
    if not rows:
        raise InputError(f"{source}: holds no rows; check how the file was made")
    return rows


def split_off(examples: Sequence[Example], rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out at least `rows` examples: (rest, held), each in the given order.

    Rows with the same question, apart from case and whitespace, go to the same side, so `held` may be a few rows
    larger. The choice is a function of the questions' text and the seed, not of the order or the number of rows.
    Raises InputError if no row would be left.
    """
    by_question = Counter(map(_question_key, examples))
    chosen, count = set(), 0
    for key in sorted(by_question, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        if count >= rows:
            break
        chosen.add(key)
        count += by_question[key]
    if count == len(examples):
        raise InputError(f"holding out {rows} of {len(examples)} rows leaves none to train on; hold out fewer")
    rest = [example for example in examples if _question_key(example) not in chosen]
    held = [example for example in examples if _question_key(example) in chosen]
    return rest, held


def shared_questions(examples: Sequence[Example], others: Sequence[Example]) -> int:
    """How many of `examples` ask a question that `others` ask too, apart from case and whitespace."""
    theirs = {_question_key(example) for example in others}
    return sum(_question_key(example) in theirs for example in examples)


def fit(rows: Sequence[Row], lengths: Sequence[int], limit: int, max_dropped: float, what: str) -> list[Row]:
    """Return the rows of at most `limit` tokens, and print a line that counts the others; no row is ever cut.

    `what` is the setting that holds the limit, `max_dropped` the share of rows that may be dropped. Raises InputError
    if more rows are too long, or if none is left.
    """
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= limit]
    dropped = len(rows) - len(kept)
    if dropped > max_dropped * len(rows) or not kept:
        raise InputError(
            f"{what}={limit}: {dropped} of {len(rows)} rows are longer (the longest has {max(lengths, default=0)} "
            f"tokens) and at most {max_dropped:.1%} may be dropped; raise {what} or shorten the data"
        )
    if dropped:
        print(f"{what}={limit}: {dropped} of {len(rows)} rows are longer and left out", flush=True)
    return kept


def leave_out(examples: Sequence[Example], reasons: dict[str, str], max_dropped: float, source: str) -> list[Example]:
    """Return the examples without a reason (by item_id) to be left out of training, and print a line about the others.

    Raises InputError if the others are a larger share than `max_dropped`, or all.
    """
    kept = [example for example in examples if example.item_id not in reasons]
    if not reasons:
        return kept
    told = f"{source}: {len(reasons)} of {len(examples)} rows cannot earn a reward or be taught: {named(reasons)}"
    if len(reasons) > max_dropped * len(examples) or not kept:
        raise InputError(f"{told}; at most {max_dropped:.1%} (data.max_dropped) may be left out: correct the file")
    print(f"{told}; they are left out of training", flush=True)
    return kept


def named(reasons: dict[str, str]) -> str:
    """The items with their reason: "svamp_3, svamp_8 (no program compiles after the question)"."""
    by_reason: dict[str, list[str]] = {}
    for item_id, reason in reasons.items():
        by_reason.setdefault(reason, []).append(item_id)
    told = [f"{', '.join(ids[:NAMED])}{', …' * (len(ids) > NAMED)} ({reason})" for reason, ids in by_reason.items()]
    return "; ".join(told)


def _question_key(example: Example) -> str:
    return " ".join(example.question.lower().split())


def _file_rows(source: str) -> object:
    text = read_text(source)
    if not text.strip():
        raise InputError(f"{source}: is empty; check how the file was made")
    if source.endswith(".jsonl") and not text.lstrip().startswith("["):
        # not splitlines(): a JSON string may hold U+2028 and similar characters
        return [_parse(line, source, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _parse(text, source, 1)


def _parse(text: str, source: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{source}: not JSON at line {line}, column {error.colno} ({error.msg}); correct it, or name a file with "
            "one JSON object per line *.jsonl"
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets nested too deep
        why = str(error).partition(";")[0]
        raise InputError(f"{source}: cannot be read as JSON from line {first_line} on ({why}); correct it") from error


def _hub_rows(source: str) -> list[dict]:
    match = HUB_SOURCE.fullmatch(source)
    if not match:
        raise InputError(f"{source}: not of the form hub:owner/name:split or hub:owner/name/config:split; correct it")
    plugins.show_torch()  # without it this library's own import fails where PyTorch is installed
    import datasets  # takes seconds, and a local file does not need it

    try:
        return datasets.load_dataset(match["repo"], match["config"], split=match["split"]).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{source}: cannot be loaded ({reason}); check the name and the network") from error


def _example(row: object, index: int, source: str, task: Task, need_cot: bool) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{source}: row {index} is {_json_name(row)}; make it an object with item_id, question, ...")
    if "answer" in row and not {"item_id", "answer_value"} & row.keys():
        row = _from_official(row, index, source)
    value = row.get("answer_value")
    if isinstance(value, int | float) and not isinstance(value, bool):
        row = row | {"answer_value": str(value)}
    for field in ("item_id", "question", "answer_value"):
        check_text(row, field, index, source)
    if need_cot or row.get("answer_cot"):
        check_text(row, "answer_cot", index, source)
    try:
        task = task.of(row["item_id"])
    except InputError as error:
        raise InputError(f"{source}: row {index}, field 'item_id': {error}") from error
    if task.target(row["answer_value"]) is None:
        commas = task.want == "number" and "," in row["answer_value"]
        allowed = task.allowed + ", commas only between groups of thousands" * commas
        raise InputError(
            f"{source}: row {index}, field 'answer_value': {row['answer_value']!r} is not {allowed}, as {task.name} "
            "answers are; correct the value or the prefix of item_id"
        )
    return Example(row["item_id"], row["question"], row["answer_value"], row.get("answer_cot") or None)


def _from_official(row: dict, index: int, source: str) -> dict:
    """A row of official GSM8K in our format: the answer after "####", the calculator marks <<48/2=24>> removed."""
    check_text(row, "answer", index, source)
    cot, marker, value = row["answer"].rpartition("####")
    if not marker:
        raise InputError(
            f"{source}: row {index}, field 'answer': has no '####' before the result, as GSM8K's rows have; add it, or "
            "give item_id and answer_value"
        )
    return {
        "item_id": f"gsm8k_{index}",
        "question": row.get("question"),
        "answer_value": plain_answer(value),
        "answer_cot": re.sub(r"<<.*?>>", "", cot).strip(),
    }


def check_text(row: dict, field: str, index: int, source: str) -> None:
    """Raises InputError, naming file, row and field, unless the field is text that is not blank."""
    value, where = row.get(field), f"{source}: row {index}, field '{field}'"
    if value is None:
        raise InputError(f"{where}: is missing; add it")
    if not isinstance(value, str):
        raise InputError(f"{where}: is {_json_name(value)}, not a string; put it in quotes")
    if not value.strip():
        raise InputError(f"{where}: is blank; fill it in or leave the row out")
    if re.search("[\ud800-\udfff]", value):
        raise InputError(f"{where}: has half a surrogate pair, which is not text; correct the escape \\ud...")


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
