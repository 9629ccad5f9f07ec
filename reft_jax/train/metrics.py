"""The numbers of a stage in its folder, one JSON object per line. Resuming and the curves read them.

A line is {"step": 12, "reward": 0.53, "kl": 0.011}: numbers only. NaN and infinity, which JSON does not have, are null.
"""

import json
import math
from pathlib import Path
from typing import Any

from reft_jax.store import reading, write_whole, writing
from reft_jax.types import InputError

FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `folder/metrics.jsonl`, none if there is no such file; nulls are left out.

    An incomplete last line, as a crash leaves it, is left out too. Raises InputError if any other line is not a JSON
    object of numbers with a step.
    """
    return [{name: value for name, value in line.items() if value is not None} for line in _read_lines(folder / FILE)]


def _read_lines(path: Path) -> list[dict]:
    try:
        with reading(path):
            lines, found = path.read_bytes().splitlines() if path.exists() else [], []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it from a copy or remove it") from error
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            numbers = [line["step"], *(value for value in line.values() if value is not None)]
            if not all(type(number) in (int, float) for number in numbers):
                raise TypeError
            found.append(line)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise InputError(
                    f"{path}: line {number} is not a JSON object of numbers with a step; repair or remove it"
                ) from error
    return found


class JsonLines:
    """The tracker `jsonl` (see trackers.py): `metrics.jsonl` in the stage's folder. Raises SaveError."""

    def __init__(self, folder: Path):
        self._path = folder / FILE

    def open(self, run_id: str, config: dict[str, Any]) -> None:
        with writing(self._path):
            self._append()

    def _append(self) -> None:
        # Buffered by the line, so that a crash loses no line.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        line = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        with writing(self._path):
            self._file.write(json.dumps({"step": step} | line, allow_nan=False) + "\n")

    def rewind(self, step: int) -> None:
        """Removes the lines of later steps, and an incomplete last line. InputError as in `read_metrics`."""
        kept = [json.dumps(line) + "\n" for line in _read_lines(self._path) if line["step"] <= step]
        self._file.close()
        write_whole(self._path, "".join(kept))
        self._append()

    def file(self, path: Path) -> None:
        pass  # the file is in the work directory already

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
