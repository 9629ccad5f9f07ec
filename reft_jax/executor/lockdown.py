"""Takes rights away from a process that runs a program nobody has read. Only the zygote imports this module.

The zygote restricts itself once, where its forks inherit the restriction at no cost: namespaces (`isolate`), files
(files.py; with its own Landlock domain every child would copy some 250 rules), capabilities and debuggers
(`renounce`). Each child does the rest itself (`enter`): limits, PDEATHSIG and the seccomp filter, which the zygote
prepares. On macOS only the limits work.

System calls are made with ctypes. docs/executor.md says why not with a library.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct

from files import LIBC, LINUX, PR_SET_NO_NEW_PRIVS, check

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER = 1, 4, 15, 22, 36
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534
NAME = "reft-program"

# System calls that a program may make, with their numbers on (x86_64, aarch64): what it needs to compute a number. None
# makes a process, a thread or a socket, sends a signal, changes the disk, or escapes the limit on address space.
ALLOWED = {
    # files and folders that are open, or that Landlock lets it read
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62), "pread64": (17, 67), "readv": (19, 65),
    "writev": (20, 66), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None),
    "lstat": (6, None), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "close_range": (436, 436),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216),
    "madvise": (28, 233),
    # its own signals, time and waiting
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "alarm": (37, None), "getitimer": (36, 102), "setitimer": (38, 103), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, None), "times": (100, 153), "select": (23, None), "pselect6": (270, 72), "poll": (7, None),
    "ppoll": (271, 73), "futex": (202, 98), "sched_yield": (24, 124), "restart_syscall": (219, 128),
    "set_robust_list": (273, 99), "rseq": (334, 293), "exit": (60, 93), "exit_group": (231, 94),
    # what it is and where it runs
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None), "getpgid": (121, 155),
    "getsid": (124, 156), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165), "getcpu": (309, 168),
    "sched_getaffinity": (204, 123), "getrlimit": (97, 163), "getrandom": (318, 278),
}  # fmt: skip
# System calls that are allowed if one argument, masked with these bits, is one of these values.
ALLOWED_IF = {
    # read-only: no O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the bit of O_TMPFILE that is not O_DIRECTORY
    "openat": ((257, 56), 2, 0x3 | 0o100 | 0o1000 | 0o20000000, (0,)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; F_SETOWN and F_SETSIG send signals
    "fcntl": ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030)),
    "ioctl": ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5450, 0x5451)),  # isatty, (non-)inheritable
    "prlimit64": ((302, 261), 0, 0xFFFFFFFF, (0,)),  # its own limits only, which it can only lower
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP_KILL, SECCOMP_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
BPF_LOAD, BPF_AND, BPF_IF_EQUAL, BPF_IF_AT_LEAST, BPF_RETURN = 0x20, 0x54, 0x15, 0x35, 0x06


def prctl(option: int, value: int, pointer: int = 0) -> None:
    check(LIBC.prctl(*ready_prctl(option, value, pointer)), f"prctl {option}")


def ready_prctl(option: int, value: int, pointer: int = 0) -> tuple:
    """Prepares the arguments of a `prctl` that a child will make: every object made in the child costs it pages."""
    return (option, *map(ctypes.c_ulong, (value, pointer, 0, 0)))


def seccomp_filter(machine: str) -> bytes | None:
    """Builds the filter as BPF code; None for an architecture whose numbers are not listed here.

    A call that is not allowed fails with EPERM, which Python raises as PermissionError. A call with another
    architecture's numbers (32-bit on x86_64) kills the process.
    """
    if machine not in AUDIT_ARCH:
        return None
    column = list(AUDIT_ARCH).index(machine)
    answer = {"no": [(BPF_RETURN, 0, 0, SECCOMP_EPERM)], "yes": [(BPF_RETURN, 0, 0, SECCOMP_ALLOW)]}
    names = {numbers[column]: "yes" for numbers in ALLOWED.values()}
    for name, (numbers, argument, bits, values) in ALLOWED_IF.items():
        names[numbers[column]] = name
        answer[name] = [(BPF_LOAD, 0, 0, 16 + 8 * argument), (BPF_AND, 0, 0, bits)]  # the low half: little-endian
        answer[name] += [(BPF_IF_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        answer[name] += [*answer["no"], *answer["yes"]]
    # Ranges of numbers with one answer. The kernel tries every number when a child installs the filter, so a binary
    # search saves half of the 0.12 ms that a list of comparisons takes.
    runs = [(number, names.get(number, "no")) for number in range(max(filter(None, names)) + 2)]
    runs = [run for before, run in zip([(-1, ""), *runs], runs, strict=False) if run[1] != before[1]]
    code = [(BPF_LOAD, 0, 0, 4), (BPF_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]), (BPF_RETURN, 0, 0, SECCOMP_KILL)]
    code += [(BPF_LOAD, 0, 0, 0), *search([(first, answer[name]) for first, name in runs])]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def search(runs: list[tuple[int, list]]) -> list[tuple]:
    """BPF code of a binary search: runs the code of the last range whose first number is at most the loaded one."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    lower, upper = search(runs[:middle]), search(runs[middle:])
    return [(BPF_IF_AT_LEAST, len(lower), 0, runs[middle][0]), *lower, *upper]


def isolate() -> bool:
    """Makes the next fork process 1 of new PID, network and IPC namespaces. Returns whether the kernel allows it."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    if not LINUX or LIBC.unshare(flags) == 0:
        return LINUX
    # A user who may not make them directly may do so inside a new user namespace, unless that is forbidden too.
    user, group = os.geteuid(), os.getegid()
    if LIBC.unshare(flags | CLONE_NEWUSER) != 0:
        return False
    maps = {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"}
    for name, text in maps.items():  # the files that `own_root` makes need an owner
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def nobody_reads(paths: list[str]) -> bool:
    """Whether a user without any rights could read these files and folders; tries it in a fork."""
    child = os.fork()
    if child == 0:
        try:
            become_nobody()
            for path in paths:
                os.listdir(path) if os.path.isdir(path) else os.close(os.open(path, os.O_RDONLY))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def possible_limit(name: str, limit: int) -> tuple[int, tuple[int, int]]:
    """The arguments of `setrlimit` for this limit, or for the hard limit if that is lower: it cannot be raised."""
    which = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(which)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    return which, (limit, limit)


def address_space() -> int:
    """Bytes that this process has mapped; without /proc, an estimate that is higher."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) + (128 << 20)


class Lockdown:
    """The restrictions that every child of this zygote puts on itself, built once.

    protections: those that were seen to work on a child here.
    """

    def __init__(self, memory_mb: int):
        """memory_mb: MiB of address space for a child beyond this process's own."""
        self.protections = ["rlimits"]
        limits = {"FSIZE": 0, "CORE": 0, "NOFILE": 32, "NPROC": 0}
        self.filter = None
        self.end_with_zygote = ready_prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if LINUX:
            limits["AS"] = address_space() + (memory_mb << 20)
        self.limits = [possible_limit(name, limit) for name, limit in limits.items()]
        if LINUX and (code := seccomp_filter(platform.machine())):
            self.code = ctypes.create_string_buffer(code)
            self.filter = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(self.code)))
            self.take_filter = ready_prctl(PR_SET_SECCOMP, 2, ctypes.addressof(self.filter))
            if self.filter_works():
                self.protections.insert(0, "seccomp")
            else:
                self.filter = None

    def filter_works(self) -> bool:
        """Tries the filter on a child: a call that is not on the list must be refused.

        Raises OSError if the child was killed, which says nothing about the filter.
        """
        child = os.fork()
        if child == 0:
            try:
                prctl(PR_SET_NO_NEW_PRIVS, 1)
                check(LIBC.prctl(*self.take_filter), "PR_SET_SECCOMP")
                try:
                    os.kill(os.getpid(), 0)
                except PermissionError:
                    os._exit(0)
            except OSError:
                pass
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            raise OSError(f"the child that tries seccomp was ended by signal {-code}")
        return code == 0

    def renounce(self, files_closed: bool, needed: list[str]) -> None:
        """Gives up the rights of this process and its later forks, and closes its memory to its user's processes.

        files_closed: whether programs cannot read this machine's files. needed: what the process must still be able to
        read. Raises OSError.
        """
        if not LINUX:
            return
        guarded = bool(self.filter and files_closed)
        if os.geteuid() == 0 and not guarded and nobody_reads(needed):
            become_nobody()  # cannot read private files, nor signal root's processes
            self.protections.insert(0, "another user")
        elif os.getuid() == 0:
            # NPROC does not bind a real uid of 0. The effective uid stays: only root may be able to read the library.
            try:
                os.setresuid(NOBODY, -1, -1)
            except PermissionError:
                if not self.filter:
                    raise
        header, held = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        if LIBC.capset(header, held) != 0 and not guarded:
            error = ctypes.get_errno()
            if LIBC.capget(header, held) != 0 or any(held):
                raise OSError(error, f"the rights of this user cannot be given up (capset): {os.strerror(error)}")
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        hide_memory()

    def enter(self) -> None:
        """Restricts this process, a child. Raises OSError or ValueError."""
        with contextlib.suppress(PermissionError):  # some hosts refuse it; the zygote has no terminal in any case
            os.setsid()
        if LINUX:
            check(LIBC.prctl(*self.end_with_zygote), "PR_SET_PDEATHSIG")
        for which, limit in self.limits:
            try:
                resource.setrlimit(which, limit)
            except (OSError, ValueError) as error:
                raise OSError(f"limit {which} cannot be set to {limit[0]} (setrlimit): {error}") from error
        if self.filter:
            check(LIBC.prctl(*self.take_filter), "PR_SET_SECCOMP")


def hide_memory() -> None:
    """Hides memory, environment and descriptors (pidfd_getfd) of this process and its forks from the same user."""
    prctl(PR_SET_DUMPABLE, 0)


def name_process() -> None:
    """Sets the name that `ps` shows for this process and its forks; the pool finds its zombies by this name."""
    LIBC.prctl(PR_SET_NAME, NAME.encode(), 0, 0, 0)
