"""What a person sees while a stage runs: how far it is, and remarks in between, on stderr.

With several hosts the first one shows them; the others' objects do nothing.
"""

import math
import sys
import time
from collections import deque
from datetime import timedelta

from reft_jax.parallel.compilation import compile_seconds
from reft_jax.parallel.hosts import is_first
from reft_jax.terminal import BLOCK

BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """Shows on stderr how far a stage is.

        progress = Progress("reft", total=400, unit="iteration", done0=120)  # resumed after 120
        progress.update(150, reward=0.5312, kl=0.0113)
        progress.close()

    On a terminal it is a part of the live block, two lines at most: a bar, then the numbers, with the course of the
    first one. Parts that do not fit are left out, the least important first:

        reft  ━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━  150/400 iterations  37 %  left 0:17:30
        reward 0.531 ▁▂▂▅▆█  kl 0.0113  4.2 s/iteration  elapsed 0:02:06

    When it is closed, its line stays. In a log file a new line appears at most every 15 seconds, and the last line
    always:

        sample  25600/131900 completions  19 %  left 0:05:40  correct 0.634  312 completions/s  elapsed 0:01:22

    Left, rate and elapsed count the work of this process, not the work before a resume (`done0`). Compile time is part
    of elapsed, but not of left and rate.
    """

    LOG_SECONDS = 15.0
    BAR, COURSE = (8, 40), 24  # characters: the shortest and longest bar, the longest course

    def __init__(self, stage: str, total: int, unit: str = "step", *, done0: int = 0, first: str = ""):
        """first: what happens until the first update, which may be minutes away ("compiling"). It is shown at once."""
        self._stage, self._unit, self._first = stage, unit, first
        self.total = total  # public, because it is an estimate where sampled tokens end a stage
        self._start, self._compiled, self._done0, self._done = time.monotonic(), compile_seconds(), done0, done0
        self._numbers: dict[str, float] = {}
        self._course: deque[float] = deque(maxlen=self.COURSE)
        self._shown, self._shown_at = "", -math.inf
        self._live = is_first() and BLOCK.possible()
        if self._live:
            BLOCK.add(self._part)
        elif first:
            self._show(f"{stage}  {done0}/{total} {unit}s  {first}")

    def update(self, done: int, **numbers: float) -> None:
        """Sets `done` of `total`, work before a resume included, and the two or three numbers worth watching."""
        self._done, self._numbers, self._first = done, numbers, ""
        first = next(iter(numbers.values()), math.nan)
        if math.isfinite(first):
            self._course.append(first)
        if not self._live and time.monotonic() - self._shown_at >= self.LOG_SECONDS:
            self._show(self._line())

    def close(self) -> None:
        """Shows the last line in full."""
        if self._live:
            BLOCK.remove(self._part)
        if self._line() != self._shown:
            self._show(self._line())

    def _show(self, line: str) -> None:
        self._shown, self._shown_at = line, time.monotonic()
        remark(line)

    def _line(self) -> str:
        where, numbers, pace = self._told()
        return "  ".join([self._stage, *where, *numbers, *pace])

    def _told(self) -> tuple[list[str], list[str], list[str]]:
        """How far it is, its numbers, and its pace."""
        done, left, rate, elapsed = self._done, "?", "?", time.monotonic() - self._start
        worked, seconds = done - self._done0, elapsed - (compile_seconds() - self._compiled)
        if worked > 0 and seconds > 0:
            per_second = worked / seconds
            left = clock((self.total - done) / per_second)
            rate = f"{per_second:.3g} {self._unit}s/s" if per_second >= 1 else f"{1 / per_second:.3g} s/{self._unit}"
        where = [f"{done}/{self.total} {self._unit}s", f"{100 * done // self.total} %", f"left {left}"]
        return where, [f"{name} {x:.3g}" for name, x in self._numbers.items()], [rate, f"elapsed {clock(elapsed)}"]

    def _part(self, width: int) -> list:
        """Its two lines of the live block, for rich."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        where, numbers, pace = self._told()
        if self._first:
            where, pace = [where[0], self._first], pace[1:]
        stage, (least, most) = self._stage[: width // 3], self.BAR
        while (room := width - len("  ".join([stage, *where])) - 2) < least and len(where) > 1:
            where = where[1:]
        if numbers and (bars := sparkline(self._course, width - len("  ".join([*numbers, *pace])) - 1)):
            numbers[0] += f" {bars}"
        top = Table.grid(padding=(0, 2, 0, 0))
        top.add_row(stage, ProgressBar(self.total, self._done, max(least, min(most, room))), "  ".join(where))
        top.columns[2].no_wrap = True
        return [top, Text("  ".join([*numbers, *pace]), no_wrap=True, overflow="ellipsis")]


def sparkline(values, most: int) -> str:
    """The course of the last `most` values, a character each; empty for less than two."""
    values = [*values][-most:] if most > 0 else []
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in values)


def remark(text: str) -> None:
    """Prints one line on stderr; on a terminal it appears above the live block."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:17:30."""
    return str(timedelta(seconds=round(seconds)))
