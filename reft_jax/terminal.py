"""Standard output and error for long runs, the live block, and Ctrl-C in commands that have nothing to save."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reft_jax.store import not_written

UNWIND_S = 3.0  # seconds from Ctrl-C to the forced end of the process
INTERRUPTED = 128 + signal.SIGINT


class Stream(io.TextIOWrapper):
    """Text to a descriptor. Once its reader is gone, text goes to /dev/null.

    Raises SaveError if standard output is a file on a full disk: a table must not be lost unnoticed. above: while the
    live block is shown, what takes the text instead, also of a library that has kept this stream.
    """

    above = None

    def write(self, text: str) -> int:
        if self.above:
            return self.above.write(text)
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


class Block:
    """Lines at the end of a terminal, which a thread of `rich` redraws; what is printed meanwhile appears above them.

    A part is a function from the terminal's width to a list of lines, each something that rich renders. The cursor
    stays visible, because a process that ends at once could not show it again.
    """

    PER_SECOND = 2.0

    def __init__(self):
        self._parts: list[Callable[[int], list]] = []
        self._live, self._lines, self._streams = None, 0, []

    @staticmethod
    def possible() -> bool:
        """Whether standard error is a terminal that can redraw lines. CI is taken for a log file."""
        dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown") or os.environ.get("CI")
        stream = sys.stderr
        return isinstance(stream, Stream) and stream.isatty() and not dumb and "utf" in stream.encoding.lower()

    def add(self, part: Callable[[int], list]) -> None:
        """Shows one more part, below the others."""
        self._parts.append(part)
        if self._live is None:
            from rich.console import Console
            from rich.file_proxy import FileProxy
            from rich.live import Live

            console = Console(file=Stream(sys.stderr.buffer, encoding=sys.stderr.encoding), highlight=False)
            console.show_cursor = lambda show=True: False
            how = {"refresh_per_second": self.PER_SECOND, "redirect_stdout": False, "redirect_stderr": False}
            self._live = Live(console=console, get_renderable=lambda: self._rendered(console.width), **how)
            self._live.start()
            self._streams = [one for one in (sys.stdout, sys.stderr) if isinstance(one, Stream) and one.isatty()]
            for stream in self._streams:
                stream.above = FileProxy(console, stream)
        self._live.refresh()

    def remove(self, part: Callable[[int], list]) -> None:
        """Shows one part less; the block vanishes with the last one."""
        self._parts = [one for one in self._parts if one != part]
        if not self._parts:
            self.settle()

    def settle(self) -> None:
        """Ends the block: what it still shows stays, and the next output begins a line."""
        live, self._live = self._live, None
        if live:
            for stream in self._streams:
                stream.above.flush()
                stream.above = None
            live.transient = not self._parts
            live.stop()
            live.console.file.detach()  # it would close the descriptor
        self._parts, self._lines = [], 0

    def above(self, text: str) -> str:
        """The text, which ends in a newline, with the codes that make `os.write` put it above the block."""
        more = max(0, self._lines - 1)
        up = f"\x1b[{more}A" if more else ""
        return f"\r{up}\x1b[J{text}" + more * "\n" if self._lines else text

    def _rendered(self, width: int):
        from rich.console import Group

        lines = [line for part in self._parts for line in part(width)]
        self._lines = len(lines)
        return Group(*lines)


BLOCK = Block()


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
        os.write(2, BLOCK.above("stopped by SIGINT\n").encode())
        end.start()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        end.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)
