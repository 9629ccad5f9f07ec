"""What a zygote says to the pool and to its children, and what it hears and believes of either."""

import json
import math
import os
import select
import time

import child as inside

CONTROL = 0  # the fd of the pool's socket
STATUSES = {"ok", "wrong_type", "not_finite", "no_solution", "syntax_error", "exception", "memory", "refused"}


class Lines:
    """The pool's requests."""

    def __init__(self):
        self.data = b""

    def complete(self) -> bool:
        return b"\n" in self.data

    def waiting(self, timeout_s: float = 0.0) -> bool:
        return self.complete() or bool(select.select([CONTROL], [], [], timeout_s)[0])

    def next(self) -> bytes:
        """One line. Raises EOFError when the pool closes its socket."""
        while not self.complete():
            self.read()
        line, _, self.data = self.data.partition(b"\n")
        return line

    def read(self) -> None:
        """What has come, a part of a line perhaps; waits for something. Raises EOFError."""
        chunk = os.read(CONTROL, 1 << 16)
        if not chunk:
            raise EOFError
        self.data += chunk


def wait_for(fds: list[int], deadline: float) -> list[int]:
    """Those where there is something to read, or the end, before the deadline."""
    return select.select(fds, [], [], max(0.0, deadline - time.monotonic()))[0]


def checked(line: bytes, want: str) -> dict | None:
    """The child's report as an answer, or None: the program can write to the socket whatever it likes."""
    try:
        status, value, detail, cut = json.loads(line)
        if status != "ok":
            valid = status in STATUSES and value is None
        elif want == "number":
            valid = math.isfinite(float.fromhex(value))
        else:
            valid = len(value.encode()) <= 4 * inside.TEXT_CHARS  # bytes in UTF-8, which a lone surrogate has not
        valid = valid and len(detail.encode()) <= 4 * inside.DETAIL_CHARS and isinstance(cut, bool)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return {"status": status, "value": value, "detail": detail, "cut": cut} if valid else None


def write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def send(message: dict | None) -> None:
    write(CONTROL, json.dumps(message).encode() + b"\n")
