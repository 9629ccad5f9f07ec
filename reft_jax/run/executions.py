"""The audit log of a work directory: every graded completion, what became of its program, and what it earned.

`executions.jsonl.gz` is only ever appended to, one gzip member a batch: a crash can tear the last member, which the
next start cuts off when it first writes. A batch that a resumed run repeats is logged again, for it was executed again.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from reft_jax.parallel.hosts import is_first
from reft_jax.store import writing
from reft_jax.tasks.answers import judge
from reft_jax.types import Example, InputError, Verdict

LOG_NAME = "executions.jsonl.gz"
FIELDS = {"purpose", "item_id", "answer_value", "outcome", "ms", "value", "correct", "reward"}


def program_hash(text: str) -> str:
    """The first 16 hex digits of the completion's sha256."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def execution(purpose: str, example: Example, text: str, verdict: Verdict, ms: float) -> dict:
    """One line of the log. `purpose` says what the completion was for ("reft rollout"), `ms` is its program's time."""
    return {
        "purpose": purpose,
        "item_id": example.item_id,
        "answer_value": example.answer_value,
        "program": program_hash(text),
        "outcome": verdict.status,
        "ms": round(ms, 2),
        "value": verdict.value,
        "correct": verdict.correct,
        "reward": verdict.reward,
    }


class ExecutionLog:
    """Appends to the log of one work directory; where there are several hosts, the first one does."""

    def __init__(self, workdir: Path):
        """Raises InputError if the log is damaged in a way that no crash explains."""
        self.path = workdir / LOG_NAME
        self._whole = whole_bytes(self.path) if is_first() and self.path.exists() else None

    def append(self, executions: Iterable[dict]) -> None:
        """Writes one batch, if there is anything in it; it is on its way to the disk when this returns. SaveError."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in executions)
        if not text or not is_first():
            return
        with writing(self.path), self.path.open("ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
                self._whole = None
            file.write(gzip.compress(text.encode()))


def whole_bytes(path: Path) -> int:
    """Length of the file up to the end of its last whole gzip member; another may have been begun.

    Raises InputError if something else follows.
    """
    whole = 0
    with path.open("rb") as file:
        member, data = zlib.decompressobj(wbits=31), file.read(1 << 20)
        while data:
            try:
                member.decompress(data)
            except zlib.error as error:
                raise InputError(
                    f"{path}: damaged after byte {whole} ({error}); restore it from a copy, or move it away and a new "
                    "one begins"
                ) from error
            if not member.eof:
                data = file.read(1 << 20)
                continue
            data = member.unused_data
            whole = file.tell() - len(data)
            member = zlib.decompressobj(wbits=31)
            data = data or file.read(1 << 20)
    return whole


def read_executions(path: Path) -> Iterator[dict]:
    """The lines of the log; a torn end is left out. InputError if there is no log or a line is not one."""
    if not path.exists():
        raise InputError(f"{path}: no such file; nothing has been executed in this work directory yet")
    with path.open("rb") as file:
        whole = io.BytesIO(file.read(whole_bytes(path)))
    with gzip.open(whole, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                if not FIELDS <= found.keys():
                    raise ValueError("fields are missing")
            except (ValueError, AttributeError) as error:
                raise InputError(
                    f"{path}: line {number} is not an execution ({error}); restore it from a copy"
                ) from error
            yield found


def replay(workdir: Path) -> bool:
    """Grades every logged outcome again, prints what was executed for what, and says whether the log's verdicts hold.

    Needs the log alone: no model, no data, no program, no accelerator.
    """
    outcomes, times, correct = defaultdict(Counter), defaultdict(list), Counter()
    different = []
    for line in read_executions(workdir / LOG_NAME):
        purpose = line["purpose"]
        outcomes[purpose][line["outcome"]] += 1
        times[purpose].append(line["ms"])
        correct[purpose] += line["correct"]
        again = judge(line["value"], line["outcome"], Example(line["item_id"], "", line["answer_value"]))
        if (again.correct, again.reward) != (line["correct"], line["reward"]):
            different.append(f"{line['item_id']} ({purpose}): logged reward {line['reward']}, graded {again.reward}")
    for purpose, counted in outcomes.items():
        total, (p50, p99) = counted.total(), np.percentile(times[purpose], (50, 99))
        ended = ", ".join(f"{name} {number}" for name, number in counted.most_common())
        print(
            f"{purpose}: {total}, {correct[purpose] / total:.1%} correct, p50 {p50:.1f} ms, p99 {p99:.1f} ms; {ended}"
        )
    if not (total := sum(counted.total() for counted in outcomes.values())):
        raise InputError(
            f"{workdir / LOG_NAME}: holds no execution, so no verdict is shown to hold; restore it from a copy"
        )
    print(f"{total - len(different)} of {total} verdicts are what the log says")
    for line in different[:5]:
        print(f"  {line}")
    return not different
