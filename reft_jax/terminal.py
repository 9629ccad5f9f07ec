"""Standard output and error as a long run needs them, and Ctrl-C where nothing has to be saved."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from reft_jax.store import not_written

UNWIND_S = 3.0  # from Ctrl-C to the end of a process that does not end by itself
INTERRUPTED = 128 + signal.SIGINT


class Stream(io.TextIOWrapper):
    """Text to a descriptor. What its reader no longer takes goes to /dev/null from then on.

    Raises SaveError if standard output is a file on a full disk: without it a table would be lost unnoticed.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._go_on(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._go_on(error)

    def _go_on(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == 1 and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise not_written("standard output", error) from error


def prepare() -> None:
    """Makes both streams go on when a pipe or a terminal is closed, and replace what their encoding lacks."""
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
    """Inside, SIGINT raises KeyboardInterrupt and says so; the process then ends within UNWIND_S, whatever happens.

    An import or a callback may swallow the exception, and what is unwound may wait for programs. A second SIGINT ends
    the process at once. Where SIGINT is ignored, as in a shell's background, it stays so.
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
