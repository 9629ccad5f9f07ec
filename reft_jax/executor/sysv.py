"""Removes System V shared memory that a program leaves behind, where nothing forbids it to make some.

Only the zygote imports this module.
"""

import os

from files import LIBC

IPC_RMID = 0
TABLE = "/proc/sysvipc/shm"


def segments(table: int | None) -> dict[int, int]:
    """Maps the id of each shared memory segment of this machine to the process that made it.

    table: the descriptor of TABLE; None gives an empty map.
    """
    rows = os.pread(table, 1 << 20, 0).split(b"\n")[1:-1] if table is not None else []
    return {int(row.split()[1]): int(row.split()[4]) for row in rows}


def remove(found: dict[int, int], before: dict[int, int]) -> None:
    """Removes segments that are new and whose maker is dead. Those of other programs and of this machine stay."""
    for segment in found.keys() - before.keys():
        try:
            os.kill(found[segment], 0)
        except ProcessLookupError:
            LIBC.shmctl(segment, IPC_RMID, None)
        except PermissionError:
            continue
