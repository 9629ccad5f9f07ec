"""The pool of zygotes of this process: starts them, lends them to calls, takes them back, counts and ends them."""

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

SPARES = 512  # the most children that wait for the next call, over all zygotes; each takes about 1 MiB
MARGIN = 1.25  # spare children per program of the last call: a zygote may get more than its share of the next call
LOOK_S = 5.0  # seconds between two looks at how many children this machine has room for
SETTLED = 1000  # programs after which the losses before a zygote no longer count

Kind = tuple[bool, int]  # (with sympy?, memory_mb)


class _State:
    """The state that all calls of this process share."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idle: defaultdict[Kind, list[Zygote]] = defaultdict(list)  # the one given back last is last
        self.zygotes: set[Zygote] = set()  # all of them, busy or idle
        self.numbers: defaultdict[Kind, set[int]] = defaultdict(set)  # the numbers of these zygotes
        self.counts: Counter[str] = Counter()
        self.allow_unsandboxed = False
        self.turns = Turns()
        self.most, self.looked = 0, -math.inf  # children that this machine has room for, and when that was measured


class Turns:
    """Lets many threads work together, or one thread alone."""

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
        """Waits until nobody else works, but at most `patience_s` for those that work together.

        A callback of another thread may be waiting for a program that starts only after ours.
        """
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
    """Drops the zygotes in a fork of this process.

    Two processes must not talk to one zygote, and it lives as long as a copy of its socket is open.
    """
    global _state
    for zygote in list(_state.zygotes):
        zygote.socket.close()
    _state = _State()


os.register_at_fork(after_in_child=_forget)


def turns() -> Turns:
    """The turns of this process: together, or alone after the machine disturbed a program."""
    return _state.turns


def new(kind: Kind, lost: int = 0) -> Zygote:
    """Starts a zygote. Raises Disturbed if it does not start, UnprotectedError if the protection is too weak."""
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
    """Takes an idle zygote; None if there is none. The caller returns it with `give`, `bury` or `end`."""
    with _state.lock:
        return _state.idle[kind].pop() if _state.idle[kind] else None


def give(kind: Kind, zygote: Zygote) -> None:
    """Takes back a zygote that has answered everything. Ends it if `shutdown` was called meanwhile."""
    with _state.lock:
        ours = zygote in _state.zygotes
        if ours:
            _state.idle[kind].append(zygote)
    if not ours:
        zygote.end()


def end(kind: Kind, zygote: Zygote) -> None:
    """Ends a zygote that was taken."""
    _strike(kind, zygote)
    zygote.end()


def _strike(kind: Kind, zygote: Zygote) -> None:
    with _state.lock:
        if zygote in _state.zygotes:
            _state.zygotes.discard(zygote)
            _state.numbers[kind].discard(zygote.number)


def bury(kind: Kind, zygote: Zygote) -> int:
    """Kills a zygote that failed; returns how many in a row have now failed."""
    _strike(kind, zygote)
    zygote.kill()
    count("retries")
    return (zygote.lost if zygote.programs < SETTLED else 0) + 1


def make_room() -> None:
    """Ends the idle zygotes and their spare children because this machine is short of something."""
    with _state.lock:
        idle = [(kind, zygote) for kind, waiting in _state.idle.items() for zygote in waiting]
        _state.idle.clear()
    for kind, zygote in idle:
        end(kind, zygote)


def keep_spares(kind: Kind, workers: int, programs: int) -> None:
    """After a call with this many workers and programs, lets its zygotes fork spare children for a similar call.

    All zygotes together keep at most SPARES, and no more than this machine has room for. Other zygotes give up their
    spares first, beginning with the one that has been idle longest.
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
            zygote.spares = number  # set under the lock: other threads count it
    for other, zygote, number in told:
        try:
            zygote.keep_spares(number)
        except InfrastructureError:
            bury(other, zygote)
        else:
            give(other, zygote)


def _most(held: int) -> int:
    """How many children this machine has room for. Measured only every few seconds, because it takes a millisecond."""
    if time.monotonic() > _state.looked + LOOK_S:
        _state.most, _state.looked = room().children(held), time.monotonic()
    return _state.most


def count(*what: str) -> None:
    """Adds one to each of these counters."""
    with _state.lock:
        _state.counts.update(what)


def counts() -> dict[str, int]:
    """Counts since this process began.

    "programs" were run; each status has its own count; "retries" are zygotes lost while they worked, and programs that
    ran again because this machine disturbed them.
    """
    with _state.lock:
        return {"programs": 0, "retries": 0} | _state.counts


def start(workers: int, memory_mb: int, allow_unsandboxed: bool = False) -> str:
    """Starts `workers` zygotes (without sympy) before the first program.

    Returns one line that says what protects this machine from a program, and what the machine is too small for.
    allow_unsandboxed: from now on, run programs even where they can read this machine's files.
    Raises InfrastructureError if no zygote starts; UnprotectedError where programs could read files and that is not
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
            if not _state.idle[kind]:  # try once more, after all other idle zygotes have ended
                make_room()
                give(kind, new(kind))
    return guards.start_line(_state.idle[kind][-1], workers, len(_state.idle[kind]), memory_mb, room())


def check_numbers(**numbers: float) -> None:
    """Raises ValueError unless all of these are whole numbers above 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or number != number or number <= 0 or number != int(min(number, 1 << 62)):
            raise ValueError(f"{name} is {number}; it must be a whole number above 0")


def guarding() -> list[guards.Guard]:
    """Lists the protections from this process's programs, working or not; empty before `start`."""
    with _state.lock:
        some = next(iter(_state.zygotes), None)
    return guards.guards(some) if some else []


@atexit.register
def shutdown() -> None:
    """Ends the idle zygotes now, and the busy ones when their call gives them back. A later call starts new ones."""
    with _state.lock:
        zygotes = [zygote for waiting in _state.idle.values() for zygote in waiting]
        _state.idle.clear()
        _state.numbers.clear()
        _state.zygotes.clear()
    for zygote in zygotes:
        zygote.socket.close()  # all at once, then one by one
    for zygote in zygotes:
        zygote.end()
