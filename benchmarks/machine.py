"""Shared by the benchmarks: a line about the machine, the machine's limits, and where tables are written."""

import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

README = Path(__file__).with_name("README.md")


def report(name: str, said: str, lines: list[str], write: bool) -> None:
    """Prints command and machine, followed by `said`. With `write`, also writes that line and the `lines` of the table
    between the marks of benchmark `name` in benchmarks/README.md."""
    text = "\n".join([f"{head()}{said}.", "", *lines])
    print(text.split("\n")[0])
    if not write:
        return
    begin, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- end of {name} -->"
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def head() -> str:
    """The command (without this machine's folders), the machine and its load, in one line."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release().split('-')[0]}"
    load = ", ".join(f"{figure:.1f}" for figure in os.getloadavg())
    words = [re.sub(r"^(--\w+=)/.*/(?=.)", r"\1", word) for word in sys.argv]
    command = f"`python {' '.join(words)}`"
    return f"{command} on {machine}, Python {platform.python_version()}, load average at the end {load}"


def seconds(work: Callable[[], object], times: int) -> float:
    """Median seconds of `times` runs of `work`, after one that is not counted. `work` returns arrays to wait for."""
    import jax

    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        jax.block_until_ready(work())
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


def limits(dtype: str) -> tuple[float, float]:
    """(FLOP/s of a 2048³ matrix product in `dtype`, bytes/s that a copy of 256 MiB reads and writes)."""
    import jax
    import jax.numpy as jnp

    square = jnp.ones((2048, 2048), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    flops = 2 * 2048**3 / seconds(lambda: product(square, square), 9)
    copy, kept = jax.jit(lambda x: x + 1, donate_argnums=0), [jnp.ones(1 << 26, jnp.float32)]

    def copied():
        kept[0] = copy(kept[0])
        return kept[0]

    return flops, 2 * kept[0].nbytes / seconds(copied, 9)
