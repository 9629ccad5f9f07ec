"""The trainer's side: feeds each zygote one program at a time and tells a bad program from a broken machine."""

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# -P: the script's folder is not importable.
COMMAND = [sys.executable, "-P", str(Path(__file__).with_name("zygote.py"))]
# All that a program sees of an environment. With one hash seed the order of a set is the same on every zygote; NumPy
# must not try to start threads, which programs may not have.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
START_S = 60.0  # to import sympy from a cold disk
GRACE_S = 10.0  # beyond the program's own timeout, before a zygote counts as hung


class InfrastructureError(RuntimeError):
    """Programs could not be run. It says nothing about the programs and must never become a score."""


class ExecResult(NamedTuple):
    """What became of one program.

    value: the number (finite float) or text that `solution()` returned if status is "ok", else None.
    status: ok | wrong_type | not_finite | no_solution | syntax_error | exception | timeout | memory | killed.
    detail: the class of the exception or of the unfit result, or the exit code (-n for signal n).
    ms: wall time in milliseconds, fork and clean-up included.
    cut: the program compiled only after it was cut at its first blank line.
    """

    value: float | str | None
    status: str
    detail: str = ""
    ms: float = 0.0
    cut: bool = False


class Zygote:
    """A running `zygote.py` and the socket to it."""

    def __init__(self, sympy: bool, memory_mb: int):
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*COMMAND, "sympy" if sympy else "plain", str(memory_mb)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        try:
            if error := self._receive(START_S)["error"]:
                raise InfrastructureError(f"the program executor cannot start: {error}")
        except InfrastructureError:
            self.kill()
            raise

    def ask(self, program: str, timeout_s: float, want: str) -> ExecResult:
        request = {"program": program, "timeout_s": timeout_s, "want": want}
        try:
            self.socket.settimeout(timeout_s + GRACE_S)
            self.socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise InfrastructureError(f"program executor {self.process.pid} does not listen: {error}") from error
        answer = self._receive(timeout_s + GRACE_S)
        if want == "number" and answer["value"] is not None:
            answer["value"] = float.fromhex(answer["value"])
        return ExecResult(**answer)

    def _receive(self, timeout_s: float) -> dict:
        self.socket.settimeout(timeout_s)
        data = b""
        try:
            while not data.endswith(b"\n"):
                chunk = self.socket.recv(65536)
                if not chunk:
                    raise ConnectionError("it has ended")
                data += chunk
        except OSError as error:
            raise InfrastructureError(f"program executor {self.process.pid} does not answer: {error}") from error
        return json.loads(data)

    def kill(self) -> None:
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


# Zygotes that wait, by kind (sympy, memory_mb). Append and pop of a list are atomic, so threads need no lock.
_idle: defaultdict[tuple[bool, int], list[Zygote]] = defaultdict(list)
os.register_at_fork(after_in_child=_idle.clear)  # two processes must not talk to one zygote


def run_programs(
    programs: Sequence[str],
    *,
    timeout_s: float = 10.0,
    workers: int = 2,
    want: str = "number",
    memory_mb: int = 1024,
) -> list[ExecResult]:
    """Runs each program and returns what its `solution()` returned, in the order of `programs`.

    A program sees `math`, and `sympy` if it mentions it, without importing them. Equal programs run once.
    want: "number" is `float(solution())`; "text" is `str(solution())`, at most 256 characters.
    timeout_s: wall seconds for one program, compiling and converting included. memory_mb: MiB of address space for one
    program, above the interpreter's own. workers: programs at a time. May be called from several threads at once.
    Raises InfrastructureError if a program could not be run on two zygotes, ValueError on a bad argument.
    """
    if want not in ("number", "text"):
        raise ValueError(f"want is {want!r}; it must be 'number' or 'text'")
    if not (timeout_s > 0 and workers > 0 and memory_mb > 0):
        raise ValueError(f"timeout_s {timeout_s}, workers {workers} and memory_mb {memory_mb} must be above 0")
    distinct = list(dict.fromkeys(programs))
    run = functools.partial(_run, timeout_s=timeout_s, want=want, memory_mb=memory_mb)
    with ThreadPoolExecutor(workers) as threads:
        results = dict(zip(distinct, threads.map(run, distinct), strict=True))
    return [results[program] for program in programs]


def _run(program: str, timeout_s: float, want: str, memory_mb: int) -> ExecResult:
    """One program on a zygote that waits, or a new one; once more on a new one if that zygote is lost."""
    kind = ("sympy" in program, memory_mb)
    try:
        zygote = _idle[kind].pop()
    except IndexError:
        zygote = Zygote(*kind)
    try:
        result = zygote.ask(program, timeout_s, want)
    except InfrastructureError:
        zygote.kill()
        zygote = Zygote(*kind)
        try:
            result = zygote.ask(program, timeout_s, want)
        except InfrastructureError:
            zygote.kill()
            raise
    _idle[kind].append(zygote)
    return result


def start(workers: int, memory_mb: int) -> None:
    """Starts `workers` zygotes (without sympy) ahead of the first program. Raises InfrastructureError."""
    for _ in range(workers - len(_idle[False, memory_mb])):
        _idle[False, memory_mb].append(Zygote(False, memory_mb))


@atexit.register
def shutdown() -> None:
    """Ends the zygotes that wait; a zygote at work stays until this process ends. A later call starts new ones."""
    for waiting in list(_idle.values()):
        while waiting:
            waiting.pop().kill()
