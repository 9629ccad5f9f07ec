"""Imitates a kernel without some system calls: `python denied.py NAMES [--user=ID] -- COMMAND` runs a command there.

NAMES: families of DENIED, separated by commas, or "none". A filter makes each call of a family fail as it would on a
kernel or in a container without it, also in all processes that the command starts. Options that change the host:
--user=ID               become this user
--ignore=SIGCHLD        ignore this signal
--close=0,1,2           close these descriptors
--limit=NOFILE:64       lower a limit
--join=FOLDER           enter a cgroup
--proc=none|readonly    hide /proc, or make it read-only
--first                 be process 1 of a PID namespace
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
EPERM, ENOSYS, EINVAL = errno.EPERM, errno.ENOSYS, errno.EINVAL
X86 = platform.machine() == "x86_64"
NEW_NAMESPACES = 0x7E020000  # the CLONE_NEW* flags that `unshare` and `clone` take
# family: (number on x86_64, on aarch64, the error, and which argument, cut to which bits, must be one of these values)
DENIED = {
    "namespaces": [
        (272, 97, EPERM, (0, NEW_NAMESPACES, None)),
        (56, 220, EPERM, (0, NEW_NAMESPACES, None)),
        (435, 435, ENOSYS, None),  # clone3, whose flags a filter cannot see: glibc falls back to clone
        (308, 268, EPERM, None),
    ],
    "landlock": [(number, number, ENOSYS, None) for number in (444, 445, 446)],
    "seccomp": [(157, 167, EINVAL, (0, 0xFFFFFFFF, (22,))), (317, 277, ENOSYS, None)],
    "capset": [(126, 91, EPERM, None)],
    "prlimit": [(302, 261, EPERM, (2, 0xFFFFFFFF, None)), (160, 164, EPERM, None)],  # to set one; to read is allowed
    "setsid": [(112, 157, EPERM, None)],
    "affinity": [(203, 122, EPERM, None), (204, 123, EPERM, None)],
    "dumpable": [(157, 167, EPERM, (0, 0xFFFFFFFF, (4,)))],
    "mount": [(165, 40, EPERM, None), (155, 41, EPERM, None)],
}  # fmt: skip
LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
ARCH, ALLOW, FAIL = (0xC000003E if X86 else 0xC00000B7), 0x7FFF0000, 0x00050000


def code(families: list[str]) -> bytes:
    """The filter. A call is denied if the argument's bits are one of the values; with no values, if any is set."""
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, ARCH), (RETURN, 0, 0, ALLOW)]
    for x86, arm, error, condition in (rule for family in families for rule in DENIED[family]):
        deny = [(RETURN, 0, 0, FAIL | error)]
        if condition is not None:
            argument, bits, values = condition
            test = [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, bits)]
            if values is None:
                deny = [*test, (EQUAL, 1, 0, 0), *deny]
            else:
                test += [(EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
                deny = [*test, (RETURN, 0, 0, ALLOW), *deny]
            deny.append((RETURN, 0, 0, ALLOW))
        lines += [(LOAD, 0, 0, 0), (EQUAL, 0, len(deny), x86 if X86 else arm), *deny]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, (RETURN, 0, 0, ALLOW)])


def deny(families: list[str]) -> None:
    buffer = ctypes.create_string_buffer(code(families))
    program = ctypes.create_string_buffer(struct.pack("HP", len(buffer) // 8, ctypes.addressof(buffer)))
    if LIBC.prctl(38, ctypes.c_ulong(1), 0, 0, 0) or LIBC.prctl(22, ctypes.c_ulong(2), program, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter was not taken")


def unshare(flags: int) -> None:
    if LIBC.unshare(flags) or LIBC.mount(None, b"/", None, ctypes.c_ulong(1 << 18 | 16384), None):
        raise OSError(ctypes.get_errno(), "no namespace")


def main(families: str, *words: str) -> None:
    at = words.index("--")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in words[:at])
    if "first" in options:
        unshare(0x20020000)
        if child := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        LIBC.mount(b"proc", b"/proc", b"proc", 0, None)
    if "proc" in options:
        unshare(0x20000)
        if options["proc"] == "none":
            LIBC.mount(b"tmpfs", b"/proc", b"tmpfs", 0, None)
        else:
            LIBC.mount(None, b"/proc", None, ctypes.c_ulong(4096 | 32 | 1), None)
    for limit in filter(None, options.get("limit", "").split(",")):
        name, number = limit.split(":")
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (int(number), int(number)))
    for folder in filter(None, options.get("join", "").split(",")):
        with open(f"{folder}/cgroup.procs", "w") as procs:
            procs.write(str(os.getpid()))
    if "user" in options:
        user = int(options["user"])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if families != "none":
        deny(families.split(","))
    for name in filter(None, options.get("ignore", "").split(",")):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    command = list(words[at + 1 :])
    for fd in filter(None, options.get("close", "").split(",")):
        os.close(int(fd))
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
