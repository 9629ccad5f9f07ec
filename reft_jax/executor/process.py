"""A running zygote as the trainer sees it: started, asked, ended."""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import json
import marshal
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# -S: nothing of site-packages runs or is found in a zygote. A number, FOLDERS, kind and memory follow.
COMMAND = [sys.executable, "-S", str(Path(__file__).with_name("zygote.py"))]
# All that a zygote sees of an environment, beside what this Python may need to find its own library. With one hash seed
# the order of a set is the same on every zygote. What is bound at the start need not be bound in every child.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
START_S = 60.0  # to import sympy from a cold disk
GRACE_S = 10.0  # beyond the program's own timeout, before a zygote counts as hung
END_S = 5.0  # to end by itself
LONGEST_S = 1e6  # 11 days, near what the system calls that wait can take
HEADER, LENGTH, SPARES = struct.Struct("<dii"), struct.Struct("<q"), -1  # as in wire.py
NAME = b"reft-program"  # as in lockdown.py
_RUNNING: set[int] = set()  # process ids of zygotes that have not been waited for


class InfrastructureError(RuntimeError):
    """Programs could not be run. It says nothing about the programs and must never become a score."""


class UnprotectedError(InfrastructureError):
    """The kernel gives too little protection from what a program may do, and nobody allowed to go without."""


class Disturbed(InfrastructureError):
    """What a program got into was, as far as can be told, this machine's doing: it is to be run again, alone.

    verdict: what became of it if that happens again, where a program can do the same to itself; else None.
    """

    def __init__(self, reason: str, verdict: "ExecResult | None" = None):
        super().__init__(reason)
        self.verdict = verdict


class ExecResult(NamedTuple):
    """What became of one program.

    value: the number (finite float) or text that `solution()` returned if status is "ok", else None.
    status: ok | wrong_type | not_finite | no_solution | syntax_error | exception | timeout | memory | killed | refused
    | too_long.
    detail: the class of the exception or of the unfit result, the exit code (-n for signal n), or the size.
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
    words. files_closed: whether that includes this machine's files. lost: how many zygotes in a row were lost before
    it. spares: how many spare children it was let have.
    """

    def __init__(self, sympy: bool, memory_mb: int, number: int, lost: int = 0):
        self.number, self.lost, self.programs, self.received, self.spares = number, lost, 0, b"", 0
        hide_memory()
        has_stderr = is_open(2)
        try:
            self.socket, theirs = high_sockets()
        except OSError as error:
            raise InfrastructureError(f"the program executor cannot start: {error}") from error
        try:
            with theirs:
                place = os.getpid() + number  # another trainer on this machine begins elsewhere
                self.process = subprocess.Popen(
                    [*COMMAND, str(place), package_folders(), "sympy" if sympy else "plain", str(memory_mb)],
                    stdin=theirs,
                    stdout=subprocess.DEVNULL,
                    stderr=None if has_stderr else subprocess.DEVNULL,
                    cwd="/",
                    env=ENVIRONMENT | {name: os.environ[name] for name in KEPT if name in os.environ},
                )
                _RUNNING.add(self.process.pid)
        except OSError as error:
            self.socket.close()
            raise InfrastructureError(f"the program executor cannot start: {error}") from error
        try:
            greeting = self._receive(START_S)
            if greeting["error"]:
                raise InfrastructureError(f"the program executor cannot start: {greeting['error']}")
            here = {"python": sys.version, "library": os.path.realpath(os.path.dirname(os.__file__))}
            for name, ours in here.items():
                if greeting[name] != ours:
                    raise InfrastructureError(f"programs would run with the {name} {greeting[name]}, not {ours}")
        except InfrastructureError:
            self.kill()
            raise
        self.protections: list[str] = greeting["protections"]
        self.files_closed: bool = greeting["files_closed"]

    def send(self, program: str, timeout_s: float, want: str, more: int) -> None:
        """Gives it a program, to run after those it has; `more` others wait, so it may fork children meanwhile.

        Raises InfrastructureError if it hangs. If it has died `receive` says so, after the answers it gave.
        """
        message = marshal.dumps((program, timeout_s, want))
        head = HEADER.pack(timeout_s, more, want == "text") + LENGTH.pack(len(message))
        with contextlib.suppress(ConnectionError):
            self._send(head + message, timeout_s + GRACE_S)

    def receive(self, timeout_s: float, want: str) -> ExecResult | None:
        """The result of the first program it has; or None: it hands the last one back, for the first takes its time.

        Raises Disturbed and InfrastructureError.
        """
        answer = self._receive(timeout_s + GRACE_S)
        if answer is None:
            return None
        if "lost" in answer:
            raise Disturbed(answer["lost"], answer["verdict"] and ExecResult(**answer["verdict"]))
        if want == "number" and answer["value"] is not None:
            answer["value"] = float.fromhex(answer["value"])
        self.programs += 1
        return ExecResult(**answer)

    def keep_spares(self, number: int) -> None:
        """Lets it fork and lock down so many children for the next programs; returns at once."""
        try:
            self._send(HEADER.pack(0.0, number, False) + LENGTH.pack(SPARES), GRACE_S)
        except ConnectionError as error:
            raise InfrastructureError(f"program executor {self.process.pid} has ended: {error}") from error

    def _send(self, message: bytes, timeout_s: float) -> None:
        try:
            self.socket.settimeout(timeout_s)
            self.socket.sendall(message)
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
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has not made its group, or could not
            self.process.kill()
        self.process.wait()
        _RUNNING.discard(self.process.pid)
        collect_orphans()

    def end(self) -> None:
        """For one that waits: it kills and reaps its spares first, so no orphan of theirs falls to anyone."""
        self.socket.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        _RUNNING.discard(self.process.pid)


def hide_memory() -> None:
    """Closes this process to others of its user: memory, environment, sockets. Programs run as that user."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def high_sockets() -> tuple[socket.socket, socket.socket]:
    """A pair above 0, 1 and 2, which others write to without a look, were they closed before. Raises OSError."""
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(end) for end in socket.socketpair()]
        ours = socket.socket(fileno=fcntl.fcntl(pair[0], fcntl.F_DUPFD_CLOEXEC, 3))
        stack.push(lambda *error: error[0] and ours.close())
        theirs = socket.socket(fileno=fcntl.fcntl(pair[1], fcntl.F_DUPFD_CLOEXEC, 3))
    return ours, theirs


def collect_orphans() -> None:
    """Reaps what a killed zygote left to us, which happens to process 1 and to subreapers; others' children stay."""
    end = time.monotonic() + 1.0
    while (orphans := _orphans()) and time.monotonic() < end:
        for pid in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)


def _orphans() -> list[int]:
    """Our children that a zygote forked: they have its name, and are no zygotes of ours."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_bytes().rpartition(b")")
            if head.endswith(b"(" + NAME) and int(rest.split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return [pid for pid in found if pid not in _RUNNING]
