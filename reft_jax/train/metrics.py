"""What a run tells while it runs: numbers to a file and to TensorBoard, one line of progress to the terminal.

Where there are several hosts the first one writes and shows; the others' objects do nothing.
"""

import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

from tensorboardX import SummaryWriter

from reft_jax.parallel.compilation import compile_seconds
from reft_jax.parallel.hosts import is_first
from reft_jax.types import InputError


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `folder/metrics.jsonl`, none if there is no such file; a null is left out."""
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


class MetricsWriter:
    """Appends a JSON object a line to `folder/metrics.jsonl` and the same numbers as TensorBoard events to `folder/tb`.

        with MetricsWriter(workdir) as metrics:
            metrics.truncate_after(restored_step)  # when resuming
            metrics.write(step, {"reward": reward, "kl": kl})

    A line is {"step": 12, "reward": 0.53, "kl": 0.011}: numbers only. NaN and infinity, which JSON does
    not have, become null there and stay what they are in TensorBoard.
    """

    def __init__(self, folder: Path):
        self._path, self._file = folder / "metrics.jsonl", None
        self._tb_folder = folder / "tb"
        self._tb: SummaryWriter | None = None  # made by the first write, when it is known whether the run resumes
        self._purge_step: int | None = None
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8", buffering=1)  # by the line: a crash loses none written

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values (anything `float` takes) of one step."""
        if self._file is None:
            return
        if self._tb is None:
            # The library names files by the second: without a suffix a quick restart would overwrite the one before.
            suffix = f".{time.time_ns()}"
            self._tb = SummaryWriter(
                str(self._tb_folder), purge_step=self._purge_step, flush_secs=30, filename_suffix=suffix
            )
        line: dict[str, float | None] = {"step": int(step)}
        for name, value in values.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else None
            self._tb.add_scalar(name, number, step)
        self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Forgets every later step, for a run that resumes at `step` and writes them again; call it before `write`.

        A last line cut short by a crash is dropped as well. TensorBoard hides the later events of the older files.
        Raises InputError when any other line is not a JSON object with a step.
        """
        if self._file is None:
            return
        kept = []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):
                    raise InputError(
                        f"{self._path}: line {number} is not a JSON object with a step; repair or remove it"
                    ) from error
        self._file.close()
        whole = self._path.with_suffix(".tmp")
        whole.write_text("".join(kept), encoding="utf-8")
        os.replace(whole, self._path)
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._purge_step = step + 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tb is not None:
            self._tb.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Progress:
    """One line to stderr that says how far a stage is.

        progress = Progress("reft", total=400, unit="iteration", done0=120)  # 120: resumed there
        progress.update(150, reward=0.5312, kl=0.0113)
        progress.close()

    On a terminal the line rewrites itself, at most 5 times a second and cut to the terminal's width:

        reft  150/400 iterations  37 %  left 0:17:30  reward 0.531  kl 0.0113  4.2 s/iteration  elapsed 0:02:06

    Without one (a log file) a new line appears at most every 15 seconds, and the last one always:

        sample  25600/131900 completions  19 %  left 0:05:40  correct 0.634  312 completions/s  elapsed 0:01:22

    Left, rate and elapsed are of this run's work: what was done before a resume (`done0`) does not count. The time
    that compiling took is in elapsed, not in left and rate.
    """

    TERMINAL_SECONDS, LOG_SECONDS = 0.2, 15.0

    def __init__(self, stage: str, total: int, unit: str = "step", *, done0: int = 0):
        self._stage, self._total, self._unit = stage, total, unit
        self._terminal = sys.stderr.isatty()
        self._interval = self.TERMINAL_SECONDS if self._terminal else self.LOG_SECONDS
        self._start, self._compiled, self._done0, self._done = time.monotonic(), compile_seconds(), done0, done0
        self._shown_at = -math.inf
        self._line = self._shown = self._format(0.0, {})

    def say(self, what: str) -> None:
        """Shows the line at once and what is done now, as "compiling": it may be minutes until the next update."""
        if is_first():
            self._line = f"{self._stage}  {self._done}/{self._total} {self._unit}s  {what}"
            self._show(time.monotonic())

    def update(self, done: int, **numbers: float) -> None:
        """`done` of `total` (work before a resume included), and the two or three numbers worth watching."""
        if not is_first():
            return
        now, self._done = time.monotonic(), done
        self._line = self._format(now - self._start, numbers)
        if now - self._shown_at >= self._interval:
            self._show(now)

    def _show(self, now: float) -> None:
        self._shown_at, self._shown = now, self._line
        if self._terminal:
            self._rewrite(self._line[: shutil.get_terminal_size().columns - 1])
        else:
            print(self._line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends with the last line in full."""
        if not is_first():
            return
        if self._terminal:
            self._rewrite(self._line + "\n")
        elif self._line != self._shown:
            print(self._line, file=sys.stderr, flush=True)

    def _rewrite(self, text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)  # back to the start, erase to the end

    def _format(self, elapsed: float, numbers: dict[str, float]) -> str:
        done, left, rate = self._done, "?", "?"
        worked, seconds = done - self._done0, elapsed - (compile_seconds() - self._compiled)
        if worked > 0 and seconds > 0:
            per_second = worked / seconds
            left = _clock((self._total - done) / per_second)
            rate = f"{per_second:.3g} {self._unit}s/s" if per_second >= 1 else f"{1 / per_second:.3g} s/{self._unit}"
        # What a narrow terminal cuts off stands last.
        parts = [self._stage, f"{done}/{self._total} {self._unit}s", f"{100 * done // self._total} %", f"left {left}"]
        parts += [f"{name} {value:.3g}" for name, value in numbers.items()]
        return "  ".join([*parts, rate, f"elapsed {_clock(elapsed)}"])


def remark(text: str) -> None:
    """A line of its own on stderr, in the place of a progress line that stands there and comes again."""
    if is_first():
        print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
