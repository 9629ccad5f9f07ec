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

# -S: nothing of site-packages runs or is found in a zygote. A number, FOLDERS, kind and memory follow.
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

    number: of those there are of its kind; each settles on another CPU. protections: what guards a child of it, in
    words. lost: how many zygotes in a row were lost before it.
    """

    def __init__(self, sympy: bool, memory_mb: int, number: int, lost: int = 0):
        self.number, self.lost, self.programs, self.received = number, lost, 0, b""
        self.socket, theirs = socket.socketpair()
        with theirs:
            place = os.getpid() + number  # another trainer on this machine begins elsewhere
            self.process = subprocess.Popen(
                [*COMMAND, str(place), package_folders(), "sympy" if sympy else "plain", str(memory_mb)],
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

    def send(self, program: str, timeout_s: float, want: str, more: int) -> None:
        """Gives it a program, to run after those it has; `more` others wait, so it may fork children meanwhile.

        Raises InfrastructureError if it hangs. If it has died `receive` says so, after the answers it gave.
        """
        request = {"program": program, "timeout_s": timeout_s, "want": want, "more": more}
        with contextlib.suppress(ConnectionError):
            self._send(request, timeout_s + GRACE_S)

    def receive(self, timeout_s: float, want: str) -> ExecResult | None:
        """The result of the first program it has; or None: it hands the last one back, for the first takes its time.

        Raises InfrastructureError.
        """
        answer = self._receive(timeout_s + GRACE_S)
        if answer is None:
            return None
        if want == "number" and answer["value"] is not None:
            answer["value"] = float.fromhex(answer["value"])
        self.programs += 1
        return ExecResult(**answer)

    def keep_spares(self, number: int) -> None:
        """Lets it fork and lock down so many children for the next programs; returns at once."""
        try:
            self._send({"spares": number}, GRACE_S)
        except ConnectionError as error:
            raise InfrastructureError(f"program executor {self.process.pid} has ended: {error}") from error

    def _send(self, message: dict, timeout_s: float) -> None:
        try:
            self.socket.settimeout(timeout_s)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except TimeoutError as error:
            raise InfrastructureError(f"program executor {self.process.pid} does not listen: {error}") from error

    def _receive(self, timeout_s: float) -> dict | None:
        self.socket.settimeout(timeout_s)
        try:
            while b"\n" not in self.received:
                chunk = self.socket.recv(65536)
                if not chunk:
                    raise ConnectionError("it has ended")
                self.received += chunk
        except OSError as error:
            raise InfrastructureError(f"program executor {self.process.pid} does not answer: {error}") from error
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

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
