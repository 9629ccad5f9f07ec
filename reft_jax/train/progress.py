"""What a person sees while a stage runs: one line of progress, and remarks in between, on stderr.

With several hosts the first one shows them; the others' objects do nothing.
"""

import math
import shutil
import sys
import time
from datetime import timedelta

from reft_jax.parallel.compilation import compile_seconds
from reft_jax.parallel.hosts import is_first


class Progress:
    """One line on stderr that shows how far a stage is.

        progress = Progress("reft", total=400, unit="iteration", done0=120)  # resumed after 120
        progress.update(150, reward=0.5312, kl=0.0113)
        progress.close()

    On a terminal the line is rewritten in place, at most 5 times per second, and cut to the terminal's width:

        reft  150/400 iterations  37 %  left 0:17:30  reward 0.531  kl 0.0113  4.2 s/iteration  elapsed 0:02:06

    In a log file a new line appears at most every 15 seconds, and the last line always:

        sample  25600/131900 completions  19 %  left 0:05:40  correct 0.634  312 completions/s  elapsed 0:01:22

    Left, rate and elapsed count the work of this process, not the work before a resume (`done0`). Compile time is part
    of elapsed, but not of left and rate.
    """

    TERMINAL_SECONDS, LOG_SECONDS = 0.2, 15.0

    def __init__(self, stage: str, total: int, unit: str = "step", *, done0: int = 0, first: str = ""):
        """first: what happens until the first update, which may be minutes away ("compiling"). It is shown at once."""
        self._stage, self._total, self._unit = stage, total, unit
        self._terminal = sys.stderr.isatty()
        self._interval = self.TERMINAL_SECONDS if self._terminal else self.LOG_SECONDS
        self._start, self._compiled, self._done0, self._done = time.monotonic(), compile_seconds(), done0, done0
        self._shown_at = -math.inf
        self._line = self._shown = self._format(0.0, {})
        if first and is_first():
            self._line = f"{stage}  {done0}/{total} {unit}s  {first}"
            self._show(time.monotonic())

    def update(self, done: int, **numbers: float) -> None:
        """Sets `done` of `total`, work before a resume included, and the two or three numbers worth watching."""
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
        """Shows the last line in full."""
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
            left = clock((self._total - done) / per_second)
            rate = f"{per_second:.3g} {self._unit}s/s" if per_second >= 1 else f"{1 / per_second:.3g} s/{self._unit}"
        # A narrow terminal cuts off the end, so the least important parts are last.
        parts = [self._stage, f"{done}/{self._total} {self._unit}s", f"{100 * done // self._total} %", f"left {left}"]
        parts += [f"{name} {value:.3g}" for name, value in numbers.items()]
        return "  ".join([*parts, rate, f"elapsed {clock(elapsed)}"])


def remark(text: str) -> None:
    """Prints one line on stderr. On a terminal it replaces the progress line, which the next update shows again."""
    if is_first():
        print(f"\r\x1b[K{text}" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, as 0:17:30."""
    return str(timedelta(seconds=round(seconds)))
