"""What the kernel forbids to a program, with each protection alone and with all, and that nothing is left behind."""

import functools
import gc
import json
import os
import re
import resource
import socket
import subprocess
import threading
import time
import types
from pathlib import Path

import pytest
from executor_tools import (
    LINUX,
    NO_LANDLOCK,
    NO_NAMESPACE,
    NO_SECCOMP,
    body,
    linux,
    patched_zygote,
    processes,
    run_one,
    zombies,
    zygotes,
)
from hostile_programs import HOSTILE

from reft_jax import executor
from reft_jax.executor import UnprotectedError, process, run_programs, shutdown, start

WITHOUT = {"namespaces": NO_NAMESPACE, "Landlock": NO_LANDLOCK, "seccomp": NO_SECCOMP}


@functools.cache
def line() -> str:
    """What guards programs on this machine."""
    said = start(1, 256, allow_unsandboxed=True)
    start(1, 256)
    return said


def need(*protections: str) -> None:
    missing = [name for name in protections if name not in line()]
    if missing:
        pytest.skip(f"this machine's kernel gives a zygote no {' and no '.join(missing)}")


def only(fresh, *protections: str) -> None:
    """Zygotes from here on have these protections and limits, no other."""
    need(*protections)
    fresh.setattr(
        process, "COMMAND", patched_zygote(*(line for name, line in WITHOUT.items() if name not in protections))
    )
    fresh.setattr(executor.pool._state, "allow_unsandboxed", True)


def nobody_can_import() -> bool:
    """Whether this is root, whose Python others can read: programs then run as nobody where files are open."""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/test", "-r", os.__file__]
    return os.getuid() == 0 and LINUX and subprocess.run(command, check=False).returncode == 0


@linux
@pytest.mark.parametrize("protections", [("namespaces",), ("Landlock",), ("seccomp",), ("Landlock", "seccomp")])
def test_the_line_names_what_is_active_and_no_more(fresh, protections):
    only(fresh, *protections)
    open_files = protections == ("seccomp",)
    said = start(1, 330, allow_unsandboxed=open_files)
    assert [name in said for name in WITHOUT] == [name in protections for name in WITHOUT]
    assert ("programs can read files" in said) == open_files
    if open_files:
        with pytest.raises(UnprotectedError, match="can read files.*executor.allow_unsandboxed=true"):
            start(2, 330, allow_unsandboxed=False)
    assert run_one(body("return 1"), memory_mb=330).value == 1


def test_without_protection_nothing_runs_unless_allowed(fresh):
    limits = "another user, rlimits" if nobody_can_import() else "rlimits"
    fresh.setattr(process, "COMMAND", patched_zygote(*WITHOUT.values()))
    for call in (lambda: start(1, 331), lambda: run_one(body("return 1"), memory_mb=331)):
        with pytest.raises(UnprotectedError, match="executor.allow_unsandboxed=true"):
            call()
    assert start(1, 331, allow_unsandboxed=True) == f"programs run with: {limits}; programs can read files"
    fresh.setattr(executor.pool._state, "allow_unsandboxed", True)
    assert run_one(body("return 1"), memory_mb=331).value == 1


CONNECT = ["import socket", "socket.create_connection(('127.0.0.1', {port}), timeout=1)", "return 1"]
ABSTRACT = ["import socket", "socket.socket(socket.AF_UNIX).connect(chr(0) + 'reft_test_{pid}')", "return 1"]
PTRACE = ["import ctypes, os", "libc = ctypes.CDLL(None, use_errno=True)"]
PTRACE += ["code = libc.ptrace(16, os.getppid(), 0, 0)", "raise OSError(ctypes.get_errno(), 'ptrace')"]

# what: (the program, the protections any of which stops it)
FORBIDDEN = {
    "read a file": (["return len(open('/etc/passwd').read())"], ["Landlock"]),
    "list a folder": (["import os", "return len(os.listdir('/'))"], ["Landlock"]),
    "read an installed package": (["return len(open({package!r}).read())"], ["Landlock"]),
    "read another process": (["return len(open('/proc/{pid}/environ').read())"], ["Landlock"]),
    "change a file": (["open({victim!r}, 'r+')", "return 1"], ["Landlock", "seccomp"]),
    "make a file": (["open({victim!r} + '.new', 'x')", "return 1"], ["Landlock", "seccomp"]),
    "remove a file": (["import os", "os.remove({victim!r})", "return 1"], ["Landlock", "seccomp"]),
    "make a link": (["import os", "os.symlink('/', {victim!r} + '.new')", "return 1"], ["Landlock", "seccomp"]),
    "make a folder": (["import os", "os.mkdir({victim!r} + '.new')", "return 1"], ["Landlock", "seccomp"]),
    "connect": (CONNECT, ["Landlock", "seccomp"]),
    "send a datagram": (["import socket", "socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))"], ["seccomp"]),
    "make a process": (["import os", "os.fork()", "return 1"], ["seccomp"]),
    "run a command": (["import os", "os.execv('/bin/sh', ['sh', '-c', 'true'])"], ["Landlock", "seccomp"]),
    "signal the trainer": (["import os", "os.kill({pid}, 0)", "return 1"], ["Landlock", "seccomp"]),
    "signal its zygote": (["import os", "os.kill(os.getppid(), 0)", "return 1"], ["seccomp"]),
    "an abstract socket": (ABSTRACT, ["Landlock", "seccomp"]),
    "signal itself": (["import os", "os.kill(os.getpid(), 15)"], ["seccomp"]),
    "signal everybody": (["import os", "os.kill(-1, 0)", "return 1"], ["seccomp"]),
    "trace its zygote": (PTRACE, ["seccomp"]),
    "share memory": (["import _posixshmem", "_posixshmem.shm_open('/reft', 66, mode=0o600)"], ["Landlock", "seccomp"]),
    "raise a limit for others": (["import os, resource", "resource.prlimit(os.getppid(), 7)", "return 1"], ["seccomp"]),
}  # fmt: skip


@pytest.fixture
def victim(tmp_path):
    """A file that anybody may write, by the rules of the file system."""
    tmp_path.chmod(0o777)
    path = tmp_path / "victim"
    path.write_text("intact")
    path.chmod(0o666)
    yield path
    assert path.read_text() == "intact" and [entry.name for entry in tmp_path.iterdir()] == ["victim"]


def attempt(what: str, victim: Path) -> executor.ExecResult:
    lines, _ = FORBIDDEN[what]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0reft_test_{os.getpid()}")
        abstract.listen()
        words = {"victim": str(victim), "package": pytest.__file__, "pid": os.getpid(), "port": server.getsockname()[1]}
        return run_one(body(*(line.format(**words) for line in lines)), memory_mb=332)


@linux
@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden(what, victim):
    need(*FORBIDDEN[what][1][:1])
    result = attempt(what, victim)
    assert (result.status, result.detail) == ("refused", "PermissionError")


@linux
@pytest.mark.parametrize("protection", ["Landlock", "seccomp"])
def test_forbidden_by_one_protection_alone(fresh, protection, victim):
    only(fresh, protection)
    for what, (_, stopped_by) in FORBIDDEN.items():
        if protection in stopped_by:
            assert attempt(what, victim).status == "refused", what


@linux
def test_namespaces_alone_hide_other_processes_and_networks(fresh):
    only(fresh, "namespaces")
    kill = run_one(body("import os", f"os.kill({os.getpid()}, 0)"), memory_mb=333)
    assert (kill.status, kill.detail) == ("exception", "ProcessLookupError")
    assert run_one(body("import os", "return os.getppid()"), memory_mb=333).value == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        lines = [line.format(port=server.getsockname()[1]) for line in CONNECT]
        assert run_one(body(*lines), memory_mb=333).detail == "OSError"  # there is no route at all


@linux
def test_limits_alone(fresh, victim):
    only(fresh)
    fork = run_one(body("import os", "os.fork()", "return 1"), memory_mb=334)
    assert (fork.status, fork.detail) == ("exception", "BlockingIOError")
    write = run_one(body(f"file = open({str(victim)!r}, 'a')", "file.write('x')", "file.flush()"), memory_mb=334)
    assert write.status in ("exception", "killed")  # the signal of a file over its limit, or its error
    spinning = run_one(body("import resource", "return resource.getrlimit(resource.RLIMIT_CPU)[1]"), memory_mb=334)
    assert spinning.value == 4  # seconds: the timeout of 2 and 2 more


@linux
@pytest.mark.parametrize("missing", WITHOUT)
def test_verdicts_need_no_protection(fresh, missing):
    """A plain program, a lazy import of the library and sympy, with one protection taken away."""
    only(fresh, *(name for name in WITHOUT if name != missing and name in line()))
    programs = [body("return 2"), body("import decimal, statistics, hashlib, zlib, bz2, lzma", "return 3")]
    programs.append(body("from sympy.stats import Die", "return sympy.Rational(8, 2)"))
    assert [r.value for r in run_programs(programs, memory_mb=335)] == [2, 3, 4]


@linux
def test_a_child_sees_what_it_needs_and_nothing_else():
    need("Landlock", "seccomp")
    lines = ["import os, sys", "fds = [fd for fd in range(200) if os.path.exists(f'/dev/fd/{fd}')]"]
    assert run_one(body(*lines, "return len(fds)")).value == 4  # /dev/null three times and its socket
    assert run_one(body("import os", "return len(os.environ)")).value == 0
    assert run_one(body("import os", "return os.getsid(0) == os.getpid()")).value == 1
    assert run_one(body("import sys", "return len(sys.argv[0])")).value == 0


def settled(memory_mb: int) -> int:
    """The number of processes for this memory limit once it has not changed for half a second."""
    count, since = len(zygotes(memory_mb)), time.monotonic()
    end = since + 30
    while time.monotonic() < min(since + 0.5, end):
        time.sleep(0.02)
        if count != (count := len(zygotes(memory_mb))):
            since = time.monotonic()
    return count


@linux
def test_spares_are_made_after_a_call_and_never_used_twice(fresh):
    need("seccomp")
    start(2, 336)
    alone = len(zygotes(336))
    run_programs([body(f"return {i}") for i in range(10)], workers=2, memory_mb=336)
    assert settled(336) == alone + 14  # a quarter more, by the zygote
    mark = ["import builtins, os", "seen = hasattr(builtins, 'mark')", "builtins.mark = 1"]
    texts = run_programs(
        [body(*mark, f"return f'{{seen}} {i}'") for i in range(40)],
        workers=2, memory_mb=336, want="text",
    )  # fmt: skip
    assert [text.value.split()[0] for text in texts] == ["False"] * 40
    assert settled(336) == alone + 50
    fresh.setattr(executor.pool, "SPARES", 64)
    run_programs([body(f"return {i}") for i in range(100)], workers=2, memory_mb=336)
    assert settled(336) == alone + 64
    run_programs([body("return 1"), body("return 2")], workers=2, memory_mb=336)
    assert settled(336) == alone + 4


@linux
def test_a_dead_spare_costs_nobody_a_verdict(fresh):
    need("seccomp")
    start(1, 337)
    before = zygotes(337)
    programs = [body(f"return {i}") for i in range(8)]
    run_programs(programs, workers=1, memory_mb=337)
    assert settled(337) == len(before) + 10
    retries = executor.counts()["retries"]
    for pid in zygotes(337) - before:
        os.kill(pid, 9)
    assert [r.value for r in run_programs(programs, workers=1, memory_mb=337)] == list(range(8))
    assert executor.counts()["retries"] == retries


@linux
def test_a_machine_that_has_no_more_processes_goes_without_spares(fresh):
    need("seccomp")
    refuse = "fork = zygote.Zygote.fork\n"
    refuse += "def few(self, warm):\n    if len(self.spares) >= 3: raise BlockingIOError(11, 'no more')\n"
    refuse += "    return fork(self, warm)\nzygote.Zygote.fork = few"
    fresh.setattr(process, "COMMAND", patched_zygote(refuse))
    retries = executor.counts()["retries"]
    for _ in range(2):
        assert [r.value for r in run_programs([body(f"return {i}") for i in range(20)], workers=1)] == list(range(20))
    assert executor.counts()["retries"] == retries


@linux
@pytest.mark.parametrize("namespace", ["", NO_NAMESPACE])
def test_nothing_survives_where_programs_could_fork(fresh, namespace):
    """No seccomp, no limit on processes: a daemon in a new session, whose parent is gone, ends with the call."""
    fresh.setattr(
        process, "COMMAND", patched_zygote(namespace, NO_SECCOMP, "zygote.lockdown.Lockdown.enter = lambda self: None")
    )
    fresh.setattr(executor.pool._state, "allow_unsandboxed", True)
    daemon = ["import os, time", "if os.fork() == 0:", "    os.setsid()"]
    daemon += ["    if os.fork(): os._exit(0)", "    time.sleep(600)"]
    isolated = "namespaces" in start(1, 311, allow_unsandboxed=True)
    before = zygotes(311)
    assert len(before) == (2 if isolated else 1) and not (isolated and namespace)  # with a launcher, or without
    # The daemon holds the child's socket open, so without a report only the deadline ends the wait.
    for ending, status in [("return 7", "ok"), ("os._exit(1)", "timeout"), ("time.sleep(600)", "timeout")]:
        assert run_one(body(*daemon, "time.sleep(0.2)", ending), timeout_s=1, memory_mb=311).status == status
        assert zygotes(311) == before


class Traces:
    """That a batch of programs leaves no process, zombie, descriptor or memory behind."""

    def __init__(self, memory_mb: int):
        self.memory_mb = memory_mb
        start(4, memory_mb)
        run_programs([body(f"return {i}") for i in range(64)], workers=4, memory_mb=memory_mb)
        self.sessions = zygotes(memory_mb)
        self.zombies, self.threads = zombies(self.sessions), threading.active_count()
        self.fds = len(os.listdir("/proc/self/fd"))
        self.resident = self.rss()

    @staticmethod
    def rss() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def check(self) -> None:
        assert threading.active_count() == self.threads
        assert self.rss() - self.resident < 50 << 20
        self.sessions |= zygotes(self.memory_mb)
        shutdown()
        assert processes(self.memory_mb) == {}
        assert zombies(self.sessions) <= self.zombies
        assert len(os.listdir("/proc/self/fd")) <= self.fds


@linux
@pytest.mark.parametrize("workers", [1, 4])
def test_own_hostile_programs(fresh, workers, tmp_path):
    need(*WITHOUT)
    traces = Traces(338)
    programs = [program for program, _ in HOSTILE.values()]
    results = run_programs(programs, timeout_s=2, workers=workers, memory_mb=338)
    wrong = {
        name: result
        for (name, (_, expected)), result in zip(HOSTILE.items(), results, strict=True)
        if result.status not in expected.split() or (result.status == "ok") != (result.value is not None)
    }
    assert not wrong
    traces.check()


def told_to_write(programs: list[str]) -> set[str]:
    """What is there of the files that the programs name in a temporary folder: other processes write there too."""
    named = {path for text in programs for path in re.findall(r"/(?:tmp|dev/shm)/[\w.]+", text)}
    assert named
    return set(filter(os.path.exists, named))


@linux
@pytest.mark.parametrize(("workers", "timeout_s"), [(4, 2.0), (1, 0.5), pytest.param(1, 2.0, marks=pytest.mark.long)])
def test_shared_hostile_programs(fresh, shared, workers, timeout_s):
    need(*WITHOUT)
    cases = json.loads((shared / "data" / "hostile_programs.json").read_text())
    programs = [eval(case["code_py_expr"]) if "code_py_expr" in case else case["code"] for case in cases]
    traces, before = Traces(318), told_to_write(programs)
    results = run_programs(programs, timeout_s=timeout_s, workers=workers, memory_mb=318)
    for case, result in zip(cases, results, strict=True):
        answered = result.status == "ok"
        assert answered == (result.value is not None), case["id"]
        if case["expect"] == "no_answer":
            assert not answered, (case["id"], result)
        elif case["expect"] != "answer_or_no_answer":
            assert result.value == case["expect"], (case["id"], result)
        for path in case.get("forbid_paths", []):
            assert not Path(path).exists(), case["id"]
    assert told_to_write(programs) <= before
    traces.check()


WORDS = {  # protections that are there: (files closed, words of what their absence means, words that would be wrong)
    ("pid+net+ipc namespaces", "Landlock ABI 7", "seccomp"): (
        True,
        ["no network", "no other file", "little"],
        ["can use"],
    ),
    ("seccomp",): (
        False,
        ["seccomp still keeps programs from network", "your files, answers"],
        ["end this run", "slower"],
    ),
    ("seccomp", "another user"): (False, ["every user of this machine may read"], ["your files"]),
    ("Landlock ABI 7",): (True, ["datagrams", "no other file", "slower"], ["can read", "delete"]),
    ("Landlock ABI 5",): (True, ["end each other and this run"], ["can read"]),
    ("pid+net+ipc namespaces", "mount namespace"): (True, ["their own root folder"], ["can read", "delete"]),
    ("another user",): (False, ["but cannot end this run"], ["delete"]),
    (): (False, ["end each other and this run", "your files", "change and delete"], ["no other file", "keeps"]),
}


@pytest.mark.parametrize("protections", WORDS)
def test_what_a_missing_protection_means_is_said(protections):
    closed, said, unsaid = WORDS[protections]
    zygote = types.SimpleNamespace(protections=[*protections, "rlimits"], files_closed=closed)
    guards = executor.guards.guards(zygote)
    assert [guard.works for guard in guards] == [
        any(name in protection for protection in protections) for name in WITHOUT
    ] + [True]
    text = "; ".join(guard.meaning for guard in guards)
    assert all(words in text for words in said) and not any(words in text for words in unsaid), text
    assert (executor.guards.unprotected(zygote) == "") == closed
