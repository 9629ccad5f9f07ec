"""A running zygote as the trainer sees it: start it, send it programs, receive results, end it."""

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

# -S keeps site-packages out of a zygote. NUMBER, FOLDERS, kind and memory follow: see zygote.py.
COMMAND = [sys.executable, "-S", str(Path(__file__).with_name("zygote.py"))]
# The whole environment of a zygote, except for what Python may need to find its own library (KEPT). With a fixed hash
# seed a set has the same order on every zygote. Symbols that are bound at the start need no binding in every child.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
START_S = 60.0  # for a zygote to start: it may import sympy from a cold disk
GRACE_S = 10.0  # beyond the program's own timeout, before a zygote counts as hung
END_S = 5.0  # for a zygote to end by itself
LONGEST_S = 1e6  # 11 days: close to the longest wait that the system calls accept
HEADER, LENGTH, SPARES = struct.Struct("<dii"), struct.Struct("<q"), -1  # as in wire.py
NAME = b"reft-program"  # as in lockdown.py
_RUNNING: set[int] = set()  # process ids of zygotes that have not been waited for


class InfrastructureError(RuntimeError):
    """Programs could not be run. This says nothing about the programs and must never become a score."""


class UnprotectedError(InfrastructureError):
    """The kernel gives too little protection from what a program may do, and the user has not accepted that."""


class Disturbed(InfrastructureError):
    """This machine seems to have disturbed a program: it must run again, alone.

    verdict: the result to give if it happens again, where a program can also do the same to itself; else None.
    """

    def __init__(self, reason: str, verdict: "ExecResult | None" = None):
        super().__init__(reason)
        self.verdict = verdict


class ExecResult(NamedTuple):
    """The result of one program.

    value: the number (finite float) or text that `solution()` returned if status is "ok", else None.
    status: ok | wrong_type | not_finite | no_solution | syntax_error | exception | timeout | memory | killed | refused
    | too_long.
    detail: the class of the exception or of a result of the wrong type, the exit code (-n for signal n), or the size.
    ms: wall time in milliseconds from when a zygote has the program to its report, the wait for a child included.
    cut: whether the program compiled only after it was cut at its first blank line.
    """

    value: float | str | None
    status: str
    detail: str = ""
    ms: float = 0.0
    cut: bool = False


@functools.cache
def package_folders() -> str:
    """The folders that hold sympy and mpmath, joined with `os.pathsep`; one that is not installed is left out."""
    specs = [importlib.util.find_spec(name) for name in ("sympy", "mpmath")]
    return os.pathsep.join(dict.fromkeys(str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin))


class Zygote:
    """A running `zygote.py` and the socket to it.

    number: its index among the zygotes of its kind; each index uses another CPU. protections: the names of what
    restricts its children. files_closed: whether its children cannot read this machine's files. lost: how many zygotes
    in a row were lost before it. spares: how many spare children it was told to keep.
    Raises InfrastructureError if it does not start.
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
                place = os.getpid() + number  # another trainer on this machine starts at another CPU
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
        """Sends a program, to run after those sent before. `more`: how many others wait; it forks children for them.

        Raises InfrastructureError if the zygote hangs. If it has died, `receive` says so, after the answers it gave.
        """
        message = marshal.dumps((program, timeout_s, want))
        head = HEADER.pack(timeout_s, more, want == "text") + LENGTH.pack(len(message))
        with contextlib.suppress(ConnectionError):
            self._send(head + message, timeout_s + GRACE_S)

    def receive(self, timeout_s: float, want: str) -> ExecResult | None:
        """Waits for the result of the first program that was sent.

        Returns None if the zygote hands the last program back, because the first one takes long. Raises Disturbed if
        the machine disturbed the program, InfrastructureError if the zygote does not answer.
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
        """Tells it to keep this many locked-down children for the next programs; returns at once."""
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
        """Kills a zygote that hangs or has failed, and waits for it."""
        self.socket.close()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has not made its process group yet, or could not
            self.process.kill()
        self.process.wait()
        _RUNNING.discard(self.process.pid)
        collect_orphans()

    def end(self) -> None:
        """Ends an idle zygote. It kills and reaps its spare children first, so that none becomes an orphan."""
        self.socket.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        _RUNNING.discard(self.process.pid)


def hide_memory() -> None:
    """Hides memory, environment and sockets of this process from its user's other processes, as programs may be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


def is_open(fd: int) -> bool:
    """Whether this descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def high_sockets() -> tuple[socket.socket, socket.socket]:
    """Makes a socket pair with descriptors above 2: libraries write to 0, 1 and 2 unchecked. Raises OSError."""
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(end) for end in socket.socketpair()]
        ours = socket.socket(fileno=fcntl.fcntl(pair[0], fcntl.F_DUPFD_CLOEXEC, 3))
        stack.push(lambda *error: error[0] and ours.close())
        theirs = socket.socket(fileno=fcntl.fcntl(pair[1], fcntl.F_DUPFD_CLOEXEC, 3))
    return ours, theirs


def collect_orphans() -> None:
    """Reaps the children of a killed zygote that this process inherited, as process 1 or as a subreaper.

    Other children of this process are left alone.
    """
    end = time.monotonic() + 1.0
    while (orphans := _orphans()) and time.monotonic() < end:
        for pid in orphans:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.001)


def _orphans() -> list[int]:
    """Process ids of our children that a zygote forked: they have its name but are not zygotes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_bytes().rpartition(b")")
            if head.endswith(b"(" + NAME) and int(rest.split()[1]) == os.getpid():
                found.append(int(stat.parent.name))
    return [pid for pid in found if pid not in _RUNNING]
