"""Standard output and error for long runs, and Ctrl-C in commands that have nothing to save."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from reft_jax.store import not_written

UNWIND_S = 3.0  # seconds from Ctrl-C to the forced end of the process
INTERRUPTED = 128 + signal.SIGINT


class Stream(io.TextIOWrapper):
    """Text to a descriptor. Once its reader is gone, text goes to /dev/null.

    Raises SaveError if standard output is a file on a full disk: a table must not be lost unnoticed.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._to_null(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._to_null(error)

    def _to_null(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == 1 and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise not_written("standard output", error) from error


def prepare() -> None:
    """Makes both streams survive a closed pipe or terminal, and replace characters that their encoding lacks."""
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # closed, or a test's
            continue
        stream.flush()
        descriptor = open(stream.fileno(), "wb", closefd=False)
        by_line = stream.line_buffering or name == "stderr"
        options = {"line_buffering": by_line, "write_through": stream.write_through}
        setattr(sys, name, Stream(descriptor, encoding=stream.encoding, errors=errors, **options))


@contextmanager
def one_line_on_ctrl_c() -> Iterator[None]:
    """Inside, SIGINT prints one line and raises KeyboardInterrupt; the process ends within UNWIND_S in any case.

    An import or a callback may swallow the exception, and cleaning up may wait for programs. A second SIGINT ends the
    process at once. If SIGINT is ignored, as in a background job of a shell, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    end = threading.Timer(UNWIND_S, os._exit, [INTERRUPTED])
    end.daemon = True

    def interrupt(number, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, b"stopped by SIGINT\n")
        end.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        end.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)
