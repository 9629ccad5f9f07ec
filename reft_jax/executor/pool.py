"""The trainer's side: spreads programs over zygotes and tells a bad program from a broken machine."""

import atexit
import contextlib
import itertools
import math
import os
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from .process import ExecResult, InfrastructureError, UnprotectedError, Zygote

SPARES = 384  # children that wait for the next call, at most, over the zygotes of one kind; each takes about 1 MiB
MARGIN = 1.25  # spare children for each program of the last call: a zygote may get more than its share of the next
WINDOW = 256  # programs that `run_programs` has under way: each costs the trainer about 2 kB
LOST_IN_A_ROW = 3  # zygotes, each started because the one before it was lost
SETTLED = 1000  # programs after which a zygote's predecessors are forgotten

Kind = tuple[bool, int]  # with sympy, memory_mb


class Item(NamedTuple):
    """A program on its way to a zygote."""

    kind: Kind
    program: str
    future: Future


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


def run_programs(
    programs: Sequence[str],
    *,
    timeout_s: float = 10.0,
    workers: int = 2,
    want: str = "number",
    memory_mb: int = 1024,
) -> list[ExecResult]:
    """Runs each program and returns what its `solution()` returned, in the order of `programs`.

    A program sees `math`, and `sympy` if it mentions it, without importing them. Equal programs run once.
    want: "number" is `float(solution())`; "text" is `str(solution())`, at most 256 characters.
    timeout_s: wall seconds for one program, compiling and converting included. memory_mb: MiB of address space for one
    program, above the interpreter's own. workers: programs at a time. May be called from several threads at once.
    Raises InfrastructureError if a program could not be run on two zygotes, or if three in a row were lost;
    UnprotectedError if the kernel gives no protection (see `start`); ValueError on a bad argument.
    """
    results: dict[str, ExecResult] = {}
    under_way: deque[tuple[str, Future]] = deque()
    with stream(timeout_s=timeout_s, workers=workers, want=want, memory_mb=memory_mb) as batch:
        for program in dict.fromkeys(programs):
            if len(under_way) >= WINDOW:
                first, future = under_way.popleft()
                results[first] = future.result()
            under_way.append((program, batch._submit(program)))
        results |= {program: future.result() for program, future in under_way}
    return [results[program] for program in programs]


@contextlib.contextmanager
def stream(
    *, timeout_s: float = 10.0, workers: int = 2, want: str = "number", memory_mb: int = 1024
) -> Iterator["Stream"]:
    """Takes programs one by one and runs them meanwhile; the arguments are those of `run_programs`.

    At its end it waits for all programs; if left by an exception, only for those that run (`timeout_s` at most), and
    the others' futures are cancelled. Raises ValueError on a bad argument.
    """
    if want not in ("number", "text"):
        raise ValueError(f"want is {want!r}; it must be 'number' or 'text'")
    if not (timeout_s > 0 and workers > 0 and memory_mb > 0):
        raise ValueError(f"timeout_s {timeout_s}, workers {workers} and memory_mb {memory_mb} must be above 0")
    batch = Stream(timeout_s, workers, want, memory_mb)
    try:
        yield batch
    except BaseException:
        batch.cancel()
        raise
    finally:
        batch.close()


class Stream:
    """Programs of one call; made by `stream`."""

    def __init__(self, timeout_s: float, workers: int, want: str, memory_mb: int):
        self.timeout_s, self.workers, self.want, self.memory_mb = timeout_s, workers, want, memory_mb
        self._changed = threading.Condition()  # guards what follows
        self._futures: dict[str, Future] = {}
        self._waiting: deque[Item] = deque()
        self._ahead: set[Item] = set()  # sent to a zygote that runs another; may come back
        self._threads: list[threading.Thread] = []
        self._asked: Counter[Kind] = Counter()
        self._broken: InfrastructureError | None = None
        self._closed = False

    def submit(self, program: str) -> Future:
        """A future of the program's ExecResult, the same one for equal programs; it may raise what `run_programs` does.

        From any thread. Raises RuntimeError after the end of the stream.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("this stream of programs has ended")
            if program not in self._futures:
                self._futures[program] = self._submit(program)
            return self._futures[program]

    def _submit(self, program: str) -> Future:
        """For programs that differ: nothing is kept of one that has ended."""
        item = Item(_kind(program, self.memory_mb), program, Future())
        with self._changed:
            self._asked[item.kind] += 1
            self._waiting.append(item)
            self._changed.notify()
        if len(self._threads) < self.workers:
            self._threads.append(threading.Thread(target=self._work, name="reft-executor", daemon=True))
            self._threads[-1].start()
        return item.future

    def cancel(self) -> None:
        """Forgets the programs that nothing runs yet."""
        with self._changed:
            for item in (*self._waiting, *self._ahead):
                item.future.cancel()

    def close(self) -> None:
        """Waits for the programs and has children forked for the next call."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for kind, number in self._asked.items():
            _keep_spares(kind, self.workers, min(MARGIN * number, SPARES))

    def _work(self) -> None:
        while item := self._next():
            if not item.future.set_running_or_notify_cancel():
                continue
            under_way = deque([item])  # the first is running; those after it are in `_ahead`
            try:
                if self._broken:  # one failure is enough to know; each may take a minute
                    raise self._broken
                self._run(under_way)
            except BaseException as error:  # whatever it is, somebody waits for this future
                if isinstance(error, InfrastructureError):
                    self._broken = error
                if not (first := under_way.popleft().future).cancelled():
                    first.set_exception(error)
                while under_way:
                    self._put_back(under_way.pop())

    def _next(self) -> Item | None:
        """The next program; waits for one. None when the stream has ended and none can come back."""
        with self._changed:
            while not self._waiting and not (self._closed and not self._ahead):
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _next_ahead(self, kind: Kind) -> Item | None:
        """One more for a zygote of this kind that is at work, if every worker could have one."""
        with self._changed:
            if len(self._waiting) < self.workers or self._waiting[0].kind != kind:
                return None
            self._ahead.add(item := self._waiting.popleft())
            return item

    def _put_back(self, item: Item) -> None:
        with self._changed:
            self._ahead.discard(item)
            self._waiting.appendleft(item)
            self._changed.notify_all()

    def _begin(self, item: Item) -> None:
        """The zygote that has it turns to it now."""
        with self._changed:
            self._ahead.discard(item)
            item.future.set_running_or_notify_cancel()
            if self._closed and not self._ahead:
                self._changed.notify_all()

    def _run(self, under_way: deque[Item]) -> None:
        """Runs the program, and others of its kind as long as some wait, on one zygote, where the next one is sent
        before the former is answered. If the zygote is lost all go to a new one; the first may be lost once.
        """
        kind = under_way[0].kind
        zygote, sent, lost, again, ahead = _take(kind), 0, 0, None, True
        while under_way:
            try:
                zygote = zygote or _new(kind, lost)
                for item in list(under_way)[sent:]:
                    more = math.ceil(len(self._waiting) / self.workers)
                    zygote.send(item.program, self.timeout_s, self.want, more)
                    sent += 1
                if ahead and sent < 2 and (item := self._next_ahead(kind)):
                    under_way.append(item)
                    continue
                result = zygote.receive(self.timeout_s, self.want)
            except UnprotectedError:
                raise
            except InfrastructureError as error:
                lost = _bury(kind, zygote, lost)
                if under_way[0] is again or lost >= LOST_IN_A_ROW:
                    raise InfrastructureError(f"{lost} program executors in a row failed; the last: {error}") from error
                again, zygote, sent = under_way[0], None, 0  # the others never ran
                continue
            sent -= 1
            if ahead := result is not None:
                with _state.lock:
                    _state.counts.update(("programs", result.status))
                first = under_way.popleft().future
                if under_way:
                    self._begin(under_way[0])
                if not first.cancelled():
                    first.set_result(result)
            else:
                self._put_back(under_way.pop())
        with _state.lock:
            _state.idle[kind].append(zygote)


def _kind(program: str, memory_mb: int) -> Kind:
    return "sympy" in program or "mpmath" in program, memory_mb


def _new(kind: Kind, lost: int = 0) -> Zygote:
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


def _take(kind: Kind) -> Zygote | None:
    with _state.lock:
        return _state.idle[kind].pop() if _state.idle[kind] else None


def _bury(kind: Kind, zygote: Zygote | None, lost: int) -> int:
    """Ends a zygote that failed, or None for one that did not start; returns how many in a row have failed now."""
    if zygote:
        zygote.kill()
        lost = zygote.lost if zygote.programs < SETTLED else 0
    with _state.lock:
        _state.counts["retries"] += 1
        if zygote:
            _state.numbers[kind].discard(zygote.number)
    return lost + 1


def _keep_spares(kind: Kind, workers: int, number: float) -> None:
    """Divides `number` spare children among the zygotes that a call with `workers` used."""
    with _state.lock:
        zygotes = [_state.idle[kind].pop() for _ in range(min(workers, len(_state.idle[kind])))]
    for zygote in zygotes:
        try:
            zygote.keep_spares(math.ceil(number / len(zygotes)))
        except InfrastructureError:
            _bury(kind, zygote, 0)
        else:
            with _state.lock:
                _state.idle[kind].append(zygote)


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
        zygote = _new(kind)
        with _state.lock:
            _state.idle[kind].append(zygote)
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
