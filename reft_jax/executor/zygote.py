"""A small program of its own that runs untrusted programs: one fork each, from a process that is already warm.

`python -P zygote.py {plain|sympy} MEMORY_MB` speaks JSON lines over the socket on its fd 0: first a greeting, then one
answer per request, one at a time, until the socket closes. It is exec'd, never forked from the trainer: a fork of a
process with JAX's threads deadlocks, and this way no program can find the trainer's memory in its own.

Three processes take part. The *launcher* holds a namespace open and waits. The *zygote* is process 1 of that namespace:
it forks, keeps the time, and kills everything else there after each program. The *child* runs one program and reports
on its own pipe. Where the kernel refuses namespaces the launcher is the zygote and kills what it can find; on macOS
that is the child's process group only, and memory is not limited.

A report is one byte (`lock_down` is done, what follows is the program's doing) and one line of JSON
`[status, value, detail, cut]`; a number is a `float.hex` string. The zygote believes nothing in it before `checked`.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import math
import os
import resource
import select
import signal
import sys
import time
import traceback

CONTROL, NULL, REPORT = 0, 1, 3  # fds: the pool's socket, /dev/null (the zygote's stdout), the child's end of its pipe
REPORT_BYTES = 4096  # within PIPE_BUF, so a report arrives whole
TEXT_CHARS, DETAIL_CHARS = 256, 80
STATUSES = {"ok", "wrong_type", "not_finite", "no_solution", "syntax_error", "exception", "memory"}
UNCOMPILABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534


def prctl(option: int, value: int) -> None:
    if LIBC.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def isolate() -> None:
    """Continues as process 1 of new PID, network and IPC namespaces, or else as the one who inherits orphans."""
    user = 0 if os.geteuid() == 0 else CLONE_NEWUSER  # who is not root needs a user namespace to make the others
    if LIBC.unshare(CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | user) != 0:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        return
    if zygote := os.fork():
        os.close(CONTROL)
        os.waitpid(zygote, 0)
        os._exit(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lock_down(memory_mb: int, cpu_s: int) -> None:
    """Takes from the child what a program that computes a number does not need. Raises OSError or ValueError.

    No process and no thread beyond this one, no byte to a file, no core dump, few fds.
    """
    os.setsid()
    limits = {"CPU": cpu_s, "FSIZE": 0, "CORE": 0, "NOFILE": 32, "NPROC": 0}
    if LINUX:
        with open("/proc/self/statm") as statm:
            limits["AS"] = int(statm.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)
        if os.getuid() == 0:
            # NPROC does not bind a real uid of 0. The effective one stays: the interpreter's files may be root's alone.
            os.setresuid(NOBODY, -1, -1)
        no_capabilities = ctypes.create_string_buffer(24)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        if LIBC.capset(header, no_capabilities) != 0:
            raise OSError(ctypes.get_errno(), "capset")
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last, for a change of credentials may reset it
    for name, limit in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(which, (limit, limit))


def report(status: str, value: str | None = None, detail: str = "", cut: bool = False) -> bytes:
    return json.dumps([status, value, detail[:DETAIL_CHARS], cut]).encode() + b"\n"


def solve(program: str, want: str, namespace: dict) -> bytes:
    """Compiles and runs `program`, calls its `solution()` and converts the result; anything may be raised."""
    cut = False
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
    except UNCOMPILABLE as error:
        head = "\n".join(itertools.takewhile(str.strip, program.split("\n")))
        try:
            code = compile(head, "<program>", "exec", dont_inherit=True)
        except UNCOMPILABLE:
            return report("syntax_error", detail=type(error).__name__)
        cut = True
    out_of_memory = report("memory", detail="MemoryError", cut=cut)  # made while there is memory to make it
    try:
        exec(code, namespace)
        if "solution" not in namespace:
            return report("no_solution", cut=cut)
        status, value, detail = convert(namespace["solution"](), want)
    except MemoryError:
        return out_of_memory
    except BaseException as error:
        return report("exception", detail=type(error).__name__, cut=cut)
    return report(status, value, detail, cut)


def convert(result: object, want: str) -> tuple[str, str | None, str]:
    """(status, value, detail) of what `solution()` returned."""
    kind = type(result).__name__
    if want == "text":
        text = str(result).encode(errors="replace").decode()  # a lone surrogate would break who writes it to a file
        return ("ok", text, "") if len(text) <= TEXT_CHARS else ("wrong_type", None, f"long {kind}")
    try:
        number = float(result)
    except (TypeError, ValueError):
        return "wrong_type", None, kind
    except OverflowError:
        return "not_finite", None, kind
    return ("ok", number.hex(), "") if math.isfinite(number) else ("not_finite", None, kind)


def run_child(request: dict, pipe: int, namespace: dict, memory_mb: int) -> None:
    """The child's whole life. What fails before the first byte is written is our failure, not the program's."""
    os.dup2(pipe, REPORT, inheritable=False)
    os.closerange(REPORT + 1, 1024)
    os.dup2(NULL, CONTROL)
    lock_down(memory_mb, cpu_s=math.ceil(request["timeout_s"]) + 2)
    os.write(REPORT, b"+")
    os.dup2(NULL, 2)
    os.write(REPORT, solve(request["program"], request["want"], namespace))


def read_report(pipe: int, deadline: float) -> tuple[bytes, bool]:
    """What the child wrote up to a line's end, its death or the deadline, and whether it was the deadline."""
    raw = b""
    while not raw.endswith(b"\n") and len(raw) <= REPORT_BYTES:
        ready, _, _ = select.select([pipe, CONTROL], [], [], max(0.0, deadline - time.monotonic()))
        if CONTROL in ready:
            raise EOFError("the pool closed its socket during a program")
        if not ready:
            return raw, True
        chunk = os.read(pipe, REPORT_BYTES)
        if not chunk:
            break
        raw += chunk
    return raw, False


def checked(line: bytes, want: str) -> dict | None:
    """The child's report as an answer, or None: the program can write to the pipe whatever it likes."""
    try:
        status, value, detail, cut = json.loads(line)
        if status != "ok":
            valid = status in STATUSES and value is None
        elif want == "number":
            valid = math.isfinite(float.fromhex(value))
        else:
            valid = len(value.encode()) <= 4 * TEXT_CHARS  # bytes in UTF-8, which a lone surrogate has not
        valid = valid and len(detail.encode()) <= 4 * DETAIL_CHARS and isinstance(cut, bool)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return {"status": status, "value": value, "detail": detail, "cut": cut} if valid else None


def sweep(child: int) -> int:
    """Kills and reaps the child and everything it started; returns the child's exit code (-n for signal n)."""
    code = None
    while True:
        if os.getpid() == 1:  # -1 means everything in our namespace but us
            targets = [-1]
        else:
            targets = [-child, child] if code is None else []  # a reaped id may soon be another's
            with contextlib.suppress(FileNotFoundError), open("/proc/thread-self/children") as children:
                targets += map(int, children.read().split())
        for target in targets:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS forbids to kill a zombie's group
                os.kill(target, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def run(request: dict, namespace: dict, memory_mb: int) -> dict:
    """One program, from fork to verdict. Raises RuntimeError if the child never came as far as the program."""
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run_child(request, writer, namespace, memory_mb)
        except BaseException:
            traceback.print_exc()  # seen if `lock_down` failed; what the program raises goes to /dev/null
        finally:
            os._exit(0)
    os.close(writer)
    try:
        raw, late = read_report(reader, start + request["timeout_s"])
    finally:
        os.close(reader)
        code = sweep(child)
    if not raw:
        raise RuntimeError(f"the child could not be locked down (exit code {code})")
    answer = checked(raw[1:], request["want"]) if raw.endswith(b"\n") else None
    if answer is None:
        status, detail = ("timeout", "") if late else ("killed", f"exit code {code}")
        answer = {"status": status, "value": None, "detail": detail, "cut": False}
    return answer | {"ms": 1000 * (time.monotonic() - start)}


def send(message: dict) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(CONTROL, data) :]


def main(kind: str, memory_mb: int) -> None:
    namespace = {"__name__": "__main__", "math": math}
    if kind == "sympy":
        try:
            import sympy
        except ImportError as error:
            return send({"error": str(error)})
        namespace["sympy"] = sympy
    if LINUX:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # when the host runs out of memory, not the trainer
        isolate()
    sys.dont_write_bytecode = True
    gc.freeze()  # the children's collections leave these pages shared
    send({"error": None})
    with open(CONTROL, closefd=False) as requests, contextlib.suppress(EOFError):
        for line in requests:
            send(run(json.loads(line), namespace, memory_mb))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
