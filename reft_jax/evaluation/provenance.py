"""Records what made a sample file, and decides which of its answers may be used again.

The first line of a file is its header. The answers are used again only if the header's `made_by` is equal to that of
the run, and each answer only for the same question and reference answer. Answers that may not be used are never mixed
with new ones: the old file is kept in the folder `aside/` next to it.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple, TextIO

from reft_jax import store
from reft_jax.evaluation.records import SCHEMA, read_file
from reft_jax.store import short_hash, write_whole, writing
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import Example

ASIDE = "aside"
Fits = Callable[[dict], bool]  # whether a record of the right question can be used


class MadeBy(NamedTuple):
    """What made the answers of a file, as JSON values.

    kind: the file's kind (evaluation/records.py). identity: what must be equal for the answers to be used again.
    recorded: what is only written down (versions, commit, n, rows, …).
    """

    kind: str
    identity: dict
    recorded: dict
    task: Task = PAPER

    def header(self) -> dict:
        return {"schema": SCHEMA, "kind": self.kind, "made_by": self.identity, "recorded": self.recorded}


class Stored(NamedTuple):
    """What a file holds for the examples of a run.

    records: the usable ones, by item_id. others: records of other questions, which stay in the file.
    refused: why the file cannot be used at all; "" if it can. changed: items that are stored with another question or
    answer, or that do not fit. headers: those of the file. recorded: in words, how what they recorded differs.
    repeats: whether the file has a question twice, the second time with more samples.
    """

    records: dict[str, dict]
    others: list[dict]
    refused: str
    changed: list[str]
    headers: list[dict]
    recorded: str
    repeats: bool


def anything(record: dict) -> bool:
    """Every record fits."""
    return True


def examples_checksum(examples: Sequence[Example]) -> str:
    """A checksum (16 hex digits) of questions, answers and solutions, in their order."""
    return short_hash(json.dumps(examples))


def stored(path: Path, made_by: MadeBy, examples: Sequence[Example], fits: Fits = anything) -> Stored:
    """Reads what the file at `path` holds for `examples`; writes nothing. Raises InputError if it is no sample file."""
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
    """Says why answers with these headers may not be used; "" if they may."""
    if not headers:
        return "it does not say what made it"
    for header in headers:
        if header["kind"] != made_by.kind:
            return f"its kind is {header['kind']!r}, not {made_by.kind!r}"
        before, now = header["made_by"], made_by.identity
        changed = [key for key in now | before if before.get(key) != now.get(key)]
        if told := [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed]:
            return f"its answers were made by something else ({'; '.join(told)})"
    return ""


def _recorded(headers: list[dict], made_by: MadeBy) -> str:
    """Says which versions and limits differ from those of the newest header; "" if none."""
    if not headers:
        return ""
    both = headers[-1]["recorded"], made_by.recorded
    before, now = (one.get("versions", {}) | one.get("limits", {}) for one in both)
    return "; ".join(f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key])


def make_ready(path: Path, made_by: MadeBy, examples: Sequence[Example], fits: Fits = anything) -> Stored:
    """Removes from the file at `path` what may not be used, and prints one line about it; keeps the old file in ASIDE.

    Returns what `stored` then returns. Raises InputError and SaveError.
    """
    found, total = stored(path, made_by, examples, fits), f"{len(examples)} question{'s' * (len(examples) != 1)}"
    if found.refused:
        print(f"{path}: {found.refused}; moved to {_aside(path)}, all {total} are done again", flush=True)
    elif found.changed:
        first, kept = found.changed[0], _aside(path, copy=True)
        told = f"{len(found.changed)} of {total} differ from the stored ones (the first is {first!r})"
        print(f"{path}: {told}; they are done again, the old file is {kept}", flush=True)
    elif found.recorded:
        _tell_versions(path.parent, found.recorded)
    if found.changed or found.repeats:
        rewrite(path, found.headers, [*found.records.values(), *found.others])
    return found._replace(refused="", changed=[], repeats=False)


@cache
def _tell_versions(folder: Path, recorded: str) -> None:
    """Prints the line about other versions once per folder, not once per file."""
    print(f"{folder}: has answers made with other versions ({recorded}); last bits may differ", flush=True)


def _aside(path: Path, *, copy: bool = False) -> Path:
    """Moves or copies a file to a new name in ASIDE; returns that path."""
    folder = path.parent / ASIDE
    name, _, suffixes = path.name.partition(".")
    places = (folder / f"{name}.{number}.{suffixes}" for number in count(1))
    place = next(place for place in places if not place.exists())
    with writing(place):
        folder.mkdir(exist_ok=True)
        store.copy(path, place) if copy else path.rename(place)
    return place


def rewrite(path: Path, headers: Sequence[dict], records: Sequence[dict]) -> None:
    """Replaces the file in one go. Raises SaveError."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in (*headers, *records)))


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """Opens the file at the end of its last whole line. Every line is written at once: a crash loses no finished line.

    Raises SaveError.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _end_line(path)
        with path.open("a", encoding="utf-8", buffering=1) as file:
            yield file


def _end_line(path: Path) -> None:
    """Cuts off a torn last line; adds the newline if only that is missing."""
    with path.open("rb+") as file:
        data = file.read()
        tail = data[data.rfind(b"\n") + 1 :]
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(len(data) - len(tail))
        else:
            file.write(b"\n")
