"""System V shared memory that a program leaves behind where nothing keeps it from making some. For the zygote only."""

import os

from files import LIBC

IPC_RMID = 0
TABLE = "/proc/sysvipc/shm"


def segments(table: int | None) -> dict[int, int]:
    """The process that made it, by the id of each shared memory segment of this machine. table: the open TABLE."""
    rows = os.pread(table, 1 << 20, 0).split(b"\n")[1:-1] if table is not None else []
    return {int(row.split()[1]): int(row.split()[4]) for row in rows}


def remove(found: dict[int, int], before: dict[int, int]) -> None:
    """Removes those that are new and whose maker is dead: another program's, or this machine's, are left alone."""
    for segment in found.keys() - before.keys():
        try:
            os.kill(found[segment], 0)
        except ProcessLookupError:
            LIBC.shmctl(segment, IPC_RMID, None)
        except PermissionError:
            continue
