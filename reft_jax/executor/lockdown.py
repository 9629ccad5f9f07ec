"""What the kernel takes away from a process that runs a program nobody has read. Imported by the zygote only.

What a fork inherits at no cost a zygote does once to itself: namespaces (`isolate`), Landlock (`restrict_files`; in a
domain of its own every child would copy some 250 rules), no capabilities (`renounce`). The rest is each child's own
(`enter`): limits, PDEATHSIG, the seccomp filter, prepared in the zygote. On macOS only the limits remain.

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
import sys
from collections.abc import Iterable

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = 65534

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # ABI: how many of the rights on files it knows; 16 from ABI 5 on
TCP_RIGHTS = 0b11  # bind, connect; from ABI 4 on
SCOPES = 0b11  # abstract unix sockets, signals; from ABI 6 on

# System calls that a program which computes a number may make, by their numbers on (x86_64, aarch64). No process or
# thread, no signal to anyone, no socket, nothing that changes the disk, no memory outside the limit on address space.
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
# Allowed if one argument, cut to these bits, is one of these values.
ALLOWED_IF = {
    # read-only: no O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, and the bit of O_TMPFILE that is not O_DIRECTORY
    "openat": ((257, 56), 2, 0x3 | 0o100 | 0o1000 | 0o20000000, (0,)),
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC; F_SETOWN and F_SETSIG send signals
    "fcntl": ((72, 25), 1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030)),
    "ioctl": ((16, 29), 1, 0xFFFFFFFF, (0x5401, 0x5450, 0x5451)),  # isatty, (non-)inheritable
    "prlimit64": ((302, 261), 0, 0xFFFFFFFF, (0,)),  # its own limits only, which it can but lower
}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP_KILL, SECCOMP_EPERM, SECCOMP_ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
BPF_LOAD, BPF_AND, BPF_IF_EQUAL, BPF_IF_AT_LEAST, BPF_RETURN = 0x20, 0x54, 0x15, 0x35, 0x06


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, pointer: int = 0) -> None:
    check(LIBC.prctl(*ready_prctl(option, value, pointer)), f"prctl {option}")


def ready_prctl(option: int, value: int, pointer: int = 0) -> tuple:
    """The arguments of a `prctl` to be made in a child: every object made there costs it pages."""
    return (option, *map(ctypes.c_ulong, (value, pointer, 0, 0)))


def seccomp_filter(machine: str) -> bytes | None:
    """The filter as BPF code, or None for an architecture whose numbers are not listed here.

    A call that is not allowed fails with EPERM, which Python raises as PermissionError; a call through another
    architecture's numbers (32-bit on x86_64) kills.
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
    # Runs of numbers with one answer. The kernel tries every number there is when a child takes the filter on, so a
    # binary search saves it half of the 0.12 ms that a list of comparisons takes.
    runs = [(number, names.get(number, "no")) for number in range(max(filter(None, names)) + 2)]
    runs = [run for before, run in zip([(-1, ""), *runs], runs, strict=False) if run[1] != before[1]]
    code = [(BPF_LOAD, 0, 0, 4), (BPF_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]), (BPF_RETURN, 0, 0, SECCOMP_KILL)]
    code += [(BPF_LOAD, 0, 0, 0), *search([(first, answer[name]) for first, name in runs])]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def search(runs: list[tuple[int, list]]) -> list[tuple]:
    """BPF code that goes to the code of the last run whose first number is not above the loaded one."""
    if len(runs) == 1:
        return runs[0][1]
    middle = len(runs) // 2
    lower, upper = search(runs[:middle]), search(runs[middle:])
    return [(BPF_IF_AT_LEAST, len(lower), 0, runs[middle][0]), *lower, *upper]


def isolate() -> bool:
    """Makes the next fork process 1 of new PID, network and IPC namespaces. Returns whether the kernel lets us."""
    flags = CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    # Who may not make them directly may do so inside a user namespace of their own, unless that is forbidden too.
    return LINUX and (LIBC.unshare(flags) == 0 or LIBC.unshare(flags | CLONE_NEWUSER) == 0)


def landlock_ruleset(abi: int) -> int:
    """The fd of a ruleset that forbids all this ABI can: files, TCP, signals and abstract sockets to the outside."""
    fields = [(1 << FILE_RIGHTS.get(abi, 16)) - 1]
    if abi >= 4:
        fields.append(TCP_RIGHTS)
    if abi >= 6:
        fields.append(SCOPES)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    return check(LIBC.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")


def allow(ruleset: int, rights: int, paths: Iterable[str]) -> None:
    """Lets files and folders, with all below them, be used so; a file can be read but not listed."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & READ_FILE, fd)
            check(LIBC.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(fd)


def library_files() -> tuple[list[str], str]:
    """What a program may read, and the folder it may list, to import the standard library, not site-packages in it."""
    stdlib = os.path.dirname(os.__file__)
    readable = [entry.path for entry in os.scandir(stdlib) if entry.name not in ("site-packages", "dist-packages")]
    extensions = [path for path in sys.path if path.endswith("lib-dynload")]
    return [*readable, *extensions, *shared_libraries(extensions), "/etc/ld.so.cache"], stdlib


def shared_libraries(folders: list[str]) -> list[str]:
    """The files that the extension modules in `folders` are linked to, found by loading them all in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for folder in folders:
                for name in os.listdir(folder):
                    with contextlib.suppress(OSError):  # one that cannot be loaded now cannot be imported later either
                        ctypes.CDLL(os.path.join(folder, name))
            with open("/proc/self/maps") as maps, open(writer, "w") as answer:
                answer.write("\n".join({line[73:].strip() for line in maps}))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        paths = answer.read().split("\n")
    os.waitpid(child, 0)
    return [path for path in paths if os.path.isfile(path)]


def possible_limit(name: str, limit: int) -> tuple[int, tuple[int, int]]:
    """What to give to `setrlimit`: a limit can be lowered only."""
    which = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(which)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    return which, (limit, limit)


class Lockdown:
    """What every child of this zygote does to itself, built once.

    protections: what has been seen to work on a child here.
    """

    def __init__(self, memory_mb: int):
        """memory_mb: MiB of address space for a child beyond this process's own."""
        self.protections = ["rlimits"]
        limits = {"FSIZE": 0, "CORE": 0, "NOFILE": 32, "NPROC": 0}
        self.filter = None
        self.end_with_zygote = ready_prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if LINUX:
            with open("/proc/self/statm") as statm:
                limits["AS"] = int(statm.read().split()[0]) * resource.getpagesize() + (memory_mb << 20)
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
        """Tries it on a child: a call that is not on the list must be refused."""
        child = os.fork()
        if child == 0:
            try:
                prctl(PR_SET_NO_NEW_PRIVS, 1)
                check(LIBC.prctl(*self.take_filter), "PR_SET_SECCOMP")
                try:
                    os.kill(os.getpid(), 0)
                except PermissionError:
                    os._exit(0)
            finally:
                os._exit(1)
        return os.waitpid(child, 0)[1] == 0

    def renounce(self) -> None:
        """Gives up this process's rights, which no fork has then. Raises OSError."""
        if not LINUX:
            return
        if os.getuid() == 0:
            # NPROC does not bind a real uid of 0. The effective one stays: the library's files may be root's alone.
            try:
                os.setresuid(NOBODY, -1, -1)
            except PermissionError:
                if not self.filter:
                    raise
        header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
        check(LIBC.capset(header, none), "capset")
        prctl(PR_SET_NO_NEW_PRIVS, 1)

    def restrict_files(self, packages: list[str]) -> int:
        """From here on this process and its forks read the standard library and the folders `packages`, no other file,
        use no TCP and signal only each other. Returns Landlock's ABI, or 0 where it does not work: nothing has changed.
        """
        abi = max(0, LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)) if LINUX else 0
        if not abi:
            return 0
        readable, listable = library_files()
        ruleset = landlock_ruleset(abi)
        allow(ruleset, READ_FILE | READ_DIR, [*readable, *packages])
        allow(ruleset, READ_DIR, [listable])
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
            return 0
        os.close(ruleset)
        return abi

    def enter(self) -> None:
        """For a child. Raises OSError or ValueError."""
        os.setsid()
        if LINUX:
            check(LIBC.prctl(*self.end_with_zygote), "PR_SET_PDEATHSIG")
        for which, limit in self.limits:
            resource.setrlimit(which, limit)
        if self.filter:
            check(LIBC.prctl(*self.take_filter), "PR_SET_SECCOMP")
