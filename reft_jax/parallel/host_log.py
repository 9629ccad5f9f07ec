"""What a host prints, into its own file too: a program of its own, so that it has the last words of a host that dies.

    python host_log.py FILE LAST < what the host prints

Copies lines from standard input to standard output and to the end of FILE, whatever signals come, until the host's end.
If JAX ended the host because it lost another one, a line LAST follows: JAX's own message comes with a stack of C++.
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
    """Where one of the two cannot be written (a full disk, an ssh session that is closed), the other still is."""
    for write in (file.write, sys.stdout.buffer.write):
        try:
            write(line)
            sys.stdout.buffer.flush()
        except OSError:
            pass


if __name__ == "__main__":
    main(*sys.argv[1:])
