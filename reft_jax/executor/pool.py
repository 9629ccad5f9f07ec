"""The zygotes of this process: started, lent to calls, given back, counted, ended."""

import atexit
import itertools
import math
import os
import threading
from collections import Counter, defaultdict

from .process import InfrastructureError, UnprotectedError, Zygote

SPARES = 512  # children that wait for the next call, at most, over the zygotes of one kind; each takes about 1 MiB
MARGIN = 1.25  # spare children for each program of the last call: a zygote may get more than its share of the next
SETTLED = 1000  # programs after which a zygote's predecessors are forgotten

Kind = tuple[bool, int]  # with sympy, memory_mb


class _State:
    """What all calls of this process share."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: defaultdict[Kind, list[Zygote]] = defaultdict(list)
        self.numbers: defaultdict[Kind, set[int]] = defaultdict(set)  # of the zygotes that there are
        self.counts: Counter[str] = Counter()
        self.allow_unsandboxed = False


_state = _State()


def _forget() -> None:
    global _state
    _state = _State()


os.register_at_fork(after_in_child=_forget)  # two processes must not talk to one zygote


def new(kind: Kind, lost: int = 0) -> Zygote:
    """Starts one. Raises InfrastructureError, also where no protection works."""
    with _state.lock:
        number = next(number for number in itertools.count() if number not in _state.numbers[kind])
        _state.numbers[kind].add(number)
    zygote = Zygote(*kind, number, lost)
    if zygote.protections == ["rlimits"] and not _state.allow_unsandboxed:
        zygote.end()
        raise UnprotectedError(
            "this machine guards against a model's programs with limits only: no namespaces, Landlock or seccomp, "
            "so they could read and delete what you can. Use another machine or container, or, if you accept that, "
            "set executor.allow_unsandboxed=true (with solve: --allow_unsandboxed)"
        )
    return zygote


def take(kind: Kind) -> Zygote | None:
    """One that waits, if there is one; to be returned by `give` or `bury`."""
    with _state.lock:
        return _state.idle[kind].pop() if _state.idle[kind] else None


def give(kind: Kind, zygote: Zygote) -> None:
    """Takes back one that has answered all it was asked."""
    with _state.lock:
        _state.idle[kind].append(zygote)


def bury(kind: Kind, zygote: Zygote | None, lost: int) -> int:
    """Ends a zygote that failed, or None for one that did not start; returns how many in a row have failed now."""
    if zygote:
        zygote.kill()
        lost = zygote.lost if zygote.programs < SETTLED else 0
    with _state.lock:
        _state.counts["retries"] += 1
        if zygote:
            _state.numbers[kind].discard(zygote.number)
    return lost + 1


def keep_spares(kind: Kind, workers: int, programs: int) -> None:
    """Has the zygotes that a call with `workers` used fork spare children for another of as many programs."""
    with _state.lock:
        zygotes = [_state.idle[kind].pop() for _ in range(min(workers, len(_state.idle[kind])))]
    number = min(MARGIN * programs, SPARES)
    for zygote in zygotes:
        try:
            zygote.keep_spares(math.ceil(number / len(zygotes)))
        except InfrastructureError:
            bury(kind, zygote, 0)
        else:
            give(kind, zygote)


def count(*what: str) -> None:
    with _state.lock:
        _state.counts.update(what)


def counts() -> dict[str, int]:
    """Since this process began: "programs" run, how many ended with each status, and "retries": zygotes lost at work,
    whose program was given to another."""
    with _state.lock:
        return {"programs": 0, "retries": 0} | _state.counts


def start(workers: int, memory_mb: int, allow_unsandboxed: bool = False) -> str:
    """Starts `workers` zygotes (without sympy) ahead of the first program; says in one line what guards a program.

    allow_unsandboxed: from here on run programs even where the kernel offers nothing but limits.
    Raises InfrastructureError, and UnprotectedError where it offers nothing else and that is not allowed.
    """
    kind = (False, memory_mb)
    _state.allow_unsandboxed = allow_unsandboxed
    while len(_state.idle[kind]) < workers:
        give(kind, new(kind))
    return "programs run with: " + ", ".join(_state.idle[kind][-1].protections)


@atexit.register
def shutdown() -> None:
    """Ends the zygotes that wait; a zygote at work stays until this process ends. A later call starts new ones."""
    with _state.lock:
        zygotes = [zygote for waiting in _state.idle.values() for zygote in waiting]
        _state.idle.clear()
        _state.numbers.clear()
    for zygote in zygotes:
        zygote.socket.close()  # all at once, then one by one
    for zygote in zygotes:
        zygote.end()
