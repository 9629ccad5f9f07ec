"""How many children this machine has room for: what cgroups and limits leave, less a share for the trainer."""

import contextlib
import math
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
CHILD_BYTES = 2 << 20  # memory of a waiting child: about 1 MiB that it shares with no process, and its page tables
COUNTED = 8192  # a higher limit on processes is ignored: counting a user's processes means reading all of them


class Room(NamedTuple):
    """The room on this machine; infinite where nothing limits it.

    memory: bytes that this process may have in all. free: bytes that are free now. processes: how many more this user
    or cgroup may have.
    """

    memory: float
    free: float
    processes: float

    def children(self, held: int) -> int:
        """How many children may wait, the `held` existing ones included.

        Half of the free memory and processes is left to the trainer.
        """
        memory = self.free / CHILD_BYTES
        return max(0, int(min((memory + held) / 2, (self.processes + held) / 2, 1 << 20)))


def room() -> Room:
    """Measures the room now. A limit that cannot be read counts as none."""
    memory, free = _machine_memory()
    processes = min(_processes(), _user_processes())
    for folder in _folders("memory"):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(folder / limit_file)
            if limit < memory:
                memory = limit
            if limit < math.inf and (used := _number(folder / used_file)) < math.inf:
                free = min(free, limit - used + _field(folder / "memory.stat", cache))
    return Room(memory, max(0.0, free), processes)


def _machine_memory() -> tuple[float, float]:
    total, free = (1024 * _field(Path("/proc/meminfo"), name) for name in ("MemTotal:", "MemAvailable:"))
    return total or math.inf, free or math.inf


def _processes() -> float:
    """How many more processes the cgroups leave."""
    left = (_number(folder / "pids.max") - _number(folder / "pids.current", 0) for folder in _folders("pids"))
    return max(0.0, min(left, default=math.inf))


def _user_processes() -> float:
    """How many more threads RLIMIT_NPROC lets this user have; it does not bind root."""
    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit in (-1, resource.RLIM_INFINITY) or limit > COUNTED or os.getuid() == 0:
        return math.inf
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid in (os.getuid(), 0):  # root owns the folder of a process that hides its memory
                status = (folder / "status").read_text()
                if int(status.partition("\nUid:")[2].split()[0]) == os.getuid():
                    count += int(status.partition("\nThreads:")[2].split()[0])
    return max(0, limit - (count or threading.active_count()))


def _folders(controller: str) -> Iterator[Path]:
    """This process's cgroup and the visible cgroups around it, of version 1 and 2."""
    try:
        lines = OWN.read_text().splitlines() if sys.platform == "linux" else []
    except OSError:
        lines = []
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mounts = [CGROUPS / names, CGROUPS / controller] if names else [CGROUPS, CGROUPS / "unified"]
        for mount in dict.fromkeys(mounts):
            folder = mount / path.lstrip("/")
            while folder != mount and folder.is_relative_to(mount):
                yield folder
                folder = folder.parent
            yield mount


def _number(file: Path, missing: float = math.inf) -> float:
    """The number in this file; infinity for "max" and for the largest number of cgroup version 1."""
    try:
        number = float(file.read_text())
    except (OSError, ValueError):
        return missing
    return number if number < 1 << 60 else math.inf


def _field(file: Path, name: str) -> int:
    """The first number after `name` in a file of named lines; 0 if it cannot be read."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(name + (" " if not name.endswith(":") else "")):
                return int(line.split()[1])
    return 0
