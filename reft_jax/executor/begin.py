"""How a zygote starts: its signals, CPU, modules and namespaces do not depend on those of its host."""

import contextlib
import math
import os
import resource
import signal
import site
import sys

import child as inside
import lockdown

DESCRIPTORS = 1024  # `select` cannot wait for a higher one
# Signals that Slurm, a terminal or a shutdown sends to every process. Only the pool reacts to them.
IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
PYTHONS = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}  # ignored by Python, or cannot be set


def allow_descriptors() -> None:
    """Raises the limit on open descriptors as far as allowed, up to what `select` can handle."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS if hard < 0 else min(hard, DESCRIPTORS), hard))


def own_signals() -> None:
    """Resets what the host ignores, handles or blocks. With SIGCHLD ignored there would be no exit codes."""
    for number in signal.valid_signals() - PYTHONS:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in IGNORED else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def launch() -> bool:
    """Continues as process 1 of new namespaces and returns True. Where the kernel refuses them, returns False; this
    process is then a subreaper (it inherits orphans).
    """
    if not lockdown.isolate():
        if lockdown.LINUX:
            lockdown.prctl(lockdown.PR_SET_CHILD_SUBREAPER, 1)
        return False
    lockdown.hide_memory()
    if zygote := os.fork():
        os.close(0)  # the pool's socket
        os.waitpid(zygote, 0)
        os._exit(0)
    lockdown.prctl(lockdown.PR_SET_PDEATHSIG, signal.SIGKILL)
    return True


def settle_on_a_cpu(number: int) -> set[int]:
    """Binds this process to one CPU; returns all CPUs that it may use. Consecutive numbers get different CPUs."""
    if not lockdown.LINUX:
        return set()
    try:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {sorted(cpus)[number % len(cpus)]})
    except OSError:
        return set()
    return cpus


def roam(process: int, cpus: set[int]) -> None:
    """Lets a child (or this process, with 0) run on every CPU that the zygote may use.

    A zygote and its spare children share one CPU: waking each other there costs half of what it costs across CPUs.
    """
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process, cpus)


def load(folders: str, kind: str, library: list[str]) -> tuple[dict, list[str]]:
    """Returns the names that a program finds without an import, and the folders of its packages. Raises ImportError."""
    namespace, packages = {"math": math}, []
    if kind == "sympy":
        sys.path[:] = [*library, *folders.split(os.pathsep)]
        # Imported here: only now are the packages on the path, and a plain zygote starts faster without them.
        import mpmath
        import sympy

        namespace["sympy"] = sympy
        packages = [os.path.dirname(module.__file__) for module in (sympy, mpmath)]
    sys.path[:] = library
    site.setquit()  # Python does these three at its start, unless -S was given
    site.setcopyright()
    site.sethelper()
    for module in ("begin", "child", "files", "lockdown", "sysv", "wire", "zygote"):
        sys.modules.pop(module, None)  # a program that imports one of these names gets its own error
    return inside.main_module(**namespace).__dict__, packages


def opened(path: str) -> int | None:
    """Returns a descriptor of this file, or None if it cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None
