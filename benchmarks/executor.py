"""Compare the executor, with all its protections, with the authors' way of running programs.

    python benchmarks/executor.py [--full] [--workers=2]

"Theirs" does what their code does: a pebble `ProcessPool(8)` made for each call, `exec` inside, a timeout of 10 s, no
other protection. Calls take turns, so both sides see the same machine. The parent is this small process: a parent with
JAX loaded would make each fork of theirs more expensive and would not change ours. Prints every row and rewrites the
table in benchmarks/README.md. Needs a quiet machine; pebble comes with `pip install -e .[test]`.
"""

import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from absl import app, flags
from machine import report
from pebble import ProcessPool

from reft_jax import executor

SWEEP, DUPLICATES = 131_900, 0.3  # programs of an evaluation with 100 samples per question; share of repeated ones
FORKS = """
import os, sys
for _ in range(int(sys.argv[1])):
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)
"""
FLAGS = flags.FLAGS
flags.DEFINE_bool("full", False, f"a sweep of {SWEEP:,} programs instead of a tenth of it")
flags.DEFINE_bool("write", True, "rewrite the table in benchmarks/README.md")
flags.DEFINE_integer("workers", 2, "workers of our executor", lower_bound=1)


def plain_program(number: int) -> str:
    """A program like those that a model writes for a word problem; each number gives another one."""
    rng = random.Random(number)
    price, share, people = rng.randint(2, 90), rng.randint(5, 95), rng.randint(2, 12)
    return f'''def solution():
    """A shop sells {number} boxes at {price} dollars. {share} percent of it goes to {people} people. How much?"""
    boxes = {number}
    price = {price}
    total = boxes * price
    shared = total * {share} / 100
    people = {people}
    each = shared / people
    result = round(each, 2)
    return result
'''


def answer(program: str) -> float:
    namespace: dict = {}
    exec(program, namespace)
    return float(namespace["solution"]())


def theirs(programs: list[str]) -> list[float]:
    with ProcessPool(max_workers=8) as pool:
        return list(pool.map(answer, programs, timeout=10).result())


def ours(programs: list[str]) -> list[float]:
    return [result.value for result in executor.run_programs(programs, workers=FLAGS.workers)]


class Numbers:
    """Makes programs that no call has run before."""

    def __init__(self):
        self.next = 0

    def __call__(self, count: int) -> list[str]:
        self.next += count
        return [plain_program(number) for number in range(self.next - count, self.next)]


def seconds(run: Callable, programs: list[str]) -> float:
    expected = [answer(program) for program in programs]
    start = time.perf_counter()
    values = run(programs)
    took = time.perf_counter() - start
    assert values == expected, f"{run.__name__} gave wrong answers"
    return took


def rates(fresh: Numbers, count: int, rounds: int) -> tuple[list[float], list[float]]:
    """Programs per second of theirs and of ours, one figure per call. Calls are a second apart, as in training."""
    seconds(ours, fresh(count))  # not counted: only the first of a trainer's hundreds of calls finds no spare children
    figures: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip((theirs, ours), figures, strict=True):
            time.sleep(1)
            found.append(count / seconds(run, fresh(count)))
    return figures


def latencies(fresh: Numbers, run: Callable, calls: int) -> list[float]:
    """Milliseconds per call, for calls of one program that are 50 ms apart."""
    found = []
    for _ in range(calls):
        time.sleep(0.05)
        found.append(1000 * seconds(run, fresh(1)))
    return found


def resident() -> float:
    """MiB that this process has in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def sweep(fresh: Numbers, count: int) -> tuple[float, list[float]]:
    """Seconds of one call of ours, and MiB resident before it, during it and after it."""
    distinct = round(count * (1 - DUPLICATES))
    programs = fresh(distinct)
    programs += random.Random(0).choices(programs, k=count - distinct)
    random.Random(1).shuffle(programs)
    expected = [answer(program) for program in programs]
    values: list[float] = []
    ours(programs[:1])
    memory = [resident()]
    watcher = threading.Timer(count / 2000, lambda: memory.append(resident()))
    watcher.start()
    start = time.perf_counter()
    values = ours(programs)
    took = time.perf_counter() - start
    watcher.join()
    memory.append(resident())
    assert values == expected, "wrong answers"
    return took, memory


def bare_loop(count: int) -> float:
    """Seconds for `count` forks that end at once, divided among one small Python process per worker of ours."""
    start = time.perf_counter()
    command = [sys.executable, "-S", "-c", FORKS, str(-(-count // FLAGS.workers))]
    loops = [subprocess.Popen(command) for _ in range(FLAGS.workers)]
    assert not any(loop.wait() for loop in loops)
    return time.perf_counter() - start


def percentile(figures: list[float], share: float) -> float:
    return sorted(figures)[min(len(figures) - 1, int(share * len(figures)))]


def rate_row(fresh: Numbers, count: int, rounds: int) -> str:
    authors, own = (statistics.median(figures) for figures in rates(fresh, count, rounds))
    name = f"programs per second, {count} per call, a second between calls (median of {rounds} calls)"
    return f"| {name} | {authors:,.0f} | {own:,.0f} | {own / authors:.2f}× |"


def latency_rows(fresh: Numbers) -> list[str]:
    own, authors = latencies(fresh, ours, 400), latencies(fresh, theirs, 20)
    half = (statistics.median(authors), statistics.median(own))
    return [
        f"| ms for one plain program, median (of 400 calls; theirs: 20) | {half[0]:.1f} | {half[1]:.2f} |"
        f" {half[0] / half[1]:.0f}× |",
        f"| the same, 99th percentile | | {percentile(own, 0.99):.2f} | |",
    ]


def sweep_row(fresh: Numbers) -> str:
    count = SWEEP if FLAGS.full else SWEEP // 10
    took, memory = sweep(fresh, count)
    bare = bare_loop(round(count * (1 - DUPLICATES)))
    return (
        f"| s for {count:,} plain programs, {DUPLICATES:.0%} of them repeated; left: a bare loop of as many forks and"
        f" exits, {FLAGS.workers} processes | {bare:.1f} | {took:.1f} | {bare / took:.2f}× |\n"
        f"| MiB resident in our parent before, during and after it | | {', '.join(f'{m:.0f}' for m in memory)} | |"
    )


def main(_: list[str]) -> None:
    fresh = Numbers()
    print(said := executor.start(FLAGS.workers, 1024), flush=True)
    lines = ["| | theirs | ours | ratio |", "| --- | --- | --- | --- |"]
    for make in (
        lambda: [rate_row(fresh, 32, 11)],
        lambda: [rate_row(fresh, 400, 7)],
        lambda: latency_rows(fresh),
        lambda: [sweep_row(fresh)],
    ):
        lines += (rows := make())
        print("\n".join(rows), flush=True)
    executor.shutdown()
    report("executor", f"; {said}", lines, FLAGS.write)


if __name__ == "__main__":
    app.run(main)
