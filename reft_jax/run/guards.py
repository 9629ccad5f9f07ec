"""Ends a run early: on a signal, if a step never ends, or if a number is NaN or infinite."""

import faulthandler
import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from reft_jax.parallel import hosts
from reft_jax.store import write_whole, writing
from reft_jax.terminal import BLOCK
from reft_jax.types import NotFiniteError, Stopped

STDERR = 2  # the descriptor: stacks go there even if Python's own stream is stuck


class Guards:
    """Handles signals and runs the watchdog, inside its `with` only.

    SIGTERM (a machine is about to be taken away) and SIGINT ask the run to stop: the next safe point raises Stopped,
    and the stage saves what it has done. A second signal ends the process at once, and only what was saved before
    remains. With several hosts only a second SIGINT does that.
    """

    def __init__(self, watchdog_minutes: float = 0.0):
        """watchdog_minutes: after so long without a `step`, every thread's stack goes to stderr and the process ends
        with exit code 1; 0 turns the watchdog off."""
        self.seconds, self.asked, self._armed_at, self._points = 60 * watchdog_minutes, None, 0.0, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Guards":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            ours = (signal.SIGTERM, signal.SIGINT) if hosts.count() == 1 else (signal.SIGINT,)  # JAX handles SIGTERM
            self._before = {number: signal.signal(number, self._ask) for number in ours}
        self._arm()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def check(self, alone: bool = False) -> None:
        """Marks a safe point, where nothing is half done. Raises Stopped if the run was asked to stop.

        With several hosts, all must call this equally often; once one of them was asked, all stop at the same point.
        alone: other hosts may not be at this point, so with several hosts it does nothing.
        """
        if hosts.count() == 1:
            if self.asked:
                raise Stopped(self.asked)
        elif not alone:
            self._points += 1
            if multihost_utils.reached_preemption_sync_point(self._points):
                raise Stopped("a signal to one of the hosts")

    def step(self, alone: bool = False) -> None:
        """Marks a safe point after some work (a decode chunk, a program, an update), and restarts the watchdog."""
        if time.monotonic() - self._armed_at > 1.0:
            self._arm()
        self.check(alone)

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=STDERR)

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = signal.Signals(number).name
        if hosts.count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it and tells the other hosts
        told = f"{self.asked}: the run stops at the next safe point; signal again to end it now\n"
        os.write(STDERR, BLOCK.above(told).encode())


def check_finite(folder: Path, at: int, numbers: dict, item_ids: list[str], inputs: dict[str, np.ndarray]) -> None:
    """Raises NotFiniteError if one of `numbers` is NaN or infinite.

    Before that it saves `inputs`, the arrays that the update read, to `folder/not_finite_AT.npz`, and numbers and items
    to a .json file of the same name.
    """
    numbers = {name: float(value) for name, value in numbers.items()}
    bad = {name: value for name, value in numbers.items() if not np.isfinite(value)}
    if not bad:
        return
    saved = folder / f"not_finite_{at}.npz"
    about = {"step": at, "numbers": {name: str(value) for name, value in numbers.items()}, "item_ids": list(item_ids)}
    if hosts.is_first():
        with writing(saved):
            np.savez(content := io.BytesIO(), **inputs)
            saved.write_bytes(content.getvalue())
        write_whole(saved.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    told = ", ".join(f"{name} is {value}" for name, value in bad.items())
    items = ", ".join(list(item_ids)[:8]) + ", …" * (len(item_ids) > 8)
    raise NotFiniteError(f"{folder.name} {at}: {told}; items {items}; its inputs are in {saved}")
