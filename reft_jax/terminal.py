"""Standard output and error as a long run needs them: whoever reads them may go away, and any character can come."""

import errno
import io
import os
import sys

from reft_jax.store import not_written


class Descriptor(io.FileIO):
    """A stream's descriptor. What its reader no longer takes goes to /dev/null from then on."""

    def write(self, data) -> int:
        """Raises SaveError if standard output is a file on a full disk; without it a table would be lost unnoticed."""
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if self.fileno() == 1 and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise not_written("standard output", error) from error
            return len(data)


def prepare() -> None:
    """Makes both streams go on when a pipe or a terminal is closed, and replace what their encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or stream is None:  # a test's, or none at all
            continue
        stream.flush()
        raw = Descriptor(stream.fileno(), "w", closefd=False)
        by_line = name == "stderr" or stream.line_buffering
        wrapped = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="replace" if name == "stdout" else "backslashreplace",
            line_buffering=by_line,
            write_through=stream.write_through,
        )
        wrapped.mode = "w"
        setattr(sys, name, wrapped)
