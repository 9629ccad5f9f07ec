"""All use of Orbax: the parameters that a stage saves, and the steps that a running stage resumes from.

A step is a folder, `checkpoints/120/`. It is valid once its manifest exists:

    state/          params, heads, optimizer and step, sharded (Orbax)
    step.json       about the state: {"step", "info", "made_by", "arrays": {place: checksum}}
    manifest.json   every file's size and SHA-256, written last
"""

import json
import logging
import os
import threading
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import unboxed
from reft_jax.store import DISK, WHOLE, reading, remedy, remove, writing
from reft_jax.train.checksums import ADAPTER, ARRAYS, MANIFEST, array_checksums, damage, damaged, write_manifest
from reft_jax.types import InputError, SaveError

# Orbax also raises what it logs as an error with the stacks of its threads; our one line is enough.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno < logging.ERROR)


def save_params(folder: Path, params, adapter: dict | None = None) -> None:
    """Writes a parameter tree. An older one is removed only when this one is complete (Orbax's `force` deletes first).

    adapter: JSON about an adapter, written beside it. Raises SaveError.
    """
    whole = folder.with_name(folder.name + ".new").absolute()
    checksums = array_checksums(params)
    try:
        with orbax_checkpointer() as checkpointer:
            checkpointer.save(os.fspath(whole), params, force=True)
    except Exception as error:  # Orbax raises a different class per file system
        if hosts.is_first():
            for part in whole.parent.glob(f"{whole.name}*"):  # they may be what fills the disk
                remove(part)
        problem = f"{folder} could not be saved ({first_line(error)})"
        raise SaveError(f"{problem}; {WHOLE}: {remedy(folder)}") from error
    if hosts.is_first():
        with writing(folder):
            (whole / ARRAYS).write_text(json.dumps(checksums, indent=1) + "\n")
            if adapter:
                (whole / ADAPTER).write_text(json.dumps(adapter, indent=1) + "\n")
            write_manifest(whole)
            old = folder.with_name(folder.name + ".old")
            if folder.exists():
                remove(old)
                folder.rename(old)
            whole.rename(folder)
            remove(old)
    hosts.gather(f"{folder} is whole", None)


def check_shapes(folder: Path, abstract) -> None:
    """Reads no arrays. InputError unless saved parameters have the names and shapes of `abstract`.

    SaveError if a bucket does not answer.
    """

    def shapes(tree) -> dict[str, tuple]:
        return {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    try:
        with orbax_checkpointer() as checkpointer:
            found = shapes(checkpointer.metadata(os.fspath(folder.absolute())).item_metadata.tree)
    except Exception as error:  # Orbax raises a different class per kind of damage
        with reading(folder):  # a bucket that does not answer says nothing about the model
            folder.is_dir()
        problem = f"{folder}: no model can be read there ({first_line(error)})"
        raise InputError(f"{problem}; restore it from a copy") from error
    wanted = shapes(unboxed(abstract))
    if different := [name for name in found | wanted if found.get(name) != wanted.get(name)]:
        shape, needed = found.get(different[0], "none: it is missing"), wanted.get(different[0], "none")
        problem = f"{folder}: {different[0]} has shape {shape}, but {needed} is needed"
        raise InputError(f"{problem}; is it another kind of model, or of another base?")


def orbax_checkpointer():
    """Orbax's reader and writer. Its import takes a quarter of a second, and a new stage needs it only to save."""
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def first_line(error: BaseException) -> str:
    """What went wrong, in one line. Of a disk error only the reason: Orbax adds kilobytes of context."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return next((reason for reason in map(os.strerror, DISK) if reason in line), line)


def load_params(folder: Path, abstract):
    """Reads a tree into the shapes, dtypes and shardings of `abstract` (see parallel.mesh.abstract_arrays).

    InputError if a file, or an array after reading, differs from what was saved.
    """
    problem = hosts.from_first(f"damage of {folder}", lambda: damage(folder))
    if not problem:
        with orbax_checkpointer() as checkpointer:
            params = checkpointer.restore(os.fspath(folder.absolute()), abstract)
        problem = _difference(json.loads((folder / ARRAYS).read_text()), params)
    if problem:
        raise damaged(folder, problem)
    return params


def has_value_head(folder: Path) -> bool:
    """Whether saved parameters have a value head: those of algorithms without a critic have none."""
    try:
        with reading(folder):
            return "value_head" in (folder / ARRAYS).read_text()
    except OSError:  # `load_params` says what is wrong with the folder
        return True


class Restored(NamedTuple):
    """A step that was read: its number, the state on the mesh, and `info` and `made_by` as saved."""

    step: int
    state: Any
    info: dict
    made_by: dict


def whole_steps(folder: Path) -> list[int]:
    """The steps in a stage's folder checkpoints/ that were written completely, damaged since or not; ascending."""
    return [step for step in _steps(folder) if (folder / str(step) / MANIFEST).exists()]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir())


class Checkpoints:
    """The last `keep` steps of a running stage. Saving runs in the background, one step at a time."""

    def __init__(self, folder: Path, keep: int, made_by: dict):
        """`made_by` is JSON that every step records: the config, data, versions and reference that made it."""
        self.folder, self.keep, self.made_by = folder.absolute(), keep, made_by
        self._commit: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest = max(_steps(self.folder), default=-1)

    @cached_property
    def _checkpointer(self):
        return orbax_checkpointer()

    def save(self, step: int, state, info: dict) -> None:
        """Starts to write a step, and returns when `state` may be donated. Waits for the step before.

        Raises SaveError if that one or this one cannot be written; ValueError unless it is the newest.
        """
        self.wait()
        if step <= self._newest:
            raise ValueError(f"{self.folder}: step {step} was not saved; step {self._newest} is there")
        folder, checksums = self.folder / str(step), array_checksums(state)
        try:
            if hosts.is_first():
                remove(folder)
                folder.mkdir(parents=True)
                about = {"step": step, "info": info, "made_by": self.made_by, "arrays": checksums}
                (folder / "step.json").write_text(json.dumps(about, indent=1, allow_nan=False) + "\n")
            hosts.gather(f"{folder} is there", None)
            self._checkpointer.save(os.fspath(folder / "state"), state)
        except Exception as error:  # Orbax raises a different class per file system
            self._failed(folder, error)
        self._commit = threading.Thread(target=self._finish, args=(folder,), name="reft-save")
        self._commit.start()
        self._newest = step

    def wait(self) -> None:
        """Waits until the step that is being written is complete. Raises SaveError if it could not be written."""
        if self._commit:
            self._commit.join()
        self.check()

    def check(self) -> None:
        """Raises SaveError if a step could not be written; does not wait."""
        if self._commit and not self._commit.is_alive():
            self._commit = None
            if error := self._error:
                self._error = None
                self._failed(self.folder / str(self._newest), error)

    def infos(self) -> list[dict]:
        """The `info` of every complete step that is kept, oldest first."""
        texts = [(self.folder / str(step) / "step.json").read_text() for step in whole_steps(self.folder)]
        return [json.loads(text)["info"] for text in texts]

    def restore(self, abstract_state) -> Restored | None:
        """The newest undamaged step; None if no step was ever complete.

        Newer steps that are damaged or incomplete move to quarantine/, with the reason. InputError if there are
        complete steps and all are damaged: a run never starts over unless its owner removes them.
        """
        bad: dict[int, str] = {}
        for step in hosts.from_first(f"steps in {self.folder}", lambda: _steps(self.folder)[::-1]):
            found = self._read(step, abstract_state)
            if isinstance(found, Restored):
                break
            bad[step] = found
        else:
            found = None
            if hosts.from_first(f"whole steps in {self.folder}", partial(whole_steps, self.folder)):
                told = "; ".join(f"{step}: {reason}" for step, reason in bad.items())
                problem = f"{self.folder}: no saved step can be used ({told})"
                raise InputError(f"{problem}; restore one from a copy, or remove the folder to begin this stage again")
        if hosts.is_first():
            for step, reason in bad.items():
                self._quarantine(step, reason)
        hosts.gather(f"{self.folder} holds good steps only", None)
        self._newest = found.step if found else -1
        return found

    def close(self) -> None:
        """Waits for the last step. Raises SaveError if it could not be written."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _read(self, step: int, abstract_state) -> Restored | str:
        """The step, or in words what is wrong with it."""
        folder = self.folder / str(step)
        if reason := hosts.from_first(f"damage of {folder}", lambda: damage(folder)):
            return reason
        about = json.loads((folder / "step.json").read_text())
        state = self._checkpointer.restore(os.fspath(folder / "state"), abstract_state)
        if reason := _difference(about["arrays"], state):
            return reason
        return Restored(step, state, about["info"], about["made_by"])

    def _finish(self, folder: Path) -> None:
        """In the background: writes the manifest when everything else is on the disk, then removes older steps."""
        try:
            self._checkpointer.wait_until_finished()
            if hosts.is_first():
                write_manifest(folder)
                for step in whole_steps(self.folder)[: -self.keep]:
                    (self.folder / str(step) / MANIFEST).unlink()  # from here on it is not a step
                for step in set(_steps(self.folder)) - set(whole_steps(self.folder)):
                    remove(self.folder / str(step), ignore_errors=False)
        except BaseException as error:
            self._error = error

    def _failed(self, folder: Path, error: BaseException) -> None:
        if hosts.is_first():
            remove(folder)  # it may be what fills the disk
        whole = whole_steps(self.folder)
        last = f"step {whole[-1]} is whole and will be used" if whole else "no earlier step was saved"
        raise SaveError(f"{folder} could not be saved ({first_line(error)}); {last}; {remedy(folder)}") from error

    def _quarantine(self, step: int, reason: str) -> None:
        """Moves a damaged step to quarantine/. Only the last one keeps its arrays: each is as large as three models."""
        place = self.folder / "quarantine"
        for older in place.glob("[0-9]*"):
            remove(older, ignore_errors=False)
        place.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(place / str(step))
        with (place / "reasons.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "reason": reason}) + "\n")
        print(f"{self.folder}: step {step} is not used ({reason}); moved to {place}", flush=True)


def _difference(checksums: dict[str, str], tree) -> str | None:
    found = array_checksums(tree)
    different = [name for name in found | checksums if found.get(name) != checksums.get(name)]
    return f"the checksum of {different[0]} is not that of the array that was saved" if different else None
