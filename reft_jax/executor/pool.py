"""The zygotes of this process: started, lent to calls, given back, counted, ended."""

import atexit
import contextlib
import itertools
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

from . import guards
from .process import Disturbed, InfrastructureError, UnprotectedError, Zygote
from .room import room

SPARES = 512  # children that wait for the next call, at most, over all zygotes; each takes about 1 MiB
MARGIN = 1.25  # spare children for each program of the last call: a zygote may get more than its share of the next
LOOK_S = 5.0
SETTLED = 1000  # programs after which a zygote's predecessors are forgotten

Kind = tuple[bool, int]  # with sympy, memory_mb


class _State:
    """What all calls of this process share."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: defaultdict[Kind, list[Zygote]] = defaultdict(list)  # the one given back last is last
        self.zygotes: set[Zygote] = set()  # all that there are, at work or not
        self.numbers: defaultdict[Kind, set[int]] = defaultdict(set)  # theirs
        self.counts: Counter[str] = Counter()
        self.allow_unsandboxed = False
        self.turns = Turns()
        self.most, self.looked = 0, -math.inf  # children that there is room for, and when that was looked up


class Turns:
    """Threads work together, or one of them alone."""

    def __init__(self):
        self._changed = threading.Condition()
        self._together = self._waiting = 0
        self._alone = False

    @property
    def wanted(self) -> bool:
        """Whether some thread waits to be alone."""
        return self._waiting > 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not (self._waiting or self._alone))
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self, patience_s: float) -> Iterator[None]:
        """Waits so long at most: a callback of another thread may be waiting for what begins only after us."""
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: not (self._together or self._alone), patience_s)
            self._changed.wait_for(lambda: not self._alone)
            self._waiting -= 1
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()


_state = _State()


def _forget() -> None:
    """In a fork of this process: two must not talk to one zygote, which lives as long as a copy of its socket."""
    global _state
    for zygote in list(_state.zygotes):
        zygote.socket.close()
    _state = _State()


os.register_at_fork(after_in_child=_forget)


def turns() -> Turns:
    return _state.turns


def new(kind: Kind, lost: int = 0) -> Zygote:
    """Starts one. Raises Disturbed if it does not start, UnprotectedError where too little protects from programs."""
    state = _state
    with state.lock:
        number = next(number for number in itertools.count() if number not in state.numbers[kind])
        state.numbers[kind].add(number)
    try:
        zygote = Zygote(*kind, number, lost)
    except InfrastructureError as error:
        with state.lock:
            state.numbers[kind].discard(number)
        raise Disturbed(str(error)) from error
    with state.lock:
        state.zygotes.add(zygote)
    if not state.allow_unsandboxed and (lacking := guards.unprotected(zygote)):
        end(kind, zygote)
        raise UnprotectedError(lacking)
    return zygote


def take(kind: Kind) -> Zygote | None:
    """One that waits, if there is one; to be returned by `give`, `bury` or `end`."""
    with _state.lock:
        return _state.idle[kind].pop() if _state.idle[kind] else None


def give(kind: Kind, zygote: Zygote) -> None:
    """Takes back one that has answered all it was asked. After a `shutdown` meanwhile it ends."""
    with _state.lock:
        ours = zygote in _state.zygotes
        if ours:
            _state.idle[kind].append(zygote)
    if not ours:
        zygote.end()


def end(kind: Kind, zygote: Zygote) -> None:
    """Ends one that was taken."""
    _strike(kind, zygote)
    zygote.end()


def _strike(kind: Kind, zygote: Zygote) -> None:
    with _state.lock:
        if zygote in _state.zygotes:
            _state.zygotes.discard(zygote)
            _state.numbers[kind].discard(zygote.number)


def bury(kind: Kind, zygote: Zygote, lost: int) -> int:
    """Kills a zygote that failed; returns how many in a row have failed now."""
    _strike(kind, zygote)
    zygote.kill()
    count("retries")
    return (zygote.lost if zygote.programs < SETTLED else 0) + 1


def make_room() -> None:
    """Ends the zygotes that wait, with their spare children: this machine is short of something."""
    with _state.lock:
        idle = [(kind, zygote) for kind, waiting in _state.idle.items() for zygote in waiting]
        _state.idle.clear()
    for kind, zygote in idle:
        end(kind, zygote)


def keep_spares(kind: Kind, workers: int, programs: int) -> None:
    """Has the zygotes that a call with `workers` used fork spare children for another of as many programs.

    All zygotes together have SPARES at most, and no more than there is room for: others lose theirs first, from the one
    that has waited longest.
    """
    with _state.lock:
        held = sum(zygote.spares for zygote in _state.zygotes)
        most = min(SPARES, _most(held))
        waiting = _state.idle[kind]
        chosen = [waiting.pop() for _ in range(min(workers, len(waiting)))]
        if not chosen:
            return
        each = math.ceil(min(MARGIN * programs, most) / len(chosen))
        excess = held - sum(zygote.spares for zygote in chosen) + each * len(chosen) - most
        others = []
        for other, idle in list(_state.idle.items()):
            while excess > 0 and (found := next((zygote for zygote in idle if zygote.spares), None)):
                idle.remove(found)
                others.append((other, found))
                excess -= found.spares
        each = max(0, each - math.ceil(max(0, excess) / len(chosen)))
        told = [*((other, zygote, 0) for other, zygote in others), *((kind, zygote, each) for zygote in chosen)]
        for _, zygote, number in told:
            zygote.spares = number  # now, for other threads to count
    for other, zygote, number in told:
        try:
            zygote.keep_spares(number)
        except InfrastructureError:
            bury(other, zygote, 0)
        else:
            give(other, zygote)


def _most(held: int) -> int:
    """How many children this machine has room for; looked up every few seconds, for that takes a millisecond."""
    if time.monotonic() > _state.looked + LOOK_S:
        _state.most, _state.looked = room().children(held), time.monotonic()
    return _state.most


def count(*what: str) -> None:
    with _state.lock:
        _state.counts.update(what)


def counts() -> dict[str, int]:
    """Since this process began: "programs" run, how many ended with each status, and "retries": zygotes lost at work
    and programs that this machine disturbed, which ran again."""
    with _state.lock:
        return {"programs": 0, "retries": 0} | _state.counts


def start(workers: int, memory_mb: int, allow_unsandboxed: bool = False) -> str:
    """Starts `workers` zygotes (without sympy) ahead of the first program; says in one line what guards a program, and
    what this machine is too small for.

    allow_unsandboxed: from here on run programs even where they can read this machine's files.
    Raises InfrastructureError if not one starts; UnprotectedError where programs could read files and that is not
    allowed; ValueError on a bad argument.
    """
    check_numbers(workers=workers, memory_mb=memory_mb)
    kind = (False, memory_mb)
    _state.allow_unsandboxed = allow_unsandboxed
    failed = ""
    while len(_state.idle[kind]) < workers and not failed:
        try:
            give(kind, new(kind))
        except Disturbed as error:
            failed = str(error)
            if not _state.idle[kind]:  # once more, for what else waits is ended then
                make_room()
                give(kind, new(kind))
    return guards.start_line(_state.idle[kind][-1], workers, len(_state.idle[kind]), memory_mb, room())


def check_numbers(**numbers: float) -> None:
    """Raises ValueError unless they are whole and above 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or number != number or number <= 0 or number != int(min(number, 1 << 62)):
            raise ValueError(f"{name} is {number}; it must be a whole number above 0")


def guarding() -> list[guards.Guard]:
    """What guards the programs of this process, or does not, in words; empty before `start`."""
    with _state.lock:
        some = next(iter(_state.zygotes), None)
    return guards.guards(some) if some else []


@atexit.register
def shutdown() -> None:
    """Ends the zygotes that wait, and those at work when their call gives them back. A later call starts new ones."""
    with _state.lock:
        zygotes = [zygote for waiting in _state.idle.values() for zygote in waiting]
        _state.idle.clear()
        _state.numbers.clear()
        _state.zygotes.clear()
    for zygote in zygotes:
        zygote.socket.close()  # all at once, then one by one
    for zygote in zygotes:
        zygote.end()
