"""What a zygote says to the pool and to its children, and what it hears and believes of either."""

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
HEADER = struct.Struct("<dii")  # of a request: timeout, how many programs wait behind it, whether text is wanted
LENGTH = struct.Struct("<q")  # then the length of a message for the child, and the message; SPARES: there is none
SPARES = -1  # in place of a length: no program; fork as many spares as "wait behind it"
MADV_WIPEONFORK = 18


class Request(collections.namedtuple("Request", "timeout_s more want message")):  # `typing` would be in every child
    """A program, or with no `message` the wish for spare children. The message is gone with the next request."""


class Requests:
    """What the pool has sent. It is kept in memory that is empty in every fork, and no other object is made of it: no
    program finds another's source.
    """

    def __init__(self):
        self.memory, self.first, self.end = _hidden_memory(1 << 18), 0, 0  # bytes of the current request, and of all

    def _size(self, at: int) -> int:
        """Bytes of the complete request that begins there, or 0."""
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
        """Whether something has come after the current request."""
        return self.end > self.first or bool(select.select([CONTROL], [], [], timeout_s)[0])

    def next(self) -> Request:
        """The next one; waits for it. Raises EOFError when the pool closes its socket."""
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
        """Forgets the request after the current one, if it has come."""
        if size := self._size(self.first):
            self._drop(self.first, self.first + size)
        return size > 0

    def read(self) -> None:
        """What has come, a part of a request perhaps; waits for something. Raises EOFError."""
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
            valid = writable(value, inside.TEXT_CHARS)
        valid = valid and writable(detail, inside.DETAIL_CHARS) and isinstance(cut, bool)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return {"status": status, "value": value, "detail": detail, "cut": cut} if valid else None


def writable(text: str, characters: int) -> bool:
    """Whether it is no longer than that and has no lone surrogate, which UTF-8 lacks; an error if it is not text."""
    return len(text) <= characters and len(text.encode()) >= 0


def write(fd: int, data: bytes | memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


def send(message: dict | None) -> None:
    """Raises EOFError when the pool has closed its socket."""
    try:
        write(CONTROL, json.dumps(message).encode() + b"\n")
    except ConnectionError:
        raise EOFError from None
