"""Progress on a real pseudo terminal, as `pyte` shows it: the live block, and what is printed while it lives."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from reft_jax.train.progress import BARS, sparkline

pyte = pytest.importorskip("pyte")
ROOT = Path(__file__).resolve().parents[1]
BEGIN = """
import logging, os, sys, time, warnings
from reft_jax import __main__, terminal
from reft_jax.train.progress import Progress, remark
from reft_jax.run.guards import Guards

def wait(mark="ready"):
    terminal.BLOCK._live and terminal.BLOCK._live.refresh()
    print(f"\\x1b]2;{mark}\\a", end="", file=sys.__stderr__, flush=True)
    sys.stdin.readline()

def command(argv):
    logging.getLogger("library").addHandler(logging.StreamHandler())  # it keeps the stream that it finds
    progress = Progress("reft", total=400, unit="iteration", done0=120, first="compiling")
    wait("begun")
    for done in range(121, 151):
        progress.update(done, reward=done / 300, kl=0.0113)
    exec(argv[0], globals() | locals())

__main__.run_command = command
sys.argv = ["reft", sys.argv[1]]
__main__.main()
"""


class Terminal:
    """A command on a pseudo terminal. `mark` reads until the command waits; `rows` is what a person sees then."""

    def __init__(self, code: str, columns: int = 100, **environment):
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        settings = termios.tcgetattr(theirs)
        settings[3] &= ~termios.ECHO  # of what a test types
        termios.tcsetattr(theirs, termios.TCSANOW, settings)
        self.before = termios.tcgetattr(theirs)
        clean = {name: x for name, x in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, code],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=clean | {"TERM": "xterm-256color", "PYTHONUTF8": "1"} | environment,
            start_new_session=True,
        )
        self.screen, self.raw, self._ours, self._theirs = pyte.Screen(columns, 24), "", ours, theirs
        self._stream = pyte.ByteStream(self.screen)
        self.mark("begun")

    def mark(self, name: str = "ready", answer: bool = True) -> list[str]:
        """The rows when the command has said `name`; then it continues."""
        self._read(lambda: f"\x1b]2;{name}\a" in self.raw)
        rows = self.rows
        if answer:
            os.write(self._ours, b"\n")
        return rows

    def end(self) -> int:
        """The exit code. The terminal's settings are those from before, and the cursor was never hidden."""
        self._read(lambda: self.process.poll() is not None and not select.select([self._ours], [], [], 0)[0])
        assert termios.tcgetattr(self._theirs) == self.before
        assert "\x1b[?25l" not in self.raw and self.screen.cursor.x == 0
        os.close(self._ours), os.close(self._theirs)
        return self.process.returncode

    @property
    def rows(self) -> list[str]:
        return [row.rstrip() for row in self.screen.display if row.strip()]

    def _read(self, enough) -> None:
        deadline = time.monotonic() + 120
        while not enough():
            assert time.monotonic() < deadline, self.rows
            if select.select([self._ours], [], [], 0.1)[0]:
                data = os.read(self._ours, 1 << 16)
                self.raw += data.decode()
                self._stream.feed(data)


TOP = re.compile(r"reft  ━+╺━+  150/400 iterations  37 %  left 0:\d\d:\d\d")
BOTTOM = re.compile(r"reward 0.5 [▁-█]{24}  kl 0.0113  \S+ \S+/\S+  elapsed 0:\d\d:\d\d")
LAST = r"reft  150/400 iterations  37 %  left 0:\d\d:\d\d  reward 0.5  kl 0.0113  .*elapsed 0:\d\d:\d\d"
PRINTS = """
wait()
remark("warning: " + "long " * 30)
print("to standard output")
warnings.warn("careful")
logging.getLogger("library").warning("logged")
inner = Progress("reft dev", total=6, unit="completion", first="evaluating")
inner.update(2)
print("half a ", end="", file=sys.stderr)
print("line", file=sys.stderr)
wait("nested")
inner.close()
wait("printed")
progress.close()
"""


def test_a_block_of_two_lines_and_what_is_printed_above_it():
    terminal = Terminal(PRINTS, columns=120)
    top, bottom = terminal.mark()
    assert TOP.fullmatch(top) and BOTTOM.fullmatch(bottom)
    rows = terminal.mark("nested")
    assert TOP.fullmatch(rows[-4]) and BOTTOM.fullmatch(rows[-3])
    assert re.fullmatch(r"reft dev  ━+╺━+  2/6 completions  33 %  left \S+", rows[-2]) and "elapsed" in rows[-1]
    above = " ".join(rows[:-4])
    assert above.startswith("warning: " + " ".join(["long"] * 30) + " to standard output")
    assert "UserWarning: careful" in above and above.endswith("logged half a line")
    assert not re.search(r"\breft\b", above)  # no line of the block; Python 3.13 shows the code that warned
    rows = terminal.mark("printed")
    assert rows[-3].startswith("reft dev  2/6 completions  33 %  left") and TOP.fullmatch(rows[-2])
    assert terminal.end() == 0
    assert re.fullmatch(LAST, terminal.rows[-1]) and not any("━" in row for row in terminal.rows)


def test_forty_columns_and_no_color():
    terminal = Terminal("wait()\nremark('word ' * 12)\nwait('said')", columns=40, NO_COLOR="1")
    top, bottom = terminal.mark()
    assert re.fullmatch(r"reft  ━+╸? +37 %  left 0:\d\d:\d\d", top)
    assert bottom.startswith("reward 0.5  kl 0.0113  ") and len(bottom) <= 40
    *said, top, bottom = terminal.mark("said")
    assert " ".join(said) == " ".join(["word"] * 12) and top.startswith("reft  ━")
    assert terminal.end() == 0 and terminal.rows[-2].startswith("reft  ━")  # what was not closed stays
    assert not re.search(r"\x1b\[[\d;]*m", terminal.raw)


def test_a_dumb_terminal_gets_lines():
    for environment in ({"TERM": "dumb"}, {"CI": "true"}):
        terminal = Terminal("progress.close()", columns=200, **environment)
        assert terminal.end() == 0
        text = re.sub(r"\x1b\]2;begun\a", "", terminal.raw)
        first, second, last = text.replace("\r\n\r\n", "\r\n").split("\r\n")[:3]
        assert first == "reft  120/400 iterations  compiling" and "\x1b" not in text
        assert re.fullmatch(LAST, second) and last == ""


STOPS = """
with Guards() as guards:
    wait()
    while True:
        guards.check()
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("code", "told", "exits"),
    [
        (STOPS, "SIGINT: the run stops at the next safe point; signal again to end it now", 75),
        ("wait()\ntime.sleep(60)", "stopped by SIGINT", 130),
    ],
)
def test_ctrl_c_leaves_a_clean_terminal(code, told, exits):
    terminal = Terminal(code)
    terminal.mark()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == exits
    rows = terminal.rows
    assert rows[0] == told and TOP.fullmatch(rows[1]) and BOTTOM.fullmatch(rows[2])
    assert len(rows) == 3 + (exits == 75) and (exits != 75 or rows[3].startswith("stopped by SIGINT; everything"))


def test_many_updates_are_few_frames_and_no_time():
    code = """
begun = time.process_time()
for done in range(20_000):
    progress.update(150, reward=0.5, kl=0.0113)
    done % 100 or time.sleep(0.01)
print("seconds", time.process_time() - begun)
wait()
"""
    terminal = Terminal(code)
    begun = time.monotonic()
    rows = terminal.mark()
    frames, seconds = terminal.raw.count("150/400"), time.monotonic() - begun
    assert frames <= 2 * seconds + 5
    assert terminal.end() == 0
    assert float(rows[0].removeprefix("seconds ")) < 3  # of processor, for 20,000 updates in 2 s or more


def test_the_course_of_a_number():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 24) == BARS and sparkline([3, 3, 3], 24) == "▁▁▁"
    assert sparkline([9, 0, 7], 2) == "▁█" and sparkline([1], 24) == sparkline([1, 2], 0) == ""
