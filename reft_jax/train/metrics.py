"""What a run tells while it runs: numbers to a file and to TensorBoard, one line of progress to the terminal.

Where there are several hosts the first one writes and shows; the others' objects do nothing.
"""

import json
import math
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from reft_jax.parallel.compilation import compile_seconds
from reft_jax.parallel.hosts import is_first
from reft_jax.store import write_whole, writing
from reft_jax.types import InputError


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `folder/metrics.jsonl`, none if there is no such file; a null is left out.

    A last line cut short by a crash is left out as well. Raises InputError when any other line is not a JSON object
    of numbers with a step.
    """
    return [
        {name: value for name, value in line.items() if value is not None}
        for line in _read_lines(folder / "metrics.jsonl")
    ]


def _read_lines(path: Path) -> list[dict]:
    try:
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
        self._tb: TensorBoard | None = None  # made by the first write, when it is known whether the run resumes
        self._purge_step: int | None = None
        if is_first():
            with writing(self._path):
                folder.mkdir(parents=True, exist_ok=True)
                # By the line: a crash loses none written.
                self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values (anything `float` takes) of one step. Raises SaveError."""
        if self._file is None:
            return
        if self._tb is None:
            self._tb = TensorBoard(self._tb_folder, self._purge_step)
        line: dict[str, float | None] = {"step": int(step)}
        for name, value in values.items():
            number = float(value)
            line[name] = number if math.isfinite(number) else None
        self._tb.write(step, {name: float(value) for name, value in values.items()})
        with writing(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")

    def truncate_after(self, step: int) -> None:
        """Forgets every later step, for a run that resumes at `step` and writes them again; call it before `write`.

        A last line cut short by a crash is dropped as well. TensorBoard hides the later events of the older files.
        Raises InputError when any other line is not a JSON object of numbers with a step.
        """
        if self._file is None:
            return
        kept = [json.dumps(line) + "\n" for line in _read_lines(self._path) if line["step"] <= step]
        self._file.close()
        write_whole(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._purge_step = step + 1

    def close(self) -> None:
        """Raises SaveError."""
        try:
            if self._file is not None:
                with writing(self._path):
                    self._file.close()
        finally:
            if self._tb is not None:
                self._tb.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class TensorBoard:
    """A file of events, written by the caller: the library's own thread would die on a full disk, and the run with its
    queue full would wait for it for ever. Raises SaveError.
    """

    FLUSH_SECONDS = 30.0

    def __init__(self, folder: Path, purge_step: int | None):
        """`purge_step`: from here on the events of older files are hidden."""
        self._folder, self._flushed = folder, time.monotonic()
        # Nanoseconds: a quick restart would otherwise overwrite the file before.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{time.time_ns()}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(folder / name))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=int(step), wall_time=time.time(), summary=Summary(value=points)))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            with writing(self._folder):
                self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with writing(self._folder):
            self._file.close()

    def _write(self, event: Event) -> None:
        with writing(self._folder):
            self._file.write(event.SerializeToString())


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
