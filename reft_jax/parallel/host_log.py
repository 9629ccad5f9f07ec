"""Copies what a host prints into its log file. A separate process, so that the last lines of a dying host are kept.

    python host_log.py FILE LAST < what the host prints

Copies lines from standard input to standard output and to the end of FILE until the host ends, and ignores signals. If
JAX ended the host because another host was lost, it adds the line LAST, because JAX's own message ends in a C++ stack.
"""

import signal
import sys

ENDED_BY_JAX = b"JAX distributed service detected fatal errors"


def main(path: str, last: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    lost = False
    with open(path, "ab", buffering=0) as file:
        for line in sys.stdin.buffer:
            copy(line, file)
            lost = lost or ENDED_BY_JAX in line
        if lost:
            copy(f"{last}\n".encode(), file)


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
