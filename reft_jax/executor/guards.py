"""What guards a program on this machine, in words a user understands."""

from typing import NamedTuple

from .process import Zygote
from .room import Room

ACCEPT = (
    "Use another machine or container, or, if you accept that, set executor.allow_unsandboxed=true "
    "(with solve: --allow_unsandboxed)"
)
MIB = 1 << 20


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
    space, landlock, seccomp = (_has(zygote, name) for name in ("namespaces", "Landlock", "seccomp"))
    root, other = _has(zygote, "mount namespace"), _has(zygote, "another user")
    alone = "" if seccomp or space else " and they can signal each other"
    if not (seccomp or space) and not other:
        alone = ", signal each other and end this run"
    return [
        Guard(
            "namespaces",
            space,
            "programs see no network and no process but their own"
            if space
            else "programs "
            + ("cannot use network or processes all the same: seccomp" if seccomp else f"can reach the network{alone}"),
        ),
        Guard(
            "Landlock",
            landlock,
            "programs read Python's library and no other file"
            if landlock
            else "files are closed all the same: a root folder of their own"
            if root
            else "programs can read every file that "
            + ("anybody on this machine" if other else "you")
            + " can, answers and keys among them",
        ),
        Guard(
            "seccomp",
            seccomp,
            "programs can ask the kernel for little but memory and time"
            if seccomp
            else "programs may ask the kernel for anything you may; children are not made ahead, which is slower",
        ),
        Guard("limits", True, "of memory, time, file size and processes"),
    ]
