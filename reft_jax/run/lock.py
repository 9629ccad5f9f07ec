"""Keeps a work directory to one run at a time: `lock.json` names the process that works there.

The file is the whole lock. Three operations are enough: read it, replace it if it has not changed since it was read,
and touch it as a sign of life. If it is missing or empty, nobody holds the lock. Commands that only read (`export`,
`evaluate --samples` and `--replay`) ignore it.
"""

import fcntl
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from reft_jax.parallel import hosts
from reft_jax.store import is_remote, writing
from reft_jax.types import InputError

LOCK_NAME = "lock.json"
BEAT_S = 20.0  # between two signs of life
SILENCE_S = 90.0  # without a sign of life, until a holder on another machine counts as dead
TEXT = {"encoding": "utf-8", "errors": "replace"}


class Holder(NamedTuple):
    """The process that holds a lock.

    machine: equal if process ids can be compared. started: tells a process from a later one with the same id.
    workdir: tells the original folder from a copy of it.
    """

    host: str
    pid: int
    since: str
    machine: str
    started: str
    workdir: str

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} since {self.since}"


def look(workdir: Path) -> None:
    """Raises InputError if another process works in `workdir`. Writes nothing."""
    if hosts.is_first():
        _left_by(workdir, _read(workdir / LOCK_NAME))


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir` inside the `with`; creates the folder if it is new. With several hosts, host 0 does.

    Raises InputError if another process holds the lock, SaveError if it cannot be written. A process that gave no sign
    of life for SILENCE_S can lose the lock; it then ends at once, because the other process writes now.
    """
    if not hosts.is_first():
        hosts.gather("the work directory is free", None)
        yield
        return
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path, mine = workdir / LOCK_NAME, json.dumps(_myself(workdir)._asdict())
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    while True:
        before = _read(path)
        takes_over = _left_by(workdir, before)
        if _swap(path, before, mine):
            break
    if takes_over:
        print(f"{workdir}: takes over from {takes_over}", flush=True)
    ended = threading.Event()

    def release() -> None:
        ended.set()
        with suppress(OSError):
            _swap(path, mine, "")
            for folder in new:  # the start may have failed: remove the new folders that are still empty
                folder.rmdir()

    threading.Thread(target=_beat, args=(path, mine, ended), name="reft-lock", daemon=True).start()
    hosts.before_leaving(release)
    try:
        hosts.gather("the work directory is free", None)
        yield
    finally:
        release()


def _left_by(workdir: Path, text: str) -> str:
    """Says who left this lock behind, and how that is known; "" for no lock. Raises InputError if the holder lives."""
    if not text:
        return ""
    path = workdir / LOCK_NAME
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        holder = None
    if holder and holder.machine == _machine():
        if not _is_alive(holder.pid, holder.started):
            return f"{holder}, which has ended"
        if not _is_same(holder.workdir, workdir):
            return f"{holder}, which works in {holder.workdir}"
        wait = "as soon as that process has ended"
    else:
        silent = _silence(path)
        if silent > SILENCE_S:
            return f"{holder or 'an unknown process'}, which gave no sign of life for {silent:.0f} s"
        until = datetime.now().astimezone() + timedelta(seconds=SILENCE_S - silent)
        wait = f"at {_clock(until)} if it gives no sign of life; the last one was {max(0, silent):.0f} s ago"
    who = holder or f"an unknown process ({path} cannot be read)"
    raise InputError(f"--workdir: {workdir} is in use by {who}; choose another, or wait: a start takes it over {wait}")


def _is_same(one: str, workdir: Path) -> bool:
    """Whether the lock was made in this folder, not in one that this is a copy of. A folder that is gone was moved."""
    if is_remote(one) or is_remote(workdir):
        return one == str(workdir)
    return not os.path.exists(one) or os.path.samefile(one, workdir)


def _beat(path: Path, mine: str, ended: threading.Event) -> None:
    """Touches the lock while this run holds it; ends the process if another run has taken it."""
    while not ended.wait(BEAT_S):
        with suppress(OSError):  # the disk may be unreachable for a moment; if it lasts, another run takes over
            text = _read(path)
            if text == mine:
                _touch(path, mine)
            elif not text:  # removed by hand
                _swap(path, "", mine)
            elif not ended.is_set():
                line = f"error: {path.parent}: another run took over, because this one gave no sign of life; {text}"
                hosts.end_all(line, InputError.exit_code)


def _read(path: Path) -> str:
    try:
        return path.read_text(**TEXT)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise InputError(f"--workdir: cannot read {path} ({error.strerror}); choose another") from error


def _swap(path: Path, before: str, after: str) -> bool:
    """Replaces the text `before` ("" for no lock) with `after`; returns False if another process has changed it."""
    with writing(path):
        if is_remote(path):
            return path.swap(before, after)
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if after else 0), 0o666)
        except FileNotFoundError:
            return False
        with open(descriptor, "r+", **TEXT) as file:
            with suppress(OSError):  # without file locks, two processes that take over at one moment can both succeed
                fcntl.flock(file, fcntl.LOCK_EX)
            there = path.stat().st_ino if path.exists() else None
            if there != os.fstat(file.fileno()).st_ino or file.read() != before:
                return False
            if not after:
                path.unlink()
                return True
            file.seek(0)
            file.truncate()
            file.write(after)
            return True


def _touch(path: Path, mine: str) -> None:
    """A sign of life. In a bucket it is a write, on the condition that nobody else has written since."""
    if is_remote(path):
        path.swap(mine, mine)
    else:
        os.utime(path)


def _silence(path: Path) -> float:
    """Seconds since the last sign of life. Both times are from the file system's clock: hosts' clocks may differ."""
    try:
        if is_remote(path):
            return path.silence()
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # released at this moment
        return 0.0
    except OSError:  # a full disk
        return time.time() - path.stat().st_mtime


def _myself(workdir: Path) -> Holder:
    since = _clock(datetime.now().astimezone())
    return Holder(socket.gethostname(), os.getpid(), since, _machine(), _start_of(os.getpid()), str(workdir))


def _machine() -> str:
    """Names this boot of the kernel and this namespace of process ids (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int, started: str) -> bool:
    if now := _start_of(pid):
        return now == started
    try:  # /proc may hide another user's processes; then a signal can only show whether some process has this id
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _start_of(pid: int) -> str:
    """When a process began, in the kernel's ticks; "ended" for a zombie; "" if that cannot be read."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]
    except OSError:
        return ""


def _clock(time: datetime) -> str:
    return time.isoformat(sep=" ", timespec="seconds")
