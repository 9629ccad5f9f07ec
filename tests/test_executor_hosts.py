"""The executor on unusual hosts: it starts, or it ends with one clear line."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from executor_tools import body, linux, patched_zygote, wait_until, zygotes
from test_executor_corners import DENIED, python

from reft_jax import executor
from reft_jax.executor import InfrastructureError, process, run_programs, start

# what: (families of system calls that are refused, options of denied.py); each must work
ODD = {
    "SIGCHLD and others ignored": ("none", "--ignore=SIGCHLD,SIGINT,SIGALRM,SIGUSR1"),
    "stdin, stdout and stderr closed": ("none", "--close=0,1,2"),
    "stderr closed": ("none", "--close=2"),
    "no /proc": ("none", "--proc=none"),
    "no /proc, no namespaces": ("namespaces", "--proc=none"),
    "/proc read-only": ("none", "--proc=readonly"),
    "capset refused": ("capset", ""),
    "setsid and affinity refused": ("setsid,affinity", ""),
}
REFUSED = {
    "prlimit refused": ("prlimit", "", "cannot be set to .* .setrlimit.: "),
    "capset refused, no seccomp": ("capset,seccomp", "", "cannot be given up .capset.: "),
    "no seccomp, namespaces or /proc": ("seccomp,namespaces", "--proc=none", "nothing finds the processes"),
}


def host(families: str, option: str, *words: str) -> dict:
    if option.startswith(("--proc", "--first")) and os.getuid() != 0:
        pytest.skip("only root changes /proc")
    found, environment = python(False)
    script = DENIED.replace("denied.py", "executor_host.py")
    command = [sys.executable, DENIED, families, *filter(None, [option]), "--", found, script, *words]
    reader, writer = os.pipe()
    environment = environment | {"SAY": str(writer)}
    run = subprocess.run(command, env=environment, pass_fds=[writer], capture_output=True, timeout=120, check=False)
    os.close(writer)
    with open(reader) as answer:
        said = answer.read()
    assert run.stderr == b"" and said, run.stderr.decode()
    return json.loads(said)


@linux
@pytest.mark.parametrize("what", ODD)
def test_odd_host(what):
    said = host(*ODD[what])
    assert said.get("wrong") == [] and said["retries"] == said["dead"] == 0, said


@linux
@pytest.mark.parametrize("what", REFUSED)
def test_a_host_that_refuses_too_much_is_told_in_one_line(what):
    families, option, told = REFUSED[what]
    error = host(families, option)["error"]
    assert "\n" not in error
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(error)


@linux
@pytest.mark.parametrize("families", ["none", "namespaces", "namespaces,setsid"])
def test_process_1_collects_what_a_lost_zygote_leaves(families):
    said = host(families, "--first", "lose")
    assert said["wrong"] == [] and said["retries"] == 1 and said["dead"] == 0, said


def test_a_zygote_with_another_python_is_refused(fresh):
    """It is told where this Python's library is; then the library that it really uses is compared."""
    fresh.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    change = "zygote.sys.version = 'another ' + zygote.os.environ.get('LD_LIBRARY_PATH', '')"
    fresh.setattr(process, "COMMAND", patched_zygote(change))
    with pytest.raises(InfrastructureError, match="would run with the python another /opt/python/lib, not 3"):
        start(1, 351)
    moved = "zygote.os.__file__ = '/usr/lib/python3/os.py'\nzygote.files.restrict = lambda packages: 0"
    fresh.setattr(process, "COMMAND", patched_zygote(moved, "zygote.files.own_root = zygote.files.restrict"))
    with pytest.raises(InfrastructureError, match="would run with the library /usr/lib/python3, not "):
        start(1, 351, allow_unsandboxed=True)


@linux
@pytest.mark.parametrize("what", ["during_a_call", "holds_no_socket"])
def test_a_host_that_forks(what):
    script = DENIED.replace("denied.py", "executor_fork.py")
    run = subprocess.run([sys.executable, script, what], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr


@linux
def test_shutdown_during_a_call_ends_its_zygotes_when_it_ends(fresh):
    start(2, 354)
    answers = []
    programs = [body("import time", "time.sleep(0.1)", f"return {i}") for i in range(10)]
    thread = threading.Thread(target=lambda: answers.extend(run_programs(programs, memory_mb=354)))
    thread.start()
    time.sleep(0.25)
    working = zygotes(354)
    executor.shutdown()
    thread.join()
    assert [answer.value for answer in answers] == list(range(10))
    assert working and wait_until(lambda: not working & zygotes(354))
