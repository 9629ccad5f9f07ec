"""What guards a program on this machine, in words a user understands."""

from typing import NamedTuple

from .process import Zygote
from .room import Room

ACCEPT = (
    "Use another machine or container, or, if you accept that, set executor.allow_unsandboxed=true "
    "(with solve: --allow_unsandboxed)"
)
MIB = 1 << 20
SCOPED = {f"Landlock ABI {abi}" for abi in range(6, 100)}  # those that keep signals inside


class Guard(NamedTuple):
    """One protection: its name, whether it works here, and what that means for this run."""

    name: str
    works: bool
    meaning: str


def _has(zygote: Zygote, name: str) -> bool:
    return any(name in protection for protection in zygote.protections)


def unprotected(zygote: Zygote) -> str:
    """Why programs may not run here unless that is allowed; empty if they may."""
    if zygote.protections == ["rlimits"]:
        return (
            "this machine guards against a model's programs with limits only: no namespaces, Landlock or seccomp, "
            f"so they could read and delete what you can. {ACCEPT}"
        )
    if not zygote.files_closed:
        return (
            "on this machine programs can read files, the answers among them: there is no Landlock, and no namespaces "
            f"for a root folder of their own. {ACCEPT}"
        )
    return ""


def start_line(zygote: Zygote, workers: int, started: int, memory_mb: int, room: Room) -> str:
    words = ["programs run with: " + ", ".join(zygote.protections)]
    if not zygote.files_closed:
        words.append("programs can read files")
    if started < workers:
        words.append(f"there is room for {started} of {workers} workers")
    if room.memory < memory_mb * MIB:
        words.append(
            f"this machine has {room.memory / MIB:.0f} MiB: a program that takes more than what is free, not "
            f"executor.memory_mb={memory_mb}, ends the run with an error"
        )
    if room.children(0) == 0:
        words.append("there is no room for children that wait: programs run slowly")
    return "; ".join(words)


def guards(zygote: Zygote) -> list[Guard]:
    """All that there are, with what follows on this machine from those that work and those that do not."""
    names = ("namespaces", "Landlock", "seccomp", "mount namespace", "another user")
    space, landlock, seccomp, root, other = (_has(zygote, name) for name in names)
    if space:
        outside = "programs see no network and no process but their own"
    elif seccomp:
        outside = "seccomp keeps programs from network and processes all the same"
    elif any(name in zygote.protections for name in SCOPED):
        outside = "programs can send datagrams over the network; Landlock keeps them from signalling this run"
    elif other:
        outside = "programs can use the network and end each other (which is an error of the run), but not this run"
    else:
        outside = "programs can use the network and end each other and this run"
    if landlock:
        reads = "programs read Python's library and no other file"
    elif root:
        reads = "programs read Python's library and no other file all the same: they have a root folder of their own"
    elif other:
        reads = "programs can read files that every user of this machine may read; keep answers and keys from others"
    else:
        reads = "programs can read your files, answers and keys among them"
    if seccomp:
        asks = "programs can ask the kernel for little but memory and time"
    else:
        asks = "programs may ask the kernel for all that you may; each starts a process when its turn comes: slower"
        if not zygote.files_closed:
            asks += "; they can change and delete the files that they can read" if not other else ""
    return [
        Guard("namespaces", space, outside),
        Guard("Landlock", landlock, reads),
        Guard("seccomp", seccomp, asks),
        Guard("limits", True, "a program has so much memory and time and may not write files or start processes"),
    ]
