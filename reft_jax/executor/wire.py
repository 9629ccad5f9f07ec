"""The messages between a zygote and the pool, and between a zygote and its children, and how it checks them."""

import collections
import contextlib
import json
import math
import mmap
import os
import select
import struct
import time

import child as inside

CONTROL = 0  # the fd of the pool's socket
STATUSES = {"ok", "wrong_type", "not_finite", "no_solution", "syntax_error", "exception", "memory", "refused"}
HEADER = struct.Struct("<dii")  # of a request: timeout, number of programs that wait behind it, whether text is wanted
LENGTH = struct.Struct("<q")  # then the length of the message for the child, and the message; SPARES: no message
SPARES = -1  # in place of a length: there is no program; keep as many spares as "wait behind it" says
MADV_WIPEONFORK = 18


class Request(collections.namedtuple("Request", "timeout_s more want message")):  # `typing` would be in every child
    """A program, or without a `message` the order to keep spare children.

    The message is valid until the next request is read.
    """


class Requests:
    """The requests that the pool has sent.

    They are kept in memory that is empty in every fork, and never copied into another object: no program can find the
    source of another.
    """

    def __init__(self):
        self.memory, self.first, self.end = _hidden_memory(1 << 18), 0, 0  # bytes of the current request, and of all

    def _size(self, at: int) -> int:
        """Bytes of the request that begins at `at`, or 0 if it is not complete."""
        head = HEADER.size + LENGTH.size
        if self.end - at < head:
            return 0
        size = head + max(0, LENGTH.unpack_from(self.memory, at + HEADER.size)[0])
        return size if self.end - at >= size else 0

    def _drop(self, begin: int, end: int) -> None:
        if end < self.end:
            self.memory.move(begin, end, self.end - end)
        self.end -= end - begin

    def waiting(self, timeout_s: float = 0.0) -> bool:
        """Whether more has come after the current request, or comes within `timeout_s`."""
        return self.end > self.first or bool(select.select([CONTROL], [], [], timeout_s)[0])

    def next(self) -> Request:
        """Waits for the next request. Raises EOFError when the pool closes its socket."""
        self._drop(0, self.first)
        self.first = 0
        while not self._size(0):
            self.read()
        self.first = self._size(0)
        timeout_s, more, text = HEADER.unpack_from(self.memory)
        if LENGTH.unpack_from(self.memory, HEADER.size)[0] == SPARES:
            return Request(timeout_s, more, "", None)
        return Request(timeout_s, more, "text" if text else "number", memoryview(self.memory)[HEADER.size : self.first])

    def give_back(self) -> bool:
        """Drops the request after the current one; returns False if none has come."""
        if size := self._size(self.first):
            self._drop(self.first, self.first + size)
        return size > 0

    def read(self) -> None:
        """Reads what has come, possibly a part of a request; waits for at least one byte. Raises EOFError."""
        if self.end == len(self.memory):
            larger = _hidden_memory(2 * len(self.memory))
            larger[: self.end] = memoryview(self.memory)[: self.end]
            self.memory = larger
        read = os.readv(CONTROL, [memoryview(self.memory)[self.end :]])
        if not read:
            raise EOFError
        self.end += read


def _hidden_memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # Linux 4.14
        memory.madvise(MADV_WIPEONFORK)
    return memory


def wait_for(fds: list[int], deadline: float) -> list[int]:
    """Waits until one of these has something to read or has ended; returns those, or none at the deadline."""
    return select.select(fds, [], [], max(0.0, deadline - time.monotonic()))[0]


def checked(line: bytes, want: str) -> dict | None:
    """Turns a child's report into an answer; None if it is not valid. A program can write anything to the socket."""
    try:
        status, value, detail, cut = json.loads(line)
        if status != "ok":
            valid = status in STATUSES and value is None
        elif want == "number":
            valid = math.isfinite(float.fromhex(value))
        else:
            valid = writable(value, inside.TEXT_CHARS)
        valid = valid and writable(detail, inside.DETAIL_CHARS) and isinstance(cut, bool)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return {"status": status, "value": value, "detail": detail, "cut": cut} if valid else None


def writable(text: str, characters: int) -> bool:
    """Whether the text has at most so many characters.

    Raises ValueError if it has a lone surrogate, which UTF-8 cannot express; TypeError or AttributeError if not text.
    """
    return len(text) <= characters and len(text.encode()) >= 0


def write(fd: int, data: bytes | memoryview) -> None:
    """Writes all of the data."""
    while data:
        data = data[os.write(fd, data) :]


def send(message: dict | None) -> None:
    """Sends the pool one line of JSON. Raises EOFError when the pool has closed its socket."""
    try:
        write(CONTROL, json.dumps(message).encode() + b"\n")
    except ConnectionError:
        raise EOFError from None
