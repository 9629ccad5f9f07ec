"""Describes to the user what protects this machine from a model's programs."""

from typing import NamedTuple

from .process import Zygote
from .room import Room

ACCEPT = (
    "Use another machine or container, or, if you accept that, set executor.allow_unsandboxed=true "
    "(solve, convert, evaluate --samples: --allow_unsandboxed)"
)
MIB = 1 << 20
SCOPED = {f"Landlock ABI {abi}" for abi in range(6, 100)}  # versions that also restrict signals


class Guard(NamedTuple):
    """One protection: its name, whether it works here, and what that means for this run."""

    name: str
    works: bool
    meaning: str


def _has(zygote: Zygote, name: str) -> bool:
    return any(name in protection for protection in zygote.protections)


def unprotected(zygote: Zygote) -> str:
    """Says why programs may not run here without the user's permission; empty if they may."""
    if zygote.protections == ["rlimits"]:
        return (
            "this machine protects itself from a model's programs with limits only: no namespaces, Landlock or "
            f"seccomp, so they could read and delete what you can. {ACCEPT}"
        )
    if not zygote.files_closed:
        return (
            "on this machine programs can read files, the answers among them: it has no Landlock, and no namespaces "
            f"to give them their own root folder. {ACCEPT}"
        )
    return ""


def start_line(zygote: Zygote, workers: int, started: int, memory_mb: int, room: Room) -> str:
    """One line for the log: the protections, and what this machine has too little of."""
    words = ["programs run with: " + ", ".join(zygote.protections)]
    if not zygote.files_closed:
        words.append("programs can read files")
    if started < workers:
        words.append(f"there is room for {started} of {workers} workers")
    if room.memory < memory_mb * MIB:
        words.append(
            f"this machine has {room.memory / MIB:.0f} MiB: a program that takes more than the free memory ends the "
            f"run with an error, although executor.memory_mb={memory_mb} allows it"
        )
    if room.children(0) == 0:
        words.append("there is no room for spare child processes: programs run slowly")
    return "; ".join(words)


def guards(zygote: Zygote) -> list[Guard]:
    """Lists every protection, whether it works on this machine, and what that means for the run."""
    names = ("namespaces", "Landlock", "seccomp", "mount namespace", "another user")
    space, landlock, seccomp, root, other = (_has(zygote, name) for name in names)
    if space:
        outside = "programs see no network and no process but their own"
    elif seccomp:
        outside = "seccomp still keeps programs from network and processes"
    elif any(name in zygote.protections for name in SCOPED):
        outside = "programs can send datagrams over the network; Landlock keeps them from signalling this run"
    elif other:
        outside = "programs can use the network and end each other (an error of the run), but cannot end this run"
    else:
        outside = "programs can use the network and end each other and this run"
    if landlock:
        reads = "programs read Python's library and no other file"
    elif root:
        reads = "programs still read Python's library and no other file: they have their own root folder"
    elif other:
        reads = "programs can read files that every user of this machine may read; make answers and keys private"
    else:
        reads = "programs can read your files, answers and keys among them"
    if seccomp:
        asks = "programs can ask the kernel for little but memory and time"
    else:
        asks = "programs may make every system call that you may; no process is started ahead for them, which is slower"
        if not zygote.files_closed:
            asks += "; they can change and delete the files that they can read" if not other else ""
    return [
        Guard("namespaces", space, outside),
        Guard("Landlock", landlock, reads),
        Guard("seccomp", seccomp, asks),
        Guard("limits", True, "a program has limited memory and time and may not write files or start processes"),
    ]
