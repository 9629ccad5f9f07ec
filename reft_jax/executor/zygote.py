"""A small program of its own that runs untrusted programs: one fork each, from a process that is already warm.

`python -S zygote.py NUMBER FOLDERS {plain|sympy} MEMORY_MB` speaks JSON lines over the socket on its fd 0: first a
greeting, then an answer for each program, which run one at a time in the order they come, until the socket closes. It
is exec'd, never forked from the trainer: a fork of a process with JAX's threads deadlocks, and this way no program can
find the trainer's memory in its own. FOLDERS hold sympy and mpmath; no program finds anything else that is installed.
NUMBER says which CPU is its own.

Three processes take part. The *launcher* holds a namespace open and waits. The *zygote* is process 1 of that namespace:
it forks, keeps the time and kills. A *child* runs one program and ends. Children are forked and locked down ahead of
time (`spares`), when the pool says so; with its seccomp filter on, a child can make no process, so to kill it is
enough. Where the kernel has no seccomp there are no spares, and after each program everything that could stem from it
is killed (`sweep`). Where it refuses namespaces the launcher is the zygote.

A child sends one byte when it is locked down and, after its program, one line (see child.py). The zygote believes
nothing in it before `checked` (see wire.py).
"""

import contextlib
import gc
import json
import marshal
import math
import os
import resource
import signal
import socket
import sys
import time
import traceback

import child as inside
import lockdown
from wire import CONTROL, Lines, checked, send, wait_for, write

NULL, LINK = 1, 3  # fds: /dev/null (the zygote's stdout), the child's end of its socket
REPORT_BYTES = 4096
PATIENCE_S = 0.02  # a program that takes longer is slow: the one sent after it goes to another zygote
IDLE_S = 0.002  # without a request: the time to end children
STOPPED = 32  # children that may wait for it or, where more spares are wanted, as many with the spares
LITTER = 8  # children forked at once, at most
LOCK_S = 10.0  # for a child to lock itself down; it takes about a millisecond


class Zygote:
    def __init__(self, namespace: dict, rules: lockdown.Lockdown, cpus: set[int]):
        self.namespace, self.rules, self.cpus, self.requests = namespace, rules, cpus, Lines()
        self.wanted = 0
        self.spares: list[tuple[int, int]] = []  # as many as wanted: (process id, our end of its socket)
        self.stopped: list[tuple[int, int]] = []  # have reported; their end takes longer than most programs
        self.children_file = None
        if os.getpid() != 1:
            with contextlib.suppress(FileNotFoundError):
                self.children_file = os.open("/proc/thread-self/children", os.O_RDONLY)

    def serve(self) -> None:
        """Answers until the pool is gone."""
        settle = False  # whether to see to it that there are as many spares as wanted
        while True:
            if self.stopped and not self.requests.waiting(IDLE_S):
                while self.stopped and not self.requests.waiting():
                    self.bury(*self.stopped.pop())
            while settle and len(self.spares) != self.wanted and not self.requests.waiting():
                if len(self.spares) > self.wanted:
                    self.bury(*self.spares.pop())
                elif not self.spare(warm=True):
                    break
            request = json.loads(self.requests.next())
            if settle := "spares" in request:
                self.wanted = request["spares"] if self.rules.filter else 0
            else:
                self.run(request)

    def spare(self, warm: bool) -> bool:
        """Forks a child for later; returns whether this machine could."""
        try:
            self.spares.append(self.fork(warm))
        except OSError:  # no more processes, memory or descriptors
            return False
        return True

    def fork(self, warm: bool) -> tuple[int, int]:
        """A child that locks itself down, then waits for a program; if `warm`, after a rehearsal."""
        ours, theirs = socket.socketpair()
        zygote = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                if not warm:
                    self.roam(0)
                self.rules.enter()
                if os.getppid() == zygote:  # else it died before `enter` asked to be told
                    run_child(theirs.fileno(), self.namespace, warm)
            except BaseException:
                traceback.print_exc()  # seen if `enter` failed; what the program raises goes to /dev/null
            finally:
                os._exit(0)
        theirs.close()
        return child, ours.detach()

    def take(self) -> tuple[int, int]:
        """A child that is locked down, warm if one is there. Raises RuntimeError if a new one cannot be locked down."""
        while True:
            waited = bool(self.spares)
            child, link = self.spares.pop() if waited else self.fork(warm=False)
            if wait_for([link], time.monotonic() + LOCK_S) and os.read(link, 1) == b"+":
                return child, link
            code = self.bury(child, link)
            if not waited:
                raise RuntimeError(f"a child could not be locked down (exit code {code})")

    def run(self, request: dict) -> None:
        """One program, from the request to our answer."""
        start = time.monotonic()
        # marshal is a third of what JSON costs a child; it goes this way only.
        message = marshal.dumps((request["program"], request["timeout_s"], request["want"]))
        while True:
            child, link = self.take()
            deadline = time.monotonic() + request["timeout_s"]
            try:
                write(link, len(message).to_bytes(8, "little") + message)
                if not self.spares and self.rules.filter:
                    # For the next programs, while this one is at work; several, for after each fork the zygote must
                    # copy all pages that its other work writes to.
                    all(self.spare(warm=False) for _ in range(min(request["more"], LITTER)))
                raw, late = self.read_report(child, link, deadline)
                break
            except ConnectionError:  # it ended before it had read the program, which therefore never ran
                self.bury(child, link)
        took = {"ms": 1000 * (time.monotonic() - start)}
        answer = checked(raw, request["want"]) if raw.endswith(b"\n") else None
        if answer and self.rules.filter and took["ms"] < 1000 * PATIENCE_S:  # else it may hold much memory
            os.kill(child, signal.SIGSTOP)
            self.stopped.append((child, link))
            send(answer | took)
            if len(self.stopped) + len(self.spares) > max(self.wanted, STOPPED):
                self.bury(*self.stopped.pop(0))
            return
        code = self.bury(child, link)
        if not answer:
            status = "timeout" if late else "refused" if code == -signal.SIGSYS else "killed"
            answer = {"status": status, "value": None, "detail": "" if late else f"exit code {code}", "cut": False}
        send(answer | took)

    def read_report(self, child: int, link: int, deadline: float) -> tuple[bytes, bool]:
        """What the child sent up to a line's end, its death or the deadline, and whether it was the deadline.

        Raises ConnectionError if it died before it had read its program; EOFError when the pool is gone.
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
        """`wait_for` when a program takes its time: what comes for after it goes back to the pool, for another zygote.

        Raises EOFError when the pool closes its socket.
        """
        self.roam(child)
        while True:
            while self.requests.complete():
                self.requests.next()
                send(None)
            ready = wait_for([link, CONTROL], deadline)
            if CONTROL not in ready:
                return bool(ready)
            self.requests.read()

    def roam(self, child: int) -> None:
        """Lets a child, or with 0 this process, run on every CPU that we may use.

        A zygote and its spare children have one for them: to wake the other there costs half of what it does elsewhere.
        """
        if lockdown.LINUX:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(child, self.cpus)

    def bury(self, child: int, link: int) -> int:
        """Kills and reaps the child, and what it may have started; returns its exit code (-n for signal n)."""
        os.close(link)
        if not self.rules.filter:
            return self.sweep(child)
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def sweep(self, child: int) -> int:
        """`bury` where a child could start others: nothing else that this zygote started may be alive."""
        code = None
        while True:
            if os.getpid() == 1:  # -1 means everything in our namespace but us
                targets = [-1]
            else:
                targets = [-child, child] if code is None else []  # a reaped id may soon be another's
                if self.children_file is not None:
                    targets += map(int, os.pread(self.children_file, 1 << 16, 0).split())
            for target in targets:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids to kill a zombie's group
                    os.kill(target, signal.SIGKILL)
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return code
            if pid == child:
                code = os.waitstatus_to_exitcode(status)


def run_child(link: int, namespace: dict, warm: bool) -> None:
    """A child's life once it is locked down. What fails before the first byte is written is our failure."""
    os.dup2(link, LINK, inheritable=False)
    os.closerange(LINK + 1, 1024)
    os.dup2(NULL, CONTROL)
    if warm:
        inside.solve(inside.WARM_UP, "number", dict(namespace))
    os.write(LINK, b"+")
    os.dup2(NULL, 2)
    message = os.read(LINK, 1 << 16)
    while message and len(message) < 8 + int.from_bytes(message[:8], "little"):
        chunk = os.read(LINK, 1 << 20)
        message = message + chunk if chunk else b""
    if not message:
        return  # the zygote is gone
    program, timeout_s, want = marshal.loads(message[8:])
    resource.setrlimit(*lockdown.possible_limit("CPU", math.ceil(timeout_s) + 2))
    write(LINK, inside.solve(program, want, namespace))


def launch() -> bool:
    """Continues as process 1 of new namespaces, or else as the one who inherits orphans; whether it is the former."""
    if not lockdown.isolate():
        if lockdown.LINUX:
            lockdown.prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1)
        return False
    if zygote := os.fork():
        os.close(CONTROL)
        os.waitpid(zygote, 0)
        os._exit(0)
    lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def settle_on_a_cpu(number: int) -> set[int]:
    """Returns those that we may use; zygotes whose numbers follow each other settle on different ones."""
    if not lockdown.LINUX:
        return set()
    cpus = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {sorted(cpus)[number % len(cpus)]})
    return cpus


def main(number: str, folders: str, kind: str, memory_mb: str) -> None:
    cpus = settle_on_a_cpu(int(number))
    namespace = {"__name__": "__main__", "math": math}
    library = [path for path in sys.path if path not in ("", os.path.dirname(__file__))]
    packages = []
    if kind == "sympy":
        sys.path[:] = [*library, *folders.split(os.pathsep)]
        try:
            import mpmath
            import sympy
        except ImportError as error:
            return send({"error": str(error)})
        namespace["sympy"] = sympy
        packages = [os.path.dirname(module.__file__) for module in (sympy, mpmath)]
    sys.path[:] = library
    sys.argv, sys.dont_write_bytecode = [""], True
    os.environ.clear()
    protections = []
    if lockdown.LINUX:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # when the host runs out of memory, not the trainer
    if launch():
        protections.append("pid+net+ipc namespaces")
    rules = lockdown.Lockdown(int(memory_mb))
    zygote = Zygote(namespace, rules, cpus)
    if abi := rules.restrict_files(packages):
        protections.append(f"Landlock ABI {abi}")
    rules.renounce()
    for _ in range(20):  # what Python makes at a first use, or at a tenth, is made once and not in every child
        inside.solve(inside.WARM_UP, "number", dict(namespace))
    gc.collect()
    gc.freeze()  # the children's collections leave these pages shared
    send({"error": None, "protections": protections + rules.protections})
    with contextlib.suppress(EOFError):
        zygote.serve()
    for child in zygote.spares + zygote.stopped:
        zygote.bury(*child)


if __name__ == "__main__":
    main(*sys.argv[1:])
