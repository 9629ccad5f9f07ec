"""A failure of the machine never counts against a program: killed children; little memory, processes, descriptors."""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

import pytest
from executor_tools import body, linux, patched_zygote, run_one, wait_until, zygotes
from test_executor_corners import denied

from reft_jax import executor
from reft_jax.executor import InfrastructureError, calls, pool, process, room, run_programs, start

SLEEPS = body("import time", "time.sleep(1.5)", "return 7")
GROUPS = Path("/sys/fs/cgroup")


def parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def children(memory_mb: int, isolated: bool) -> set[int]:
    """Processes forked by a zygote: below it, and below its launcher where there is one."""
    above = {os.getpid()}
    for _ in range(2 if isolated else 1):
        above |= {pid for pid in zygotes(memory_mb) if parent(pid) in above}
    return {pid for pid in zygotes(memory_mb) if parent(pid) in above} - above


@contextlib.contextmanager
def killer(memory_mb: int, isolated: bool, times: int):
    """Kills children that have had a program for 0.1 s, as an operator or a machine without memory does."""
    done, killed = threading.Event(), []

    def work():
        while not done.wait(0.02) and len(killed) < times:
            seen = children(memory_mb, isolated)
            done.wait(0.1)
            for pid in seen & children(memory_mb, isolated):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
                    killed.append(pid)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        done.set()
        thread.join()


@linux
def test_a_child_that_the_machine_kills_runs_again_and_then_is_an_error(fresh):
    line = start(1, 341)
    if "seccomp" not in line:
        pytest.skip("a program may send itself the signal here")
    isolated, retries = "namespaces" in line, executor.counts()["retries"]
    with killer(341, isolated, 1) as killed:
        assert run_one(SLEEPS, timeout_s=20, memory_mb=341)[:2] == (7.0, "ok")
    assert len(killed) == 1 and executor.counts()["retries"] == retries + 1
    with killer(341, isolated, 99), pytest.raises(InfrastructureError, match="signal 9.*short of memory"):
        run_one(SLEEPS.replace("1.5", "4"), timeout_s=20, memory_mb=341)
    assert run_one(SLEEPS, timeout_s=20, memory_mb=341).value == 7


@linux
def test_signals_to_everything_on_a_machine_change_no_verdict(fresh):
    """As Slurm sends them before it takes a machine away."""
    isolated = "namespaces" in start(1, 342)
    found = []

    def signal_all():
        assert wait_until(lambda: children(342, isolated))
        time.sleep(0.1)
        for pid in zygotes(342):
            for number in (1, 2, 3, 10, 12, 15):
                os.kill(pid, number)
            found.append(pid)

    thread = threading.Thread(target=signal_all)
    thread.start()
    assert run_one(SLEEPS, timeout_s=20, memory_mb=342).value == 7
    thread.join()
    assert len(found) >= 2


def test_a_program_does_not_run_out_of_time_while_its_machine_stands_still(fresh):
    """As a container that is paused: its zygote comes back long after the deadline."""
    pause = "def pause(fds, deadline):\n    zygote.time.sleep(deadline - zygote.time.monotonic() + 1)\n    return []\n"
    pause += "wait = zygote.Zygote.wait_long\n"
    pause += "def paused(*a):\n    zygote.wait_for = pause\n    return wait(*a)\nzygote.Zygote.wait_long = paused"
    retries = executor.counts()["retries"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "COMMAND", patched_zygote("zygote.LATE_S = 0.5", pause))
        start(1, 342)
    assert run_one(body("import time", "time.sleep(0.2)", "return 7"), timeout_s=1, memory_mb=342).value == 7
    assert executor.counts()["retries"] == retries + 1


@linux
def test_spares_have_one_cap_over_calls_threads_and_kinds(fresh):
    if "seccomp" not in (line := start(2, 343)):
        pytest.skip("no spares without seccomp")
    fresh.setattr(executor.pool, "SPARES", 40)

    def call(number: int) -> None:
        run_programs([body(f"return {number * 100 + i}") for i in range(30)], memory_mb=343 + number % 2, timeout_s=60)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    call(5)

    isolated = "namespaces" in line

    def spares() -> int:
        return sum(len(children(memory_mb, isolated)) for memory_mb in (343, 344))

    assert wait_until(lambda: 0 < spares() <= 40), spares()
    time.sleep(0.3)
    assert spares() <= 40


@linux
def test_stopped_children_that_hold_megabytes_end_at_once(fresh):
    """Others wait until their zygote has time, which here it never has. None ends by itself before it is stopped."""
    linger = "live = zygote.Zygote.live\ndef linger(self, *a):\n    live(self, *a)\n    zygote.time.sleep(60)\n"
    lines = ["zygote.IDLE_S = 3600", "zygote.PATIENCE_S = 60", linger + "zygote.Zygote.live = linger"]
    fresh.setattr(process, "COMMAND", patched_zygote(*lines))
    line = start(1, 345)
    if "seccomp" not in line:
        pytest.skip("no child is stopped without seccomp")
    isolated = "namespaces" in line
    for size, kept in ((0, 10), (24 << 20, 0)):
        programs = [body("global held", f"held = b'x' * {size}", f"return len(held) + {i}") for i in range(12)]
        batch = calls.Stream(20.0, 1, "number", 345)  # not closed: that would have spares made
        assert [batch.submit(program).result().value for program in programs] == [size + i for i in range(12)]
        assert len(children(345, isolated)) >= kept
    for _ in range(5):  # a program looks at those that have stopped; on a busy machine a child stops late
        time.sleep(0.5)
        assert batch.submit(body("return 1")).result().value == 1
        if not (large := [pid for pid in children(345, isolated) if resident(pid) > 20 << 20]):
            break
    assert not large


@linux
def test_children_made_before_a_call_end_after_it(fresh):
    """The end of a process takes longer than most programs: it must not delay the next one."""
    fresh.setattr(process, "COMMAND", patched_zygote("zygote.IDLE_S = 3600", "zygote.PATIENCE_S = 60"))
    if "seccomp" not in (line := start(1, 346)):
        pytest.skip("no child is made before a call without seccomp")
    isolated, programs = "namespaces" in line, [body(f"return {i}") for i in range(12)]
    pool.keep_spares((False, 346), 1, len(programs))
    assert wait_until(lambda: len(children(346, isolated)) == 15)
    made = children(346, isolated)
    batch = calls.Stream(20.0, 1, "number", 346)  # not closed: that would have spares made
    assert [batch.submit(program).result().value for program in programs] == list(range(12))
    time.sleep(0.1)
    assert children(346, isolated) == made


def resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def failing(times: int, error: Exception, real):
    """`real`, but for the first calls, which fail."""
    left = [error] * times

    def call(*args, **kwargs):
        if left:
            raise left.pop()
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("what", ["thread", "process", "descriptor"])
def test_what_cannot_be_made_is_tried_again_then_an_error_that_the_next_call_recovers_from(fresh, what):
    target, name, error = {
        "thread": (calls.threading.Thread, "start", RuntimeError("can't start new thread")),
        "process": (process.subprocess, "Popen", BlockingIOError(11, "Resource temporarily unavailable")),
        "descriptor": (process.socket, "socketpair", OSError(24, "Too many open files")),
    }[what]
    programs = [body(f"return {i}") for i in range(20)]
    for times, works in ((1, True), (99, False), (0, True)):
        executor.shutdown()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, failing(times, error, getattr(target, name)))
            if works:
                assert [result.value for result in run_programs(programs, memory_mb=347)] == list(range(20))
            else:
                with pytest.raises(InfrastructureError, match=error.args[-1]):
                    run_programs(programs, memory_mb=347)


def test_a_zygote_that_cannot_fork_says_so_and_its_program_is_not_scored(fresh):
    refuse = "def refuse(self, warm): raise BlockingIOError(11, 'no process for you')"
    full = "zygote.Zygote.fork = refuse\nzygote.Zygote.check = lambda self: None"
    fresh.setattr(process, "COMMAND", patched_zygote(refuse, full))
    with pytest.raises(InfrastructureError, match="no process for you"):
        run_one(body("return 1"), memory_mb=348)


def test_room_is_what_the_tightest_cgroup_leaves(monkeypatch, tmp_path):
    """Version 2, nested, and version 1; the trainer keeps half."""
    own, groups = tmp_path / "own", tmp_path / "groups"
    monkeypatch.setattr(room, "OWN", own)
    monkeypatch.setattr(room, "CGROUPS", groups)
    monkeypatch.setattr(room, "_machine_memory", lambda: (float(8 << 30), float(6 << 30)))
    monkeypatch.setattr(room, "_user_processes", lambda: float("inf"))

    def write(folder: str, **files: object) -> None:
        (groups / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (groups / folder / name.replace("__", ".")).write_text(f"{text}\n")

    own.write_text("0::/job/step\n")
    write("job/step", memory__max="max", memory__current=50 << 20, pids__max=300, pids__current=40)
    write("job", memory__max=1 << 30, memory__current=700 << 20, memory__stat=f"file 9\ninactive_file {100 << 20}")
    write("job", pids__max=200, pids__current=120)
    assert room.room() == (1 << 30, 424 << 20, 80)
    assert room.room().children(held=0) == 40 and room.room().children(held=100) == 90
    own.write_text("4:memory:/docker/ab\n3:pids:/\n1:name=systemd:/x\n")  # a container that sees its own folder as /
    write("memory", memory__limit_in_bytes=256 << 20, memory__usage_in_bytes=100 << 20)
    write("pids", pids__max="max", pids__current=5)
    assert room.room() == (256 << 20, 156 << 20, float("inf"))
    assert room.room().children(held=0) == 39
    own.unlink()
    assert room.room() == (8 << 30, 6 << 30, float("inf"))


@contextlib.contextmanager
def group(controller: str, file: str, value: str):
    """A new cgroup of version 1 or 2 with this limit, empty again at the end."""
    versions = [GROUPS / controller, GROUPS]
    names = {"memory.max": "memory.limit_in_bytes"} if versions[0].is_dir() else {}
    folder = next(base for base in versions if base.is_dir()) / f"reft_test_{os.getpid()}"
    try:
        folder.mkdir()
        (folder / names.get(file, file)).write_text(value)
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"cgroups cannot be made here: {error}")
    try:
        yield str(folder)
    finally:
        assert wait_until(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


SMALL = {
    "256 MB": ("memory", "memory.max", str(256 << 20)),
    "512 MB": ("memory", "memory.max", str(512 << 20)),
    "120 processes": ("pids", "pids.max", "120"),
    "64 descriptors": "--limit=NOFILE:64",
    "60 processes of a user": "--limit=NPROC:60",
}


def small(what: str, count: int) -> None:
    """Four calls: all verdicts right, and no more children from call to call than there is room for."""
    limit = SMALL[what]
    with contextlib.ExitStack() as stack:
        option = limit if isinstance(limit, str) else f"--join={stack.enter_context(group(*limit))}"
        words = (str(count), "2", "1024")
        run = denied([], "executor_small.py", *words, another_user="NPROC" in option, options=[option])
    assert run.returncode == 0, run.stderr
    line, *said = map(json.loads, run.stdout.splitlines())
    assert ("MiB: a program that takes more" in line) == (what.endswith("MB")), line
    assert [(one["wrong"], one["count"], one["retries"]) for one in said] == [([], count, 0)] * 4
    most = {"256 MB": 64, "512 MB": 128 + 64, "120 processes": 110, "60 processes of a user": 50}.get(what, 512)
    assert max(one["spares"] for one in said) <= most


@linux
@pytest.mark.parametrize("what", ["256 MB", "120 processes", "64 descriptors", "60 processes of a user"])
def test_small_machine(what):
    small(what, 60)


@linux
@pytest.mark.long
@pytest.mark.parametrize("what", SMALL)
def test_a_thousand_programs_on_a_small_machine(what):
    small(what, 250)


OUT_OF_MEMORY = """
from reft_jax import executor
take = "def solution():\\n    import time\\n    x = b'x' * (%d << 20)\\n    time.sleep(0.5)\\n    return %d\\n"
executor.start(2, 1024)
print([one.value for one in executor.run_programs([take % (size, size) for size in (140, 141, 3)], timeout_s=60)])
try:
    executor.run_programs([take % (400, 1), take % (4, 1)], timeout_s=60)
except executor.InfrastructureError as error:
    print(error)
print([one.value for one in executor.run_programs([take % (5, 5), take % (6, 6)], timeout_s=60)])
"""


@linux
def test_a_machine_out_of_memory_scores_nobody():
    """Two programs that fit one by one; one that does not fit; a call after it."""
    with group("memory", "memory.max", str(256 << 20)) as folder:
        run = denied([], "-c", OUT_OF_MEMORY, options=[f"--join={folder}"])
    assert run.returncode == 0, run.stderr
    both, refused, after = run.stdout.splitlines()
    assert (both, after) == ("[140.0, 141.0, 3.0]", "[5.0, 6.0]")
    assert "ended by signal 9" in refused and "short of memory" in refused
