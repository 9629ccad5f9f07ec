"""The programs of one call: handed to zygotes, waited for, cancelled; a bad program told from a broken machine."""

import contextlib
import math
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from . import pool
from .pool import Kind
from .process import GRACE_S, LONGEST_S, Disturbed, ExecResult, InfrastructureError, UnprotectedError

WINDOW = 256  # programs that `run_programs` has under way: each costs the trainer about 2 kB
LOST_IN_A_ROW = 3  # zygotes, each started because the one before it was lost
PROGRAM_KB = 64  # a model's program has 1 KiB; what is much longer is noise, and costs all memory and time


class Item(NamedTuple):
    """A program on its way to a zygote."""

    kind: Kind
    program: str
    future: Future


def run_programs(
    programs: Sequence[str],
    *,
    timeout_s: float = 10.0,
    workers: int = 2,
    want: str = "number",
    memory_mb: int = 1024,
    program_kb: int = PROGRAM_KB,
) -> list[ExecResult]:
    """Runs each program and returns what its `solution()` returned, in the order of `programs`.

    A program sees `math`, and `sympy` if it mentions it, without importing them. Equal programs run once.
    want: "number" is `float(solution())`; "text" is `str(solution())`, at most 256 characters.
    timeout_s: wall seconds for one program, compiling and converting included; what is above 1e6 counts as that.
    memory_mb: MiB of address space for one program, above the interpreter's own. program_kb: KiB of UTF-8 that a
    program may have; a longer one is not run. workers: programs at a time. May be called from several threads at once.
    Raises InfrastructureError if a program could not be run on two zygotes, if three in a row were lost, or if this
    machine ended a program's process twice, the second time with nothing beside it; UnprotectedError if the kernel
    gives too little protection (see `start`); ValueError on a bad argument.
    """
    results: dict[str, ExecResult] = {}
    under_way: deque[tuple[str, Future]] = deque()
    options = {"timeout_s": timeout_s, "workers": workers, "want": want, "memory_mb": memory_mb}
    with stream(**options, program_kb=program_kb) as batch:
        for program in dict.fromkeys(programs):
            if len(under_way) >= WINDOW:
                first, future = under_way.popleft()
                results[first] = future.result()
            under_way.append((program, batch._submit(program)))
        # From the last one back: who waits for each in turn is woken for each.
        results |= {program: future.result() for program, future in reversed(under_way)}
    return [results[program] for program in programs]


@contextlib.contextmanager
def stream(
    *,
    timeout_s: float = 10.0,
    workers: int = 2,
    want: str = "number",
    memory_mb: int = 1024,
    program_kb: int = PROGRAM_KB,
) -> Iterator["Stream"]:
    """Takes programs one by one and runs them meanwhile; the arguments are those of `run_programs`.

    At its end it waits for all programs; if left by an exception, only for those that run (`timeout_s` at most), and
    the others' futures are cancelled. Raises ValueError on a bad argument.
    """
    if want not in ("number", "text"):
        raise ValueError(f"want is {want!r}; it must be 'number' or 'text'")
    if not timeout_s > 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be above 0")
    pool.check_numbers(workers=workers, memory_mb=memory_mb, program_kb=program_kb)
    batch = Stream(float(min(timeout_s, LONGEST_S)), workers, want, memory_mb, program_kb)
    try:
        yield batch
    except BaseException:
        batch.cancel()
        raise
    finally:
        batch.close()


class Stream:
    """Programs of one call; made by `stream`. A fork of this process cannot use it."""

    def __init__(self, timeout_s: float, workers: int, want: str, memory_mb: int, program_kb: int = PROGRAM_KB):
        self.timeout_s, self.workers, self.want, self.memory_mb = timeout_s, workers, want, memory_mb
        self.program_kb, self._process = program_kb, os.getpid()
        self._changed = threading.Condition()  # guards what follows
        self._futures: dict[str, Future] = {}
        self._waiting: deque[Item] = deque()
        self._ahead: set[Item] = set()  # sent to a zygote that runs another; may come back
        self._threads: list[threading.Thread] = []
        self._working = 0  # threads that have not left
        self._asked: Counter[Kind] = Counter()
        self._broken: InfrastructureError | None = None
        self._closed = False

    def submit(self, program: str) -> Future:
        """A future of the program's ExecResult, the same one for equal programs; it may raise what `run_programs` does.

        From any thread; a callback of a future runs in a thread of the executor's, and what it raises is printed.
        Raises RuntimeError after the end of the stream and in a fork of its process; InfrastructureError if there is no
        thread for it.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this stream of programs belongs to the process that this one was forked from")
        with self._changed:
            if self._closed:
                raise RuntimeError("this stream of programs has ended")
            if program not in self._futures:
                self._futures[program] = self._submit(program)
            return self._futures[program]

    def _submit(self, program: str) -> Future:
        """For programs that differ: nothing is kept of one that has ended."""
        future: Future = Future()
        if (size := _size(program)) > self.program_kb << 10:
            pool.count("programs", "too_long")
            future.set_result(ExecResult(None, "too_long", f"{size} bytes"))
            return future
        item = Item(_kind(program, self.memory_mb), program, future)
        with self._changed:
            if len(self._threads) < self.workers:
                self._start_thread()
            self._asked[item.kind] += 1
            self._waiting.append(item)
            self._changed.notify()
        return future

    def _start_thread(self) -> None:
        """One more worker if this machine has a thread for it; the first one must have."""
        for last in (False, True):
            thread = threading.Thread(target=self._work, name="reft-executor", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    return
                if last:
                    raise InfrastructureError(f"programs need a thread of this process: {error}") from error
                pool.make_room()
            else:
                self._threads.append(thread)
                self._working += 1
                return

    def cancel(self) -> None:
        """Forgets the programs that nothing runs yet."""
        if os.getpid() != self._process:
            return
        with self._changed:
            for item in (*self._waiting, *self._ahead):
                item.future.cancel()

    def close(self) -> None:
        """Waits for the programs and has children forked for the next call."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for kind, number in self._asked.items():
            pool.keep_spares(kind, self.workers, number)

    def _work(self) -> None:
        while item := self._next():
            if not item.future.set_running_or_notify_cancel():
                continue
            under_way = deque([item])  # the first is running; those after it are in `_ahead`
            try:
                if self._broken:  # one failure is enough to know; each may take a minute
                    raise self._broken
                try:
                    with pool.turns().together():
                        self._run(under_way)
                except Disturbed:
                    self._run_alone(under_way)
                    if self._leave():
                        return
            except BaseException as error:  # whatever it is, somebody waits for this future
                if isinstance(error, InfrastructureError):
                    self._broken = error
                first = under_way.popleft().future
                _settle(first, first.set_exception, error)
                while under_way:
                    self._put_back(under_way.pop())

    def _run_alone(self, under_way: deque[Item]) -> None:
        """Runs the first program again, with no other beside it and all spare memory and processes free."""
        while len(under_way) > 1:
            self._put_back(under_way.pop())
        pool.count("retries")
        with pool.turns().alone(self.timeout_s + GRACE_S):
            pool.make_room()
            try:
                self._run(under_way, alone=True)
            except Disturbed as error:
                if error.verdict is None:
                    raise InfrastructureError(
                        f"a program could not be run, nor again with nothing beside it (2 program executors in a row "
                        f"failed): {error}; this machine may be short of memory, processes or descriptors"
                    ) from error
                self._answer(under_way, error.verdict)

    def _leave(self) -> bool:
        """Whether this worker ends, for this machine has no room for all; the last one stays."""
        with self._changed:
            if leave := self._working > 1:
                self._working -= 1
            return leave

    def _next(self) -> Item | None:
        """The next program; waits for one. None when the stream has ended and none can come back."""
        with self._changed:
            while not self._waiting and not (self._closed and not self._ahead):
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _next_ahead(self, kind: Kind) -> Item | None:
        """One more for a zygote of this kind that is at work, if every worker could have one."""
        with self._changed:
            if len(self._waiting) < self._working or self._waiting[0].kind != kind or pool.turns().wanted:
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

    def _run(self, under_way: deque[Item], alone: bool = False) -> None:
        """Runs the program, and others of its kind as long as some wait, on one zygote, where the next one is sent
        before the former is answered; only this one if `alone`. If the zygote is lost all go to a new one; the first
        may be lost once. Raises Disturbed if the machine was at fault, then the first is to run again.
        """
        kind = under_way[0].kind
        zygote, sent, lost, again, ahead = None if alone else pool.take(kind), 0, 0, None, not alone
        while under_way:
            try:
                zygote = zygote or pool.new(kind, lost)
                for item in list(under_way)[sent:]:
                    more = 0 if alone else math.ceil(len(self._waiting) / self.workers)
                    zygote.send(item.program, self.timeout_s, self.want, more)
                    sent += 1
                if ahead and sent < 2 and (item := self._next_ahead(kind)):
                    under_way.append(item)
                    continue
                result = zygote.receive(self.timeout_s, self.want)
            except (UnprotectedError, Disturbed):
                if zygote:  # others may wait in it
                    pool.end(kind, zygote)
                raise
            except InfrastructureError as error:
                lost = pool.bury(kind, zygote, lost)
                if under_way[0] is again or lost >= LOST_IN_A_ROW:
                    raise InfrastructureError(f"{lost} program executors in a row failed; the last: {error}") from error
                again, zygote, sent = under_way[0], None, 0  # the others never ran
                continue
            sent -= 1
            if result is None:
                self._put_back(under_way.pop())
            else:
                self._answer(under_way, result)
            ahead = result is not None and not alone
        pool.give(kind, zygote)

    def _answer(self, under_way: deque[Item], result: ExecResult) -> None:
        pool.count("programs", result.status)
        first = under_way.popleft().future
        if under_way:
            self._begin(under_way[0])
        _settle(first, first.set_result, result)


def _settle(future: Future, setter, outcome: object) -> None:
    """Sets the outcome. What a callback of the user's raises must not end the thread that runs programs."""
    if future.cancelled():
        return
    try:
        setter(outcome)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def _size(program: str) -> int:
    """Bytes in UTF-8."""
    return len(program) if program.isascii() else len(program.encode(errors="surrogatepass"))


def _kind(program: str, memory_mb: int) -> Kind:
    return "sympy" in program or "mpmath" in program, memory_mb
