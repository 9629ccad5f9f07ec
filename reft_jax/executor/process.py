"""A running zygote as the trainer sees it: started, asked, ended."""

import contextlib
import functools
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# -S: nothing of site-packages runs or is found in a zygote. FOLDERS, kind and memory follow.
COMMAND = [sys.executable, "-S", str(Path(__file__).with_name("zygote.py"))]
# All that a zygote sees of an environment. With one hash seed the order of a set is the same on every zygote. What is
# bound at the start need not be bound in every child.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
START_S = 60.0  # to import sympy from a cold disk
GRACE_S = 10.0  # beyond the program's own timeout, before a zygote counts as hung
END_S = 5.0  # to end by itself


class InfrastructureError(RuntimeError):
    """Programs could not be run. It says nothing about the programs and must never become a score."""


class UnprotectedError(InfrastructureError):
    """The kernel gives no protection from what a program may do, and nobody allowed to go without."""


class ExecResult(NamedTuple):
    """What became of one program.

    value: the number (finite float) or text that `solution()` returned if status is "ok", else None.
    status: ok | wrong_type | not_finite | no_solution | syntax_error | exception | timeout | memory | killed | refused.
    detail: the class of the exception or of the unfit result, or the exit code (-n for signal n).
    ms: wall time in milliseconds from when a zygote has the program to its report, the wait for a child included.
    cut: the program compiled only after it was cut at its first blank line.
    """

    value: float | str | None
    status: str
    detail: str = ""
    ms: float = 0.0
    cut: bool = False


@functools.cache
def package_folders() -> str:
    """Where sympy and mpmath lie; empty for one that is not installed."""
    specs = [importlib.util.find_spec(name) for name in ("sympy", "mpmath")]
    return os.pathsep.join(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


class Zygote:
    """A running `zygote.py` and the socket to it.

    protections: what guards a child of it, in words. lost: how many zygotes in a row were lost before it.
    """

    def __init__(self, sympy: bool, memory_mb: int, lost: int = 0):
        self.lost, self.programs = lost, 0
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [*COMMAND, package_folders(), "sympy" if sympy else "plain", str(memory_mb)],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        try:
            greeting = self._receive(START_S)
            if greeting["error"]:
                raise InfrastructureError(f"the program executor cannot start: {greeting['error']}")
        except InfrastructureError:
            self.kill()
            raise
        self.protections: list[str] = greeting["protections"]

    def ask(self, program: str, timeout_s: float, want: str, more: int) -> ExecResult:
        """Runs a program; `more` others wait, so children may be forked meanwhile. Raises InfrastructureError."""
        self._send({"program": program, "timeout_s": timeout_s, "want": want, "more": more}, timeout_s + GRACE_S)
        answer = self._receive(timeout_s + GRACE_S)
        if want == "number" and answer["value"] is not None:
            answer["value"] = float.fromhex(answer["value"])
        self.programs += 1
        return ExecResult(**answer)

    def keep_spares(self, number: int) -> None:
        """Lets it fork and lock down so many children for the next programs; returns at once."""
        self._send({"spares": number}, GRACE_S)

    def _send(self, message: dict, timeout_s: float) -> None:
        try:
            self.socket.settimeout(timeout_s)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise InfrastructureError(f"program executor {self.process.pid} does not listen: {error}") from error

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
        """For one that is lost."""
        self.socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """For one that waits: it kills and reaps its spares first, so no orphan of theirs falls to anyone."""
        self.socket.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
