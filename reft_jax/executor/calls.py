"""The programs of one call: sent to zygotes, awaited, cancelled. Tells a bad program from a broken machine."""

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

WINDOW = 256  # programs that `run_programs` has submitted at a time: each costs the trainer about 2 kB
LOST_IN_A_ROW = 3  # lost zygotes, each started to replace the one before it, until a call fails
PROGRAM_KB = 64  # a model's program has about 1 KiB; a much longer one is noise that costs memory and time


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

    A program finds `math`, and `sympy` if it mentions it, without importing them. Equal programs run once. Several
    threads may call this at once.
    want: "number" is `float(solution())`; "text" is `str(solution())`, at most 256 characters.
    timeout_s: wall seconds per program, compiling and converting included; at most 1e6 are used.
    memory_mb: MiB of address space per program, above the interpreter's own.
    program_kb: KiB of UTF-8 that a program may have; a longer one is not run.
    workers: programs that run at once.
    Raises InfrastructureError if a program could not be run on two zygotes, if three zygotes in a row were lost, or if
    this machine ended a program's process twice, the second time while no other program ran; UnprotectedError if the
    kernel gives too little protection (see `start`); ValueError on a bad argument.
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
        # The last one first: waiting for them in order would wake this thread once per program.
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

    At its end it waits for all programs. After an exception it waits only for those that run (at most `timeout_s`) and
    cancels the futures of the others. Raises ValueError on a bad argument.
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
    """The programs of one call; made by `stream`. A fork of this process cannot use it."""

    def __init__(self, timeout_s: float, workers: int, want: str, memory_mb: int, program_kb: int = PROGRAM_KB):
        self.timeout_s, self.workers, self.want, self.memory_mb = timeout_s, workers, want, memory_mb
        self.program_kb, self._process = program_kb, os.getpid()
        self._changed = threading.Condition()  # guards the fields below
        self._futures: dict[str, Future] = {}
        self._waiting: deque[Item] = deque()
        self._ahead: set[Item] = set()  # sent to a zygote that runs another program; may come back
        self._threads: list[threading.Thread] = []
        self._working = 0  # threads that have not left
        self._asked: Counter[Kind] = Counter()
        self._broken: InfrastructureError | None = None
        self._closed = False

    def submit(self, program: str) -> Future:
        """Returns a future of the program's ExecResult, the same one for equal programs.

        The future may raise what `run_programs` raises. Any thread may call this. A callback of a future runs in a
        thread of the executor; an error in it is printed. Raises RuntimeError after the end of the stream and in a
        fork of its process; InfrastructureError if no thread can be started.
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
        """`submit` for programs that all differ: a finished program is not remembered."""
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
        """Starts one more worker if a thread can be had. Raises InfrastructureError if not even the first can start."""
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
        """Cancels the programs that have not started."""
        if os.getpid() != self._process:
            return
        with self._changed:
            for item in (*self._waiting, *self._ahead):
                item.future.cancel()

    def close(self) -> None:
        """Waits for the programs, then lets the zygotes fork spare children for the next call."""
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
        """Runs the first program again, with no other at the same time and all spare memory and processes free."""
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
                        f"a program could not be run, nor again while no other ran (2 program executors in a row "
                        f"failed): {error}; this machine may be short of memory, processes or descriptors"
                    ) from error
                self._answer(under_way, error.verdict)

    def _leave(self) -> bool:
        """Returns whether this worker ends because the machine has no room for all workers; the last one stays."""
        with self._changed:
            if leave := self._working > 1:
                self._working -= 1
            return leave

    def _next(self) -> Item | None:
        """Waits for the next program; None when the stream has ended and no program can come back."""
        with self._changed:
            while not self._waiting and not (self._closed and not self._ahead):
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _next_ahead(self, kind: Kind) -> Item | None:
        """One more program for a busy zygote of this kind, if enough wait for every worker to get one; else None."""
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
        """Marks a program that was sent ahead as running."""
        with self._changed:
            self._ahead.discard(item)
            item.future.set_running_or_notify_cancel()
            if self._closed and not self._ahead:
                self._changed.notify_all()

    def _run(self, under_way: deque[Item], alone: bool = False) -> None:
        """Runs the program on one zygote, and then others of its kind as long as some wait; only this one if `alone`.

        The next program is sent before the answer to the one before it has come. If the zygote is lost, all go to a
        new one; the first program may lose one zygote, not two. Raises Disturbed if the machine was at fault: the
        first program must run again.
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
                if zygote:  # other programs may wait in it
                    pool.end(kind, zygote)
                raise
            except InfrastructureError as error:
                lost = pool.bury(kind, zygote)
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
    """Sets the outcome. An error in a user's callback must not end the thread that runs programs."""
    if future.cancelled():
        return
    try:
        setter(outcome)
    except BaseException:
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))


def _size(program: str) -> int:
    """Bytes of the program in UTF-8."""
    return len(program) if program.isascii() else len(program.encode(errors="surrogatepass"))


def _kind(program: str, memory_mb: int) -> Kind:
    return "sympy" in program or "mpmath" in program, memory_mb
