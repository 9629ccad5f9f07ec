"""Limits what a program can read to the standard library and the packages it was given.

Landlock does this where the kernel has it (`restrict`). Elsewhere a mount namespace does: its root folder holds these
files and no others (`own_root`). Only the zygote imports this module.
"""

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable

LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_NO_NEW_PRIVS = 38

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on every architecture
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # ABI: number of file rights that it knows; 16 from ABI 5 on
TCP_RIGHTS = 0b11  # bind, connect; from ABI 4 on
SCOPES = 0b11  # abstract unix sockets, signals; from ABI 6 on

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
LOCKED_FLAGS, ST_RELATIME, MS_RELATIME = 2 | 4 | 8 | 1024 | 2048, 4096, 1 << 21  # what a remount must keep
MNT_DETACH = 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SPOTS = ("/proc", "/sys", "/mnt")  # the new root is assembled in one of these: no library file is below them


def check(result: int, what: str) -> int:
    """Returns the result of a call into libc; raises OSError, which names `what`, if it is below 0."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def landlock_abi() -> int:
    """The version of Landlock's interface; 0 where the kernel has no Landlock."""
    return max(0, LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)) if LINUX else 0


def restrict(packages: list[str]) -> int:
    """Restricts this process and its later forks with Landlock.

    They can read the standard library and the folders `packages`, and no other file. Depending on the ABI they also
    cannot use TCP and can signal only each other. Returns Landlock's ABI, or 0 where it does not work; then nothing
    has changed.
    """
    abi = landlock_abi()
    if not abi:
        return 0
    readable, listable = library_files()
    ruleset = landlock_ruleset(abi)
    allow(ruleset, READ_FILE | READ_DIR, [*readable, *packages])
    allow(ruleset, READ_DIR, [listable])
    allow(ruleset, READ_FILE | WRITE_FILE, [os.devnull])  # every child opens its own
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0), "NO_NEW_PRIVS")
    restricted = LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return abi if restricted else 0


def landlock_ruleset(abi: int) -> int:
    """Makes a ruleset that forbids all that this ABI can: files, TCP, signals and abstract sockets to the outside.

    Returns its descriptor.
    """
    fields = [(1 << FILE_RIGHTS.get(abi, 16)) - 1]
    if abi >= 4:
        fields.append(TCP_RIGHTS)
    if abi >= 6:
        fields.append(SCOPES)
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    return check(LIBC.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0), "landlock_create_ruleset")


def allow(ruleset: int, rights: int, paths: Iterable[str]) -> None:
    """Adds these rights to a ruleset, for files and for folders with everything below them. A file cannot be listed."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & ~READ_DIR, fd)
            check(LIBC.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
            os.close(fd)


def library_files() -> tuple[list[str], str]:
    """Returns what a program may read, and the folder it may list, to import the standard library.

    Installed packages (site-packages) are not among them.
    """
    stdlib = os.path.dirname(os.__file__)
    readable = [entry.path for entry in os.scandir(stdlib) if entry.name not in ("site-packages", "dist-packages")]
    extensions = [path for path in sys.path if path.endswith("lib-dynload")]
    return [*readable, *extensions, *shared_libraries(extensions), "/etc/ld.so.cache"], stdlib


def shared_libraries(folders: list[str]) -> list[str]:
    """Finds the files that the extension modules in `folders` are linked to, by loading them all in a fork."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for folder in folders:
                for name in os.listdir(folder):
                    with contextlib.suppress(OSError):  # a module that cannot be loaded now cannot be imported later
                        ctypes.CDLL(os.path.join(folder, name))
            with open(writer, "wb") as answer:
                answer.write(b"\n".join(loaded()))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        paths = answer.read().split("\n")
    os.waitpid(child, 0)
    return [path for path in paths if os.path.isfile(path)]


def loaded() -> list[bytes]:
    """Paths of the shared libraries of this process, as the loader knows them: /proc may be missing."""

    class Info(ctypes.Structure):
        _fields_ = [("address", ctypes.c_void_p), ("name", ctypes.c_char_p)]

    found: list[bytes] = []
    each = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
    LIBC.dl_iterate_phdr(each(lambda info, size, _: found.append(info.contents.name or b"") or 0), None)
    return found


def own_root(packages: list[str]) -> bool:
    """Gives this process a read-only root folder with the files a program may read and no others.

    The process must already be in its own namespaces. Returns whether the kernel allows it; after False the process may
    still have its own mount namespace.
    """
    pivot_root = PIVOT_ROOT.get(platform.machine())
    if not (LINUX and pivot_root):
        return False
    readable, stdlib = library_files()
    shown = [*(path for path in readable if not path.startswith(f"{stdlib}/")), *packages]
    spot = next((spot for spot in SPOTS if os.path.isdir(spot)), "/")
    try:
        check(LIBC.unshare(CLONE_NEWNS), "a mount namespace")
        mount(None, "/", MS_REC | MS_PRIVATE)
        mount("tmpfs", spot, MS_NOSUID | MS_NODEV, "tmpfs")
        show(stdlib, spot)
        for name in ("site-packages", "dist-packages"):
            if os.path.isdir(hidden := f"{spot}{stdlib}/{name}"):
                mount("tmpfs", hidden, MS_NOSUID | MS_NODEV, "tmpfs")
        for path in shown:
            if os.path.exists(path):
                show(path, spot)
        show(os.devnull, spot, read_only=False)
        mount(None, spot, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
        os.chdir(spot)
        check(LIBC.syscall(pivot_root, b".", b"."), "pivot_root")
        check(LIBC.umount2(b".", MNT_DETACH), "umount2")  # the old root, which is mounted over the new one
        os.chdir("/")
    except OSError:
        with contextlib.suppress(OSError):
            os.chdir("/")
        return False
    return True


def show(path: str, root: str, read_only: bool = True) -> None:
    """Makes a file or folder visible in `root`, at the same path."""
    target = f"{root}{path}"
    folder = os.path.isdir(path)
    os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY))
    mount(path, target, MS_BIND | MS_REC)
    if read_only:
        flags = os.statvfs(target).f_flag
        kept = flags & LOCKED_FLAGS | (MS_RELATIME if flags & ST_RELATIME else 0)
        mount(None, target, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def mount(source: str | None, target: str, flags: int, kind: str | None = None) -> None:
    words = [word and word.encode() for word in (source, target, kind)]
    check(LIBC.mount(*words, ctypes.c_ulong(flags), None), f"mount {target}")
