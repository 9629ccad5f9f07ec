"""Reads the audit log for the page: how stored answers ended, and the rollouts of chosen iterations.

The log of a long run has millions of lines. It is read once to see what there is, and once more for the rollouts that
the page shows; only these are held in memory.

On the page a rollout is one line of the log, without its purpose and iteration, and its value is text.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reft_jax.page.collect import shown
from reft_jax.run.executions import LOG_NAME, read_executions
from reft_jax.types import InputError

LARGEST = 40_000_000  # characters of the rollouts that a page shows unless iterations are named; not compressed
OTHERS = 250  # characters of a rollout besides its completion, about
LEFT_OUT = ("purpose", "iteration", "program")
Iteration = tuple[str, int]  # (purpose, number)


class Log(NamedTuple):
    """What the audit log has for a page.

    endings: {(item_id, hash of the completion): (outcome, reward, parts, ms)}. iterations: {iteration: characters of
    its rollouts, about}, in order.
    """

    endings: dict[tuple[str, str], tuple]
    iterations: dict[Iteration, int]


def read_log(workdir: Path, wanted: set[tuple[str, str]]) -> Log:
    """Reads the endings of the wanted (item_id, hash of the completion), and which iterations there are."""
    endings: dict[tuple[str, str], tuple] = {}
    sizes: dict[Iteration, int] = {}
    for line in _lines(workdir):
        if (known := (line["item_id"], line["program"])) in wanted:
            endings[known] = line["outcome"], line["reward"], line.get("parts"), line["ms"]
        if "iteration" in line:
            one, size = (line["purpose"], line["iteration"]), OTHERS + len(line["completion"])
            sizes[one] = size + (sizes.get(one, 0) if line["row"] else 0)
    return Log(endings, dict(sorted(sizes.items())))


def _lines(workdir: Path) -> Iterator[dict]:
    return read_executions(workdir / LOG_NAME) if (workdir / LOG_NAME).exists() else iter(())


def chosen(log: Log, named: str = "") -> tuple[list[Iteration], str]:
    """The iterations that the page shows, and a sentence about those that it does not show ("" if it shows all).

    named: `A-B` or `A`, those to show. Else all if they have at most LARGEST characters; or the first, every second,
    third, … and the last of each purpose, as many as that allows. InputError if none has such a number.
    """
    there = list(log.iterations)
    if named:
        low, high = _bounds(named)
        found = [one for one in there if low <= one[1] <= high]
        if not found:
            numbers = [number for _, number in there]
            known = f"the log has {min(numbers)} to {max(numbers)}" if numbers else "the log has none yet"
            raise InputError(f"--iterations={named}: there are no rollouts of such an iteration; {known}")
        return found, _left_out(len(found), len(there), f"those of --iterations={named}")
    purposes = [[one for one in there if one[0] == purpose] for purpose in dict.fromkeys(one[0] for one in there)]
    step, found = 1, there
    while sum(log.iterations[one] for one in found) > LARGEST and step < len(there):
        step += 1
        found = [one for own in purposes for one in dict.fromkeys([*own[::step], own[-1]])]
    return found, _left_out(len(found), len(there), f"the first, the last, and one in {step} between them")


def _bounds(named: str) -> tuple[int, int]:
    low, _, high = named.partition("-")
    if not (low.isdecimal() and (high or low).isdecimal()) or named.endswith("-") or int(low) > int(high or low):
        raise InputError(f"--iterations={named}: write a number or A-B, for example 10-20")
    return int(low), int(high or low)


def _left_out(shown: int, there: int, which: str) -> str:
    if shown == there:
        return ""
    others = "`look --iterations=A-B` makes a page with others"
    return f"This page has the rollouts of {shown} of {there} iterations: {which}. {others}."


def read_rollouts(workdir: Path, iterations: Iterable[Iteration]) -> dict[Iteration, list[dict[str, Any]]]:
    """The rollouts of these iterations; one that was interrupted and repeated counts once, the last time."""
    found: dict[Iteration, list[dict[str, Any]]] = {one: [] for one in iterations}
    for line in _lines(workdir) if found else ():
        lines = found.get((line["purpose"], line.get("iteration")))
        if lines is not None:
            if line["row"] == 0:
                lines.clear()
            kept = {key: value for key, value in line.items() if key not in LEFT_OUT}
            lines.append(kept | {"value": shown(line["value"])})
    return found
