"""Shared by the tests of the executor: programs, the processes they leave, and zygotes with some parts removed."""

import os
import sys
import time
from pathlib import Path

import pytest

from reft_jax.executor import process, run_programs

LINUX = sys.platform == "linux"
linux = pytest.mark.skipif(not LINUX, reason="needs /proc, namespaces or a memory limit")
ZYGOTE_FOLDER = str(Path(process.__file__).parent)

# Lines for `patched_zygote`: a kernel without one of the protections.
NO_NAMESPACE = "zygote.lockdown.isolate = lambda: False"
NO_LANDLOCK = "zygote.files.restrict = lambda packages: 0"
NO_SECCOMP = "zygote.lockdown.seccomp_filter = lambda machine: None"


def body(*lines: str) -> str:
    return "def solution():\n" + "".join(f"    {line}\n" for line in lines)


def run_one(program: str, **options):
    return run_programs([program], **{"timeout_s": 2, "workers": 1, "memory_mb": 256} | options)[0]


def zygotes(memory_mb: int) -> set[int]:
    """Ids of all live processes started for this memory limit: launchers, zygotes and whatever was forked from them."""
    return {pid for pid, state in processes(memory_mb).items() if state != "Z"}


def processes(memory_mb: int) -> dict[int, str]:
    """The same with their states; a zombie has no command line, so those of this process are added."""
    found = {}
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
            state = cmdline.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if words[-3:-1] in ([b"plain", b"%d" % memory_mb], [b"sympy", b"%d" % memory_mb]):
            found[int(cmdline.parent.name)] = state
    return found


def zombies(sessions: set[int]) -> int:
    """Dead processes that nobody has reaped: children of this one, and of these sessions (each zygote begins one).

    Those of others on this machine are not counted.
    """
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session, *_ = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        count += state == "Z" and (int(parent) == os.getpid() or int(session) in sessions)
    return count


def wait_until(condition, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def patched_zygote(*lines: str) -> list[str]:
    """A command for a zygote with some of its parts replaced."""
    setup = [f"import sys; sys.path.insert(0, {ZYGOTE_FOLDER!r})", "import zygote", *lines]
    start = "zygote.main(*sys.argv[1:])"
    return [sys.executable, "-S", "-c", "\n".join([*setup, start])]
