"""Standard output and error as a long run needs them: whoever reads them may go away, and any character can come."""

import errno
import io
import os
import sys

from reft_jax.store import not_written


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
