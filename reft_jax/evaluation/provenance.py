"""What made a sample file, and what of it may be used again.

The first line of a file is its header. Its `made_by` decides about the answers: they are used again only if it is
equal, and each of them only for the same question and answer. What is not, is never mixed with what is new: it moves to
`aside/` beside the file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

from reft_jax.evaluation.records import SCHEMA, read_file
from reft_jax.store import write_whole, writing
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import Example

ASIDE = "aside"


class MadeBy(NamedTuple):
    """What makes the answers of a file: its kind (evaluation/records.py), what must be equal for them to be used
    again, what is only recorded (versions, commit, n, rows, …), both JSON, and the task that reads them."""

    kind: str
    identity: dict
    recorded: dict
    task: Task = PAPER

    def header(self) -> dict:
        return {"schema": SCHEMA, "kind": self.kind, "made_by": self.identity, "recorded": self.recorded}


class Stored(NamedTuple):
    """What a file has of the examples asked for.

    records: by item_id, those that may be used. others: records that were not asked for and stay in the file.
    refused: why the file cannot be used at all, "" if it can. changed: items that are stored with another question or
    answer, or that do not fit. headers: the file's. recorded: what they recorded otherwise, in words.
    repeats: whether a question stands there twice, the second time with more samples.
    """

    records: dict[str, dict]
    others: list[dict]
    refused: str
    changed: list[str]
    headers: list[dict]
    recorded: str
    repeats: bool


def examples_checksum(examples: Sequence[Example]) -> str:
    """16 hex digits of questions, answers and solutions, in their order."""
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]


def stored(
    path: Path, made_by: MadeBy, examples: Sequence[Example], fits: Callable[[dict], bool] = lambda record: True
) -> Stored:
    """What the file at `path` has of `examples`; nothing is written. InputError if it is not a sample file.

    fits: whether a record, of the right question, is of use.
    """
    if not path.exists():
        return Stored({}, [], "", [], [], "", False)
    file = read_file(path, made_by.kind, made_by.task)
    if reason := _differs(file.headers, made_by) if file.headers or file.records else "":
        return Stored({}, [], reason, [], [], "", False)
    asked = {example.item_id: (example.question, example.answer_value) for example in examples}
    records, others, changed = {}, [], []
    for record in file.records:
        item_id = record["item_id"]
        if item_id not in asked:
            others.append(record)
        elif (record.get("question"), record.get("answer_value")) == asked[item_id] and fits(record):
            records[item_id] = record
        else:
            changed.append(item_id)
    return Stored(records, others, "", changed, file.headers, _recorded(file.headers, made_by), file.repeats)


def _differs(headers: list[dict], made_by: MadeBy) -> str:
    if not headers:
        return "it does not say what made it"
    for header in headers:
        if header["kind"] != made_by.kind:
            return f"it is of the kind {header['kind']!r}"
        before, now = header["made_by"], made_by.identity
        changed = [key for key in now | before if before.get(key) != now.get(key)]
        if told := [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed]:
            return f"its answers were made by something else ({'; '.join(told)})"
    return ""


def _recorded(headers: list[dict], made_by: MadeBy) -> str:
    """Versions and limits that differ from the newest header's."""
    if not headers:
        return ""
    both = headers[-1]["recorded"], made_by.recorded
    before, now = (one.get("versions", {}) | one.get("limits", {}) for one in both)
    return "; ".join(f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key])


def make_ready(
    path: Path, made_by: MadeBy, examples: Sequence[Example], fits: Callable[[dict], bool] = lambda record: True
) -> Stored:
    """Takes what may not be used out of the file at `path`, and says so in a line; the old file is kept in ASIDE.

    Returns what `stored` then gives.
    """
    found, total = stored(path, made_by, examples, fits), f"{len(examples)} question{'s' * (len(examples) != 1)}"
    if found.refused:
        line = f"{path}: {found.refused}; moved to {_aside(path)}, all {total} are done again"
    elif found.changed:
        kept = _aside(path, copy=True)
        line = (
            f"{path}: {len(found.changed)} of {total} are not as they are stored (the first is {found.changed[0]!r}); "
            f"done again, the old file is {kept}"
        )
    else:
        line = ""
        if found.recorded:
            _tell_versions(path.parent, found.recorded)
    if found.changed or found.repeats:
        rewrite(path, found.headers, [*found.records.values(), *found.others])
    if line:
        print(line, flush=True)
    return found._replace(refused="", changed=[], repeats=False)


@cache
def _tell_versions(folder: Path, recorded: str) -> None:
    """Once, not once per file."""
    print(f"{folder}: has answers made with other versions ({recorded}); last bits may differ", flush=True)


def _aside(path: Path, *, copy: bool = False) -> Path:
    folder = path.parent / ASIDE
    name, _, suffixes = path.name.partition(".")
    number = 1
    while (place := folder / f"{name}.{number}.{suffixes}").exists():
        number += 1
    with writing(place):
        folder.mkdir(exist_ok=True)
        (shutil.copy if copy else os.rename)(path, place)
    return place


def rewrite(path: Path, headers: Sequence[dict], records: Sequence[dict]) -> None:
    """Replaces the file in one go. SaveError."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in (*headers, *records)))


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file, open at the end of its last whole line. It is written by the line: a crash loses none. SaveError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _end_line(path)
        with path.open("a", encoding="utf-8", buffering=1) as file:
            yield file


def _end_line(path: Path) -> None:
    """Cuts off a torn last line; ends one that is whole but for its newline."""
    with path.open("rb+") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(len(data) - len(tail))
        else:
            file.write(b"\n")
