"""Runs untrusted programs, each in a fork of this small process, which has already loaded what they need.

`python -S zygote.py NUMBER FOLDERS {plain|sympy} MEMORY_MB` sends a greeting over the socket on fd 0, then one answer
per program (JSON lines; see wire.py). Programs run one at a time, in order, until the socket closes. The trainer
executes this file and never forks: a fork of a process with JAX's threads deadlocks, and a program could find the
trainer's memory in its own. FOLDERS hold sympy and mpmath; programs find no other package. NUMBER selects the CPU.

Three processes take part. The *launcher* holds a namespace open and waits. The *zygote* is process 1 of that namespace:
it forks, keeps the time and kills. A *child* runs one program and ends. Children are forked and locked down ahead of
time (`spares`) when the pool says so. A child with the seccomp filter can make no process, so killing it is enough.
Without seccomp there are no spares, and after each program the zygote kills everything the program could have started
(`sweep`). Where the kernel refuses namespaces, the launcher itself is the zygote.

A child sends one byte when it is locked down and, after its program, one line (see child.py). The zygote trusts it only
after `checked` (see wire.py). What the machine did to a child is not an answer: the zygote says "lost".
"""

import contextlib
import gc
import marshal
import math
import os
import resource
import signal
import socket
import sys
import time

import begin
import child as inside
import files
import lockdown
import sysv
from wire import CONTROL, Request, Requests, checked, send, wait_for, write

LINK = 3  # the child's end of its socket
REPORT_BYTES = 4096
PATIENCE_S = 0.02  # a program that takes longer is slow: the one sent after it goes to another zygote
IDLE_S = 0.002  # after so long without a request, stopped children are ended
SURPLUS_S = 0.5  # after so long without a request, spares that nobody asked for are ended
STOPPED = 32  # the most children, stopped and spare, that are kept; more if the pool wants more spares
SMALL_KB = 4096  # memory that a stopped child may have taken beyond what it was forked with
LITTER = 8  # the most children that are forked at once
# Frames below a program's first, <module> to `solve`: by `serve` and `spare` if warm, else by `take` or `litter`.
BELOW = {True: 7, False: 9}
LOCK_S = 10.0  # for a child to lock itself down; it takes about a millisecond
DYING_S = 0.5  # between the end of a child's socket and the end of the child
LATE_S = 5.0  # a deadline is missed by this much only if the machine or the zygote stood still


class NoRoom(Exception):
    """This machine cannot make another child."""


class Zygote:
    def __init__(self, namespace: dict, rules: lockdown.Lockdown, cpus: set[int]):
        self.namespace, self.rules, self.cpus, self.requests = namespace, rules, cpus, Requests()
        self.alone = os.getpid() == 1  # in a PID namespace
        self.wanted = 0
        self.spares: list[tuple[int, int]] = []  # as many as wanted: (process id, our end of its socket)
        self.stopped: list[tuple[int, int]] = []  # have reported; ending one takes longer than most programs
        self.stopping: list[tuple[int, int]] = []  # stopped children whose memory has not been checked yet
        self.children_file = self.events_file = self.segments_file = None
        if not self.alone:
            self.children_file = begin.opened("/proc/thread-self/children")
        if not rules.filter:
            self.events_file = begin.opened("/proc/vmstat")
            self.segments_file = None if self.alone else begin.opened(sysv.TABLE)
            if not self.alone and lockdown.LINUX and self.children_file is None:
                raise OSError("without seccomp, namespaces and /proc nothing finds the processes that a program starts")

    def check(self) -> None:
        """Locks a child down and ends it, to see that this works. Raises OSError if it does not."""
        try:
            self.bury(*self.take())
        except NoRoom as error:
            raise OSError(str(error)) from error
        probe = os.fork()
        if probe == 0:
            os._exit(0)
        self.large = os.wait4(probe, 0)[2].ru_maxrss + SMALL_KB

    def serve(self) -> None:
        """Answers requests until the pool closes its socket."""
        settle = False  # whether to bring the number of spares to the wanted one
        while True:
            if self.stopped and not self.requests.waiting(IDLE_S):
                while self.stopped and not self.requests.waiting():
                    self.bury(*self.stopped.pop())
                self.stopping.clear()
            if not settle and len(self.spares) > self.wanted:  # left over from a call whose end nobody tells us
                settle = not self.requests.waiting(SURPLUS_S)
            while settle and len(self.spares) != self.wanted and not self.requests.waiting():
                if len(self.spares) > self.wanted:
                    self.bury(*self.spares.pop())
                elif not self.spare(warm=True):
                    break
            request = self.requests.next()
            if settle := request.message is None:
                self.wanted = request.more if self.rules.filter else 0
            else:
                self.run(request)

    def spare(self, warm: bool) -> bool:
        """Forks a child for later; returns False if this machine cannot."""
        try:
            self.spares.append(self.fork(warm))
        except OSError:  # no more processes, memory or descriptors
            return False
        return True

    def litter(self, number: int) -> None:
        """Forks several children at once: after every fork the zygote must copy each page that it writes to."""
        for _ in range(number):
            if not self.spare(warm=False):
                break

    def fork(self, warm: bool) -> tuple[int, int]:
        """Forks a child that locks down, runs WARM_UP if `warm` and waits; returns its id and our end of its socket."""
        ours, theirs = socket.socketpair()
        zygote = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                self.live(zygote, theirs.fileno(), warm)
            finally:
                os._exit(0)
        theirs.close()
        return child, ours.detach()

    def live(self, zygote: int, link: int, warm: bool) -> None:
        """Everything that a child does. A failure before it writes its first byte is ours, not the program's.

        The frames below are the zygote's; they hold nothing of other programs: see `Requests`.
        """
        try:
            os.dup2(link, LINK, inheritable=False)
            null = os.open(os.devnull, os.O_RDWR)  # not inherited: all who inherit an open file share its flags
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.closerange(LINK + 1, begin.DESCRIPTORS)
            if not warm:
                begin.roam(0, self.cpus)
            inside.count_from(BELOW[warm])
            self.rules.enter()
            if os.getppid() != zygote:
                return  # the zygote died before `enter` asked for a signal at its death
            if warm:
                inside.solve(inside.WARM_UP, "number", dict(self.namespace))
            os.write(LINK, b"+")
        except BaseException as error:
            os.write(LINK, f"-{type(error).__name__}: {error}"[:200].encode(errors="replace"))
            return
        message = os.read(LINK, 1 << 16)
        if len(message) < (size := 8 + int.from_bytes(message[:8], "little")):
            parts = [message]
            while (size := size - len(parts[-1])) > 0:
                parts.append(os.read(LINK, 1 << 20))
                if not parts[-1]:
                    return  # the zygote is gone
            message = b"".join(parts)
        program, timeout_s, want = marshal.loads(message[8:])
        resource.setrlimit(*lockdown.possible_limit("CPU", math.ceil(timeout_s) + 2))
        write(LINK, inside.solve(program, want, self.namespace))
        if warm:
            os.read(LINK, 1)  # waits for the zygote to end it: ending by itself would delay the next program

    def take(self) -> tuple[int, int]:
        """Returns a locked-down child, a warm one if there is any. Raises NoRoom if none can be made."""
        while True:
            waited = bool(self.spares)
            child, link = self.spares.pop() if waited else self.fresh()
            said = os.read(link, 200) if wait_for([link], time.monotonic() + LOCK_S) else b""
            if said == b"+":
                return child, link
            code = self.bury(child, link)
            if not waited:
                reason = said[1:].decode(errors="replace") or f"exit code {code}"
                raise NoRoom(f"a child could not be locked down: {reason}")

    def fresh(self) -> tuple[int, int]:
        """Forks a child, if need be after ending the stopped ones. Raises NoRoom."""
        try:
            return self.fork(warm=False)
        except OSError:
            while self.stopped:
                self.bury(*self.stopped.pop())
            self.stopping.clear()
        try:
            return self.fork(warm=False)
        except OSError as error:
            raise NoRoom(f"no further process can be made: {error.strerror}") from error

    def run(self, request: Request) -> None:
        """Runs one program and sends the answer."""
        start, killed = time.monotonic(), self.machine_kills()
        self.end_large()
        shared = sysv.segments(self.segments_file)
        while True:
            try:
                child, link = self.take()
            except NoRoom as error:
                return send({"lost": str(error), "verdict": None})
            deadline = time.monotonic() + request.timeout_s
            try:
                write(link, request.message)
                if not self.spares and self.rules.filter:
                    self.litter(min(request.more, LITTER))
                raw, late = self.read_report(child, link, deadline)
                break
            except ConnectionError:  # the child ended before it read the program, so the program never ran
                self.bury(child, link)
        took = {"ms": 1000 * (time.monotonic() - start)}
        answer = checked(raw, request.want) if raw.endswith(b"\n") else None
        if answer and self.rules.filter and took["ms"] < 1000 * PATIENCE_S:  # a slow one may hold much memory
            os.kill(child, signal.SIGSTOP)
            self.stopped.append((child, link))
            self.stopping.append((child, link))
            send(answer | took)
            if len(self.stopped) + len(self.spares) > max(self.wanted, STOPPED):
                self.forget(self.stopped[0])
            return
        lost = None
        if not answer:
            closed = not late and not raw.endswith(b"\n") and len(raw) <= REPORT_BYTES
            lost = self.disturbance(child, deadline if late else None, DYING_S if closed else 0.0)
        code = self.bury(child, link)
        sysv.remove(sysv.segments(self.segments_file), shared)
        if not answer:
            status = "timeout" if late else "refused" if code == -signal.SIGSYS else "killed"
            answer = {"status": status, "value": None, "detail": "" if late else f"exit code {code}", "cut": False}
        if lost:
            reason, perhaps = lost
            mine = perhaps and killed is not None and killed == self.machine_kills()
            return send({"lost": reason, "verdict": answer | took if mine else None})
        send(answer | took)

    def disturbance(self, child: int, deadline: float | None, patience_s: float) -> tuple[str, bool] | None:
        """What the machine may have done to a child that has not reported and is not yet ended; None if nothing.

        Returns the reason, and whether the program could have done it itself. deadline: the one that passed, if any.
        """
        if deadline is not None and time.monotonic() > deadline + LATE_S:
            return "the machine stood still", False
        if not lockdown.LINUX:
            return None
        end, flags = time.monotonic() + patience_s, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        while not (found := os.waitid(os.P_PID, child, flags)) and time.monotonic() < end:
            time.sleep(0.001)
        if not found or found.si_code == os.CLD_EXITED:
            return None
        by = f"its process was {'stopped' if found.si_code == os.CLD_STOPPED else 'ended'} by signal {found.si_status}"
        if found.si_status == signal.SIGKILL:
            return by, not self.rules.filter
        exposed = not self.rules.filter and not self.alone  # to programs of other zygotes
        return (by, True) if exposed else None

    def machine_kills(self) -> int | None:
        """Number of processes that this machine ended for lack of memory; None if unknown or if the filter works."""
        if self.events_file is None:
            return None
        _, found, rest = os.pread(self.events_file, 1 << 16, 0).partition(b"\noom_kill ")
        return int(rest.split(b"\n")[0]) if found else None

    def read_report(self, child: int, link: int, deadline: float) -> tuple[bytes, bool]:
        """Reads until the end of a line, the child's death or the deadline; returns the bytes and whether it is late.

        Raises ConnectionError if the child died before it read its program; EOFError when the pool is gone.
        """
        raw, patience = b"", min(deadline, time.monotonic() + PATIENCE_S)
        while not raw.endswith(b"\n") and len(raw) <= REPORT_BYTES:
            if not wait_for([link], patience) and not self.wait_long(child, link, deadline):
                return raw, True
            chunk = os.read(link, REPORT_BYTES)
            if not chunk:
                break
            raw += chunk
        return raw, False

    def wait_long(self, child: int, link: int, deadline: float) -> bool:
        """`wait_for` while a slow program runs: hands the programs after it back to the pool, for another zygote.

        Returns whether the child reported in time. Raises EOFError when the pool closes its socket.
        """
        begin.roam(child, self.cpus)
        while True:
            while self.requests.give_back():
                send(None)
            ready = wait_for([link, CONTROL], deadline)
            if CONTROL not in ready:
                return bool(ready)
            self.requests.read()

    def end_large(self) -> None:
        """Ends the stopped children that have taken much memory. The kernel knows how much once they have stopped."""
        waiting = []
        for entry in self.stopping:
            child, status, usage = os.wait4(entry[0], os.WUNTRACED | os.WNOHANG)
            if child == 0:
                waiting.append(entry)
            elif not os.WIFSTOPPED(status):  # it ended first
                self.stopped.remove(entry)
                os.close(entry[1])
            elif usage.ru_maxrss > self.large:
                self.stopped.remove(entry)
                self.bury(*entry)
        self.stopping = waiting

    def forget(self, entry: tuple[int, int]) -> None:
        """Ends a stopped child."""
        self.stopped.remove(entry)
        if entry in self.stopping:
            self.stopping.remove(entry)
        self.bury(*entry)

    def bury(self, child: int, link: int) -> int:
        """Kills and reaps a child and what it may have started; returns its exit code (-n for signal n)."""
        if self.rules.filter:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if self.rules.filter else self.sweep(child)
        os.close(link)  # not before: a child that writes would end by itself, with another exit code
        return code

    def sweep(self, child: int) -> int:
        """`bury` where a child can start others. Kills everything that this zygote started, so no spares may exist."""
        code = None
        while True:
            if self.alone:  # -1 means every process in our namespace except this one
                targets = [-1]
            else:
                targets = [-child, child] if code is None else []  # a reaped id may soon belong to another process
                if self.children_file is not None:
                    targets += map(int, os.pread(self.children_file, 1 << 16, 0).split())
            for target in targets:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: no kill of a zombie's group
                    os.kill(target, signal.SIGKILL)
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return code
            if pid == child:
                code = os.waitstatus_to_exitcode(status)


def prepare(number: str, folders: str, kind: str, memory_mb: str) -> tuple[Zygote, dict]:
    """Sets this process up as a zygote; returns it with its greeting. Raises OSError and ImportError."""
    with contextlib.suppress(OSError):
        os.setsid()
    cpus = begin.settle_on_a_cpu(int(number))
    begin.allow_descriptors()
    library = [path for path in sys.path if path not in ("", os.path.dirname(__file__))]
    namespace, packages = begin.load(folders, kind, library)
    sys.argv, sys.dont_write_bytecode = [""], True
    os.environ.clear()
    protections = []
    if lockdown.LINUX:
        lockdown.name_process()
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # if memory runs out, the host kills this process before the trainer
    if isolated := begin.launch():
        protections.append("pid+net+ipc namespaces")
    rules = lockdown.Lockdown(int(memory_mb))
    zygote = Zygote(namespace, rules, cpus)
    closed = False
    if abi := files.restrict(packages):
        protections.append(f"Landlock ABI {abi}")
        closed = True
    elif isolated and files.own_root(packages):
        protections.append("mount namespace")
        closed = True
    if seen := begin.opened(__file__):  # a program must not be able to read this file
        os.close(seen)
        closed = False
    stdlib = os.path.dirname(os.__file__)
    rules.renounce(closed, [stdlib, os.__file__, *(os.path.join(path, "__init__.py") for path in packages)])
    inside.shift_limits()
    greeting = {"protections": protections + rules.protections, "files_closed": closed}
    return zygote, greeting | {"python": sys.version, "library": os.path.realpath(stdlib)}


def main(*words: str) -> None:
    begin.own_signals()
    try:
        zygote, greeting = prepare(*words)
        zygote.check()
        for _ in range(20):  # Python makes some objects at the first or tenth use: make them here, not in every child
            inside.solve(inside.WARM_UP, "number", dict(zygote.namespace))
        gc.collect()
        gc.freeze()  # garbage collection in a child then leaves these pages shared
    except (OSError, ImportError) as error:
        return send({"error": str(error)})
    with contextlib.suppress(EOFError):
        send({"error": None} | greeting)
        zygote.serve()
    for child in zygote.spares + zygote.stopped:
        zygote.bury(*child)


if __name__ == "__main__":
    main(*sys.argv[1:])
