"""Failures of the executor itself: zygotes that are killed, hang or cannot start, and a trainer that dies or forks."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from executor_tools import (
    NO_NAMESPACE,
    NO_SECCOMP,
    ZYGOTE_FOLDER,
    body,
    linux,
    patched_zygote,
    run_one,
    wait_until,
    zygotes,
)

from reft_jax import executor
from reft_jax.executor import InfrastructureError, process, run_programs, shutdown, start


@linux
@pytest.mark.parametrize("which", [min, max])  # the launcher, the last process of all: a zygote or a child of one
def test_a_killed_zygote_changes_no_verdict(fresh, which):
    start(2, 313)
    retries = executor.counts()["retries"]
    programs = [body("import time", "time.sleep(0.02)", f"return {i}") for i in range(40)]
    timer = threading.Timer(0.2, os.kill, (which(zygotes(313)), signal.SIGKILL))
    timer.start()
    results = run_programs(programs, memory_mb=313)
    timer.join()
    assert [r.value for r in results] == list(range(40))
    assert executor.counts()["retries"] == retries + 1


def test_a_zygote_killed_in_the_middle_of_a_thousand_programs(fresh):
    start(2, 319)
    retries = executor.counts()["retries"]
    programs = [body(f"return {i} / 7") for i in range(1000)]
    with executor.stream(memory_mb=319) as batch:
        futures = [batch.submit(program) for program in programs]
        futures[400].result()
        assert not futures[-1].done()
        for zygote in living(319):
            os.kill(zygote.process.pid, signal.SIGKILL)
    assert [future.result().value for future in futures] == [i / 7 for i in range(1000)]
    assert retries < executor.counts()["retries"] <= retries + 2


def living(memory_mb: int) -> list[process.Zygote]:
    """Zygotes of this process, at work or not."""
    found = [z for z in gc.get_objects() if type(z) is process.Zygote and str(memory_mb) in z.process.args]
    return [zygote for zygote in found if zygote.process.returncode is None]


@linux
def test_zygotes_that_keep_dying_are_an_error_that_says_so(fresh):
    start(1, 320)
    done = threading.Event()

    def kill_all():
        while not done.wait(0.05):
            for pid in zygotes(320):
                with contextlib.suppress(ProcessLookupError):  # it fell with one before it
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(InfrastructureError, match="in a row"):
            run_programs([body("import time", "time.sleep(1)", f"return {i}") for i in range(5)], memory_mb=320)
    finally:
        done.set()
        killer.join()


def lose(fresh, patience_s: float, *when: int) -> list:
    """Kills a zygote each time that so many programs have been answered since the last time, until all were.

    Returns the list to which every program is added that is sent, and "lost" for each loss.
    """
    fresh.setattr(process, "COMMAND", patched_zygote(f"zygote.PATIENCE_S = {patience_s}"))
    send, receive = process.Zygote.send, process.Zygote.receive
    sent, answered, left = [], 0, [*when]

    def losing(self, *a):
        nonlocal answered
        if left and answered == left[0]:
            os.killpg(self.process.pid, signal.SIGKILL)
            sent.append("lost")
            left.pop(0)
            answered = 0
        result = receive(self, *a)
        answered += result is not None
        return result

    fresh.setattr(process.Zygote, "send", lambda self, *a: sent.append(a[0]) or send(self, *a))
    fresh.setattr(process.Zygote, "receive", losing)
    return sent


def slow_programs(count: int) -> list[str]:
    return [body("import time", "time.sleep(0.1)", f"return {i}") for i in range(count)]


def test_three_losses_in_a_row_are_an_error_even_with_other_programs_between(fresh):
    lose(fresh, 0.02, 1, 1, 1)
    with pytest.raises(InfrastructureError, match="3 program executors in a row failed"):
        run_programs(slow_programs(5), workers=1)


def test_a_program_sent_ahead_is_not_lost_with_the_one_before_it(fresh):
    """The second one's zygote is lost twice, the first time before it ran: it is not given up."""
    sent = lose(fresh, 60, 0, 1)
    programs = slow_programs(4)
    retries = executor.counts()["retries"]
    assert [r.value for r in run_programs(programs, workers=1)] == list(range(4))
    assert executor.counts()["retries"] == retries + 2
    names = [program if program == "lost" else programs.index(program) for program in sent]
    assert names == [0, 1, "lost", 0, 1, 2, "lost", 1, 2, 3]


def test_a_program_whose_zygotes_are_lost_twice_is_an_error(fresh):
    lose(fresh, 60, 1, 0)
    with pytest.raises(InfrastructureError, match="2 program executors in a row failed"):
        run_programs(slow_programs(4), workers=1)


@linux
def test_a_hung_zygote_is_replaced(fresh):
    fresh.setattr(process, "GRACE_S", 0.5)
    start(1, 314)
    stopped = zygotes(314)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert run_one(body("return 3"), timeout_s=1, memory_mb=314).value == 3
    assert wait_until(lambda: not zygotes(314) & stopped)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-c", "raise SystemExit(3)"],
        patched_zygote("zygote.Zygote.run = lambda *a: sys.exit(4)"),
        patched_zygote("def refuse(self): raise OSError('no limits here')", "zygote.lockdown.Lockdown.enter = refuse"),
        patched_zygote("sys.modules['sympy'] = None"),
    ],
    ids=["does not start", "dies at work", "cannot lock down", "no sympy"],
)
def test_a_broken_executor_is_an_error_and_no_score(fresh, command):
    fresh.setattr(process, "COMMAND", command)
    with pytest.raises(InfrastructureError):
        run_programs([body("return sympy.Integer(1)"), body("return sympy.Integer(2)")])


@linux
def test_start_shutdown_and_reuse(fresh):
    assert start(2, 315).startswith("programs run with: ")
    started = zygotes(315)
    run_programs([body(f"return {i}") for i in range(10)], workers=2, memory_mb=315)
    assert zygotes(315) >= started
    shutdown()
    assert zygotes(315) == set()
    assert run_one(body("return 1"), memory_mb=315).value == 1


@linux
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("missing", ["", NO_NAMESPACE, NO_SECCOMP], ids=["all", "no namespace", "no seccomp"])
def test_zygotes_end_with_their_parent(missing, ending):
    """With programs at work, others waiting and, where there may be any, spare children."""
    trainer = (
        f"from reft_jax.executor import calls, pool, process; process.COMMAND = {patched_zygote(missing)!r}\n"
        "pool.start(2, 316)\n"
        "calls.run_programs([f'def solution(): return {i}' for i in range(6)], memory_mb=316)\n"
        "print('up', flush=True)\n"
        "slow = [f'import time; time.sleep(60{i})' for i in range(6)]\n"
        "calls.run_programs(slow, timeout_s=600, memory_mb=316)\n"
    )
    command = [sys.executable, "-c", trainer]
    with subprocess.Popen(command, cwd=Path(ZYGOTE_FOLDER).parents[1], stdout=subprocess.PIPE) as trainer:
        try:
            assert trainer.stdout.readline() == b"up\n"
            time.sleep(0.3)
            assert len(zygotes(316)) >= 3
        finally:
            trainer.send_signal(ending)
    assert wait_until(lambda: not zygotes(316))


@linux
def test_a_forked_copy_of_the_trainer_leaves_the_zygotes_alone():
    trainer = (
        "import os, sys\n"
        "from reft_jax.executor import calls, pool\n"
        "pool.start(1, 317)\n"
        "mine = pool._state.idle[False, 317][0]\n"
        "if os.fork() == 0: sys.exit()\n"  # runs atexit
        "os.wait()\n"
        "assert calls.run_programs(['def solution(): return 1'], memory_mb=317)[0].value == 1\n"
        "assert pool._state.idle[False, 317] == [mine]\n"
    )
    subprocess.run([sys.executable, "-c", trainer], cwd=Path(ZYGOTE_FOLDER).parents[1], check=True, timeout=60)
