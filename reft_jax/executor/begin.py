"""How a zygote comes to be: free of what its host does with signals, CPUs and modules, and in namespaces of its own."""

import contextlib
import math
import os
import resource
import signal
import site
import sys

import child as inside
import lockdown

DESCRIPTORS = 1024  # `select` knows no more
# Of what a machine sends to everything that runs on it (Slurm, a terminal, a shutdown), the pool alone takes notice.
IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
PYTHONS = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ}  # ignored by Python, or not ours to set


def allow_descriptors() -> None:
    """As many as there may be, up to those that `select` knows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS if hard < 0 else min(hard, DESCRIPTORS), hard))


def own_signals() -> None:
    """What the host ignores, handles or blocks is not for us: with SIGCHLD ignored there would be no exit codes."""
    for number in signal.valid_signals() - PYTHONS:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN if number in IGNORED else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def launch() -> bool:
    """Continues as process 1 of new namespaces, or else as the one who inherits orphans; whether it is the former."""
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
    """Returns those that we may use; zygotes whose numbers follow each other settle on different ones."""
    if not lockdown.LINUX:
        return set()
    try:
        cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {sorted(cpus)[number % len(cpus)]})
    except OSError:
        return set()
    return cpus


def roam(process: int, cpus: set[int]) -> None:
    """Lets a child, or with 0 this process, run on every CPU that we may use.

    A zygote and its spare children have one for them: to wake the other there costs half of what it does elsewhere.
    """
    if cpus:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(process, cpus)


def load(folders: str, kind: str, library: list[str]) -> tuple[dict, list[str]]:
    """What a program finds without importing it, and the folders of its packages. Raises ImportError."""
    namespace, packages = {"math": math}, []
    if kind == "sympy":
        sys.path[:] = [*library, *folders.split(os.pathsep)]
        import mpmath
        import sympy

        namespace["sympy"] = sympy
        packages = [os.path.dirname(module.__file__) for module in (sympy, mpmath)]
    sys.path[:] = library
    site.setquit()  # what Python does at its start, had it looked at site-packages
    site.setcopyright()
    site.sethelper()
    for module in ("begin", "child", "files", "lockdown", "sysv", "wire", "zygote"):
        sys.modules.pop(module, None)  # a program that imports one of these names gets its own error
    return inside.main_module(**namespace).__dict__, packages


def opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        return None
