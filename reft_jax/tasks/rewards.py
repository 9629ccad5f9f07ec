"""Rewards of one's own: the function that the setting `reward` names, run in worker processes with a time limit.

The default reward is the task's (tasks/registry.py) and is computed in this process. A function of the user's gets the
completion, its Example, and its Verdict with the task's reward in it, and returns a number, or a number and named parts
of it. Any error of it ends the run and is never a reward of 0.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import reft_jax
from reft_jax.types import Example, InputError, Verdict

START_S = 300.0  # to load the function's file, which may read a model
END_S = 1.0  # to say where a function hangs
PACKAGE = Path(reft_jax.__file__).resolve().parents[1]  # the folder that holds reft_jax/


def environment() -> dict[str, str]:
    """That of a process for a user's code: it finds this package, and its JAX does not take the devices."""
    path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


class Paid(NamedTuple):
    """What a reward function gave: the reward, and its parts by name (none if it returned a number only)."""

    reward: float
    parts: dict[str, float]


class RewardError(InputError):
    """A reward function failed. `traceback`: where it did, or where it was when its time was over; several lines."""

    def __init__(self, message: str, traceback: str):
        super().__init__(message)
        self.traceback = traceback


class Worker:
    """A process that runs the function. Use it from the thread that made it: it ends with that thread.

    log: the descriptor or file that gets what the function prints.
    """

    def __init__(self, name: str, log):
        self.name, self._received, self._where = name, b"", tempfile.TemporaryFile()
        fd = self._where.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reft_jax.tasks.reward_worker", name, str(fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=[fd],
            start_new_session=True,  # so that `kill` also ends what the function started
            env=environment(),
        )

    def ready(self) -> None:
        """Waits until the file is loaded. Raises InputError if it cannot be used; after that this worker is gone."""
        try:
            found = self._reply(START_S)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise InputError(f"reward={self.name!r}: its process {error} while it loaded; correct the file") from None
        if "error" in found:
            self.kill()
            raise InputError(found["error"])

    def pay(self, text: str, example: Example, verdict: Verdict, timeout_s: float) -> Paid:
        """Runs the function on one completion. Raises RewardError; after that this worker is gone."""
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and the reply says how
                self.process.stdin.write(json.dumps([text, example, verdict]).encode() + b"\n")
                self.process.stdin.flush()
            found = self._reply(timeout_s)
        except (TimeoutError, EOFError) as error:
            remedy = "raise reward_timeout_s, or " if isinstance(error, TimeoutError) else ""
            message = self._about(example, f"its process {error}; {remedy}correct the file")
            raise RewardError(message, self.kill()) from None
        if "error" in found:
            self.kill()
            raise RewardError(self._about(example, f"{found['error']}; correct the file"), found["traceback"])
        return Paid(found["reward"], found["parts"])

    def _about(self, example: Example, what: str) -> str:
        return f"reward={self.name!r}: item {example.item_id!r}: {what}"

    def _reply(self, timeout_s: float) -> dict:
        """Raises TimeoutError or EOFError, with what the process did in words."""
        deadline, out, poll = time.monotonic() + timeout_s, self.process.stdout.fileno(), select.poll()
        poll.register(out, select.POLLIN)
        while b"\n" not in self._received:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"did not answer within {timeout_s:g} s")
            if not (chunk := os.read(out, 1 << 16)):
                raise EOFError(f"ended ({self._end()})")
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _end(self) -> str:
        try:
            return f"exit code {self.process.wait(END_S)}"
        except subprocess.TimeoutExpired:
            return "its output is closed"

    def kill(self) -> str:
        """Ends the process and what it started. Returns where its function was, as far as it can be known."""
        if self._where.closed:
            return ""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream.close()
        self._where.seek(0)
        with self._where:
            return self._where.read().decode(errors="replace")


class Rewards:
    """The workers of a run; a context that ends them. A worker starts with the first completion that it gets.

    Args:
        name: the setting `reward`, path.py:NAME.
        workers: functions that run at once, each in a process of its own.
        timeout_s: wall-clock seconds per completion.
        log: the file that gets what the function prints.
    """

    def __init__(self, name: str, workers: int, timeout_s: float, log: Path):
        self.name, self.timeout_s, self.log = name, timeout_s, log
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reft-reward")
        self._own, self._lock, self._all, self._ended = threading.local(), threading.Lock(), [], False

    def __enter__(self) -> "Rewards":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.log.open("ab")
        return self

    def __exit__(self, *error) -> None:
        with self._lock:
            self._ended = True
            for worker in self._all:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(worker.process.pid, signal.SIGKILL)  # its thread then sees its end
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.kill()
        self._file.close()

    def submit(self, text: str, example: Example, verdict: Verdict) -> "Future[Paid]":
        """A future of what the function gives; it raises RewardError or InputError."""
        return self._threads.submit(self._pay, text, example, verdict)

    def _pay(self, text: str, example: Example, verdict: Verdict) -> Paid:
        if not hasattr(self._own, "worker"):
            with self._lock:
                if self._ended:
                    raise CancelledError
                self._own.worker = Worker(self.name, self._file)
                self._all.append(self._own.worker)
            self._own.worker.ready()
        return self._own.worker.pay(text, example, verdict, self.timeout_s)


def check_reward(name: str) -> None:
    """InputError, before anything is compiled, if the setting `reward` names no function that can be used."""
    if name:
        worker = Worker(name, subprocess.DEVNULL)
        worker.ready()
        worker.kill()
