"""A trainer on an unusual host: `python executor_host.py [lose]` prints its messages and the results of its programs.

With "lose" a zygote is killed in the middle. The last line gives the number of zombies.
"""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

from executor_corner import honest
from executor_tools import body

from reft_jax import executor
from reft_jax.executor import pool


def dead_children() -> int:
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            count += state == "Z" and int(parent) == os.getpid()
    return count


def lose() -> None:
    """Kills a zygote that has spare children."""
    time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.kill(next(iter(pool._state.zygotes)).process.pid, 9)


def main(*words: str) -> dict:
    programs, answers = honest(40)
    try:
        line = executor.start(2, 349, allow_unsandboxed=True)
        executor.run_programs(programs[:10], memory_mb=349, timeout_s=60)
        thread = threading.Thread(target=lose if "lose" in words else time.time)
        thread.start()
        slow = [body("import time", "time.sleep(0.05)", f"return {i}") for i in range(10)]
        values = [result.value for result in executor.run_programs(slow + programs, memory_mb=349, timeout_s=60)]
        thread.join()
        executor.shutdown()
    except executor.InfrastructureError as error:
        return {"error": str(error)}
    wrong = [pair for pair in zip(values, [*range(10), *answers], strict=True) if pair[0] != pair[1]]
    return {"line": line, "wrong": wrong, "dead": dead_children(), "retries": executor.counts()["retries"]}


if __name__ == "__main__":
    said = json.dumps(main(*sys.argv[1:])) + "\n"
    os.write(int(os.environ.get("SAY", "1")), said.encode())
