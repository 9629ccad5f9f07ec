"""The audit log of a work directory: every graded completion, how its program ended, and its reward.

`executions.jsonl.gz` is only appended to, one gzip member per batch. A crash can leave the last member incomplete; the
next start cuts it off before its first write. A resumed run executes the interrupted batch again, and logs it again.

The rollouts of reinforcement learning are logged when they are scored: their lines also say what was reinforced. If a
run ends before that, the log has no line of this rollout, and the resumed run samples the same completions again.
"""

import gzip
import io
import json
import math
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from reft_jax.parallel.hosts import is_first
from reft_jax.run.workdir import recorded
from reft_jax.store import short_hash, writing
from reft_jax.tasks.registry import load_task
from reft_jax.types import Example, InputError, Verdict

LOG_NAME = "executions.jsonl.gz"
FIELDS = {"purpose", "item_id", "answer_value", "outcome", "ms", "value", "correct", "reward"}


def execution(purpose: str, example: Example, text: str, verdict: Verdict, ms: float) -> dict:
    """One line of the log: `purpose` is what the completion was for ("reft rollout"), `ms` its program's run time.

    It has `parts` if the setting `reward` gave the reward.
    """
    return {
        "purpose": purpose,
        "item_id": example.item_id,
        "answer_value": example.answer_value,
        "program": short_hash(text),
        "outcome": verdict.status,
        "ms": round(ms, 2),
        "value": verdict.value,
        "correct": verdict.correct,
        "reward": verdict.reward,
    } | ({} if verdict.parts is None else {"parts": verdict.parts})


def reinforced(iteration: int, row: int, text: str, advantage: float, gap: float) -> dict:
    """What a line has besides in reinforcement learning, once the rollout is scored.

    row: the rollout's number in its iteration. advantage: the mean over its actions, before sampler_correction. gap:
    the largest |log π_trainer − log π_sampler| of its tokens, nats. NaN and infinity, which JSON does not have, are
    null.
    """
    numbers = {"advantage": advantage, "sampler_gap": gap}
    finite = {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in numbers.items()}
    return {"iteration": iteration, "row": row, "completion": text} | finite


class ExecutionLog:
    """Appends to the log of one work directory. With several hosts only the first one writes."""

    def __init__(self, workdir: Path):
        """Raises InputError if the log is damaged in a way that a crash does not explain."""
        self.path = workdir / LOG_NAME
        self._whole = whole_bytes(self.path) if is_first() and self.path.exists() else None

    def append(self, executions: Iterable[dict]) -> None:
        """Writes one batch, nothing if it is empty, and hands it to the operating system. Raises SaveError."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in executions)
        if not text or not is_first():
            return
        with writing(self.path), self.path.open("ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
                self._whole = None
            file.write(gzip.compress(text.encode()))


def whole_bytes(path: Path) -> int:
    """Bytes of the file up to the end of its last whole gzip member. An incomplete member may follow.

    Raises InputError if anything else follows.
    """
    return max((end for end, _ in _members(path)), default=0)


def _members(path: Path) -> Iterator[tuple[int, bytes]]:
    """(bytes of the file up to its end, content) of each whole gzip member; holds one at a time. InputError."""
    whole = 0
    with path.open("rb") as file:
        member, content, data = zlib.decompressobj(wbits=31), [], file.read(1 << 20)
        while data:
            try:
                content.append(member.decompress(data))
            except zlib.error as error:
                problem = f"{path}: damaged after byte {whole} ({error})"
                raise InputError(f"{problem}; restore it from a copy, or move it away to start a new one") from error
            if not member.eof:
                data = file.read(1 << 20)
                continue
            data = member.unused_data
            whole = file.tell() - len(data)
            yield whole, b"".join(content)
            member, content = zlib.decompressobj(wbits=31), []
            data = data or file.read(1 << 20)


def read_executions(path: Path) -> Iterator[dict]:
    """The lines of the log, without an incomplete end. InputError if there is no log, or a line is not an execution.

    Holds one batch at a time.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file; nothing has been executed in this work directory yet")
    lines = chain.from_iterable(io.BytesIO(content) for _, content in _members(path))
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if not FIELDS <= found.keys():
                raise ValueError("fields are missing")
        except (ValueError, AttributeError) as error:
            told = f"{path}: line {number} is not an execution ({error})"
            raise InputError(f"{told}; restore it from a copy") from error
        yield found


def replay(workdir: Path) -> bool:
    """Grade every logged outcome again, print counts and times by purpose, and return whether all verdicts are equal.

    Reads the log and the work directory's settings only: no model, no data, no program, no accelerator.
    """
    settings = recorded(workdir) or {}
    task = load_task(settings.get("task", ""), settings.get("data.reading", "strict"))
    outcomes, times, correct = defaultdict(Counter), defaultdict(list), Counter()
    different, own_rewards = [], 0
    for line in read_executions(workdir / LOG_NAME):
        purpose = line["purpose"]
        outcomes[purpose][line["outcome"]] += 1
        times[purpose].append(line["ms"])
        correct[purpose] += line["correct"]
        example = Example(line["item_id"], "", line["answer_value"])
        again = task.of(example.item_id).judge(line["value"], line["outcome"], example)
        if "parts" in line:  # the reward of a function of the user's, which needs the completion
            again = again._replace(reward=line["reward"])
            own_rewards += 1
        if (again.correct, again.reward) != (line["correct"], line["reward"]):
            different.append(f"{line['item_id']} ({purpose}): logged reward {line['reward']}, graded {again.reward}")
    for purpose, counted in outcomes.items():
        total, (p50, p99) = counted.total(), np.percentile(times[purpose], (50, 99))
        ends = ", ".join(f"{name} {number}" for name, number in counted.most_common())
        print(f"{purpose}: {total}, {correct[purpose] / total:.1%} correct, p50 {p50:.1f} ms, p99 {p99:.1f} ms; {ends}")
    if not (total := sum(counted.total() for counted in outcomes.values())):
        raise InputError(f"{workdir / LOG_NAME}: holds no execution, so nothing was checked; restore it from a copy")
    print(f"{total - len(different)} of {total} verdicts are what the log says")
    if own_rewards:
        print(f"{own_rewards} rewards are not checked: the setting `reward` gave them")
    for line in different[:5]:
        print(f"  {line}")
    return not different
