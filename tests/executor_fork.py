"""A trainer that forks: `python executor_fork.py during_a_call|holds_no_socket`. Exit code 0 means success.

It is a separate process, because JAX, which other tests load, warns about every fork.
"""

import contextlib
import os
import sys

import pytest
from executor_tools import body, run_one, wait_until

from reft_jax import executor


def during_a_call() -> None:
    """The fork has its own executor and cannot use the stream; the call continues."""
    executor.start(1, 352)
    with executor.stream(workers=1, memory_mb=352) as batch:
        future = batch.submit(body("import time", "time.sleep(0.5)", "return 7"))
        assert wait_until(future.running)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with pytest.raises(RuntimeError, match="forked from"):
                    batch.submit(body("return 8"))
                batch.cancel()
                batch.close()
                code = 0 if run_one(body("return 9"), memory_mb=353).value == 9 else 2
                executor.shutdown()
            finally:
                os._exit(code)
    assert future.result().value == 7
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def holds_no_socket() -> None:
    """Of a zygote: else it would outlive the trainer for as long as the fork lives."""
    executor.start(1, 352)
    ours = {os.readlink(f"/proc/self/fd/{zygote.socket.fileno()}") for zygote in executor.pool._state.zygotes}
    assert ours
    child = os.fork()
    if child == 0:
        held = set()
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                held.add(os.readlink(f"/proc/self/fd/{name}"))
        os._exit(len(ours & held))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    {"during_a_call": during_a_call, "holds_no_socket": holds_no_socket}[sys.argv[1]]()
