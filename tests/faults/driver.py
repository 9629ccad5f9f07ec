"""A run that gets a signal at a chosen moment: python driver.py POINT NUMBER SIGNAL COMMAND --config=…

When the run passes POINT for the NUMBER-th time, this process gets the signal and says so on stderr. POINT "none"
never comes. Otherwise the run is a real one.
"""
# ruff: noqa: E402

import errno
import functools
import itertools
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.modules["torch"] = None  # as main() does

import orbax.checkpoint

import reft_jax.train.checkpoints as checkpoints
from reft_jax import executor
from reft_jax.__main__ import main
from reft_jax.engine import slots
from reft_jax.stages import reft, rerank, sample, sft
from reft_jax.train import iteration

ENDLESS = "def solution():\n    while True:\n        pass"


def before(owner, name: str, act, wanted=lambda *args: True) -> None:
    """Has `act()` called before each call of owner.name whose arguments are `wanted`."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def acting(*args, **kwargs):
        if wanted(*args):
            act()
        return function(*args, **kwargs)

    setattr(owner, name, acting)


def in_rollout() -> list:
    """Not empty while an iteration of PPO samples and runs programs."""
    inside, rollout = [], reft.roll_out_once

    def marked(*args, **kwargs):
        inside.append(True)
        try:
            return rollout(*args, **kwargs)
        finally:
            inside.clear()

    reft.roll_out_once = marked
    return inside


def chunk(passed) -> None:
    """A chunk of decode steps of a rollout begins."""
    inside = in_rollout()
    before(slots, "decode", passed, lambda *args: inside)


def program(passed) -> None:
    """A program of a rollout runs, and will not end by itself."""
    inside, submit = in_rollout(), executor.Stream.submit

    def replaced(self, text):
        return submit(self, ENDLESS if inside and passed() else text)

    executor.Stream.submit = replaced


def update_of(module):
    """An update begins; the module's `make_step` makes it."""

    def point(passed):
        make = module.make_step

        def made(*args):
            step = make(*args)
            return lambda *batch: (passed(), step(*batch))[1]

        module.make_step = made

    return point


def saving(passed) -> None:
    """A step of PPO is being written, in the background."""
    save = checkpoints.Checkpoints.save

    def saved(self, *args):
        save(self, *args)
        if self.folder.parent.name == "reft":
            passed()

    checkpoints.Checkpoints.save = saved


def manifest(passed) -> None:
    """A step of PPO is on the disk but for its manifest."""
    before(checkpoints, "write_manifest", passed, lambda folder: folder.parent.parent.name == "reft")


def record(passed) -> None:
    """A sampled question is about to be written."""
    questions = sample.sample_questions

    def passing(*args):
        for one in questions(*args):
            passed()
            yield one

    sample.sample_questions = passing


def moment(passed) -> None:
    """The first rollout begins; here NUMBER is milliseconds from then on."""
    before(reft, "roll_out_once", passed)


def full_disk(passed) -> None:
    """A step of PPO is about to be saved."""
    before(checkpoints.Checkpoints, "save", passed, lambda self, *args: self.folder.parent.name == "reft")


POINTS = {
    "none": lambda passed: None,
    "chunk": chunk,
    "program": program,
    "sft update": update_of(sft),
    "update": update_of(iteration),
    "rerank update": update_of(rerank),
    "saving": saving,
    "manifest": manifest,
    "record": record,
    "time": moment,
    "full disk": full_disk,
    "no space": full_disk,
}


def hit(number: signal.Signals) -> None:
    os.write(2, f"hit at {time.monotonic()}\n".encode())
    os.kill(os.getpid(), number)


def fill(folder: Path) -> None:
    """Takes what is left of a disk."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def refuse() -> None:
    """Orbax finds no space from here on."""

    def refused(self, directory, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))

    orbax.checkpoint.StandardCheckpointer.save = refused


def run(point: str, number: str, signal_name: str, *arguments: str) -> None:
    count, numbers = itertools.count(1), {int(n) for n in number.split(",")}
    workdir = next(Path(a.partition("=")[2]) for a in arguments if a.startswith("--workdir="))

    def passed() -> bool:
        if point == "time":
            if next(count) == 1:
                threading.Timer(int(number) / 1000, hit, [signal.Signals[signal_name]]).start()
            return False
        if next(count) not in numbers:
            return False
        if point == "full disk":
            fill(workdir)
        elif point == "no space":
            refuse()
        elif point == "program":
            threading.Timer(0.5, hit, [signal.Signals[signal_name]]).start()
        else:
            hit(signal.Signals[signal_name])
        return True

    POINTS[point](passed)
    sys.argv = ["reft", *arguments]
    main()


if __name__ == "__main__":
    run(*sys.argv[1:])
