"""Keeps a work directory to one run at a time: `lock.json` names the process that works there.

The file is the whole lock. Three operations are enough: read it, replace it if it has not changed since it was read,
and touch it as a sign of life. If it is missing or empty, nobody holds the lock. Commands that only read (`export`,
`evaluate --samples` and `--replay`) ignore it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from reft_jax import store
from reft_jax.parallel import hosts
from reft_jax.store import writing
from reft_jax.types import InputError, SaveError

LOCK_NAME = "lock.json"
BEAT_S = 20.0  # between two signs of life
SILENCE_S = 90.0  # without a sign of life, until a holder on another machine counts as dead
WAITS = "REFT_WAIT"  # an environment variable; launch scripts set it, because a restart may be on another machine
LOOK_S = 1.0  # between two looks at a lock that may be a dead process's


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


class PerhapsDead(InputError):
    """The holder of a lock is elsewhere, so only its silence will show whether it is dead."""


def look(workdir: Path) -> None:
    """Raises InputError if another process works in `workdir`, SaveError if its bucket is gone. Writes nothing.

    With WAITS in the environment it first waits, if the holder may be dead, for its next sign of life or its silence.
    """
    if not hosts.is_first():
        return
    path = workdir / LOCK_NAME
    first, told = _signs(path), False
    while True:
        try:
            _left_by(workdir, _read(path))
            return
        except PerhapsDead as refused:
            if not os.environ.get(WAITS) or _signs(path) != first:
                raise
            if not told:
                print(f"{refused}; {WAITS} is set, so this start waits for that", flush=True)
            told = True
        time.sleep(LOOK_S)


def _signs(path: Path) -> tuple[str, int]:
    """The text of a lock, and when it was touched: one of them changes with every sign of life."""
    try:
        with store.reading(path):
            return _read(path), path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return "", 0


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
        if store.swap(path, before, mine):
            break
    if takes_over:
        print(f"{workdir}: takes over from {takes_over}", flush=True)
    ended = threading.Event()

    def release() -> None:
        if ended.is_set():
            return
        ended.set()
        with suppress(OSError, SaveError):
            store.swap(path, mine, "")
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
        if not store.is_same(holder.workdir, workdir):
            return f"{holder}, which works in {holder.workdir}"
        kind, wait = InputError, "as soon as that process has ended"
    else:
        silent = store.silence(path)
        if silent > SILENCE_S:
            return f"{holder or 'an unknown process'}, which gave no sign of life for {silent:.0f} s"
        until = datetime.now().astimezone() + timedelta(seconds=SILENCE_S - silent)
        wait = f"at {_clock(until)} if it gives no sign of life; the last one was {max(0, silent):.0f} s ago"
        kind = PerhapsDead
    who = holder or f"an unknown process ({path} cannot be read)"
    raise kind(f"--workdir: {workdir} is in use by {who}; choose another, or wait: a start takes it over {wait}")


def _beat(path: Path, mine: str, ended: threading.Event) -> None:
    """Touches the lock while this run holds it; ends the process if another run has taken it, or a bucket is gone."""
    reached = time.monotonic()
    while not ended.wait(BEAT_S):
        try:
            text = _read(path)
            if text == mine:
                store.touch(path, mine)
            elif not text:  # removed by hand
                store.swap(path, "", mine)
            elif not ended.is_set():
                line = f"error: {path.parent}: another run took over, because this one gave no sign of life; {text}"
                hosts.end_all(line, InputError.exit_code)
            reached = time.monotonic()
        except (OSError, InputError, SaveError) as error:  # it may last a moment only; if not, another run takes over
            away = time.monotonic() - reached
            if away > store.patience(path):  # the driver that saves steps would try for much longer
                ended.set()  # nothing can be released there
                told = f"error: {path.parent} was out of reach for {away:.0f} s ({error.__cause__ or error})"
                remedy = f"what was saved before is whole: {store.REMEDY_BUCKET}"
                hosts.end_all(f"{told}; {remedy}", SaveError.exit_code)


def _read(path: Path) -> str:
    try:
        with store.reading(path):
            return path.read_text(**store.TEXT)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise InputError(f"--workdir: cannot read {path} ({error.strerror}); choose another") from error


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
