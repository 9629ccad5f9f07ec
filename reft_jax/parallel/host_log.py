"""Copies what a host prints into its log file. A separate process, so that the last lines of a dying host are kept.

    python host_log.py FILE LAST < what the host prints

Copies lines from standard input to standard output and to the end of FILE until the host ends, and ignores signals. If
JAX ended the host because another host was lost, it adds the line LAST, because JAX's own message ends in a C++ stack.
FILE may be in a bucket.
"""

import os
import signal
import sys
from pathlib import Path

ENDED_BY_JAX = b"JAX distributed service detected fatal errors"


def main(path: str, last: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lost = False
    with _opened(path) as file:
        for line in sys.stdin.buffer:
            copy(line, file)
            lost = lost or ENDED_BY_JAX in line
        if lost:
            copy(f"{last}\n".encode(), file)


def _opened(path: str):
    if not path.startswith("gs://"):
        return open(path, "ab", buffering=0)
    from reft_jax.store import as_path  # not above: for a file of a disk this starts without any package

    return as_path(path).open("ab")


def copier(folder: Path, number: int, stream: int, last: str) -> tuple[list[str], dict[str, str] | None]:
    """Command and environment of the copier of a host's stream (1: output, 2: errors).

    In a bucket each stream has a file of its own, because only one process may append to one.
    """
    if not str(folder).startswith("gs://"):
        return [sys.executable, "-I", "-S", __file__, str(folder / f"host_{number}.log"), last], None
    path, package = folder / f"host_{number}.{'out' if stream == 1 else 'err'}.log", Path(__file__).resolve().parents[2]
    known = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", __file__, str(path), last], os.environ | {"PYTHONPATH": known}


def copy(line: bytes, file) -> None:
    """Writes a line to the file and to standard output; if one fails (full disk, closed ssh session), to the other."""
    for write in (file.write, sys.stdout.buffer.write):
        try:
            write(line)
            sys.stdout.buffer.flush()
        except OSError:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
