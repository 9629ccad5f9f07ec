"""Orbax, in one place: parameters that a stage hands on, and the resumable state inside a stage."""

import shutil
from pathlib import Path

import orbax.checkpoint as ocp

from reft_jax.parallel import hosts


def save_params(folder: Path, params) -> None:
    """Writes a parameter tree; an older one goes only once this is complete (Orbax's own `force` deletes first)."""
    whole = folder.with_name(folder.name + ".new").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(whole, params, force=True)
    if hosts.is_first():
        old = folder.with_name(folder.name + ".old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        whole.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    hosts.gather(f"{folder} is whole", None)


def load_params(folder: Path, abstract):
    """Reads a tree into the shapes, dtypes and shardings of `abstract` (see parallel.mesh.abstract_arrays)."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract)


class Checkpoints:
    """The newest state of a running stage, with a small JSON beside it."""

    def __init__(self, folder: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step: int, state, info: dict) -> None:
        """Raises RuntimeError if Orbax declines the step (a stray newer one makes it do so without a word)."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
        if not self.manager.save(step, args=args):
            raise RuntimeError(f"{self.manager.directory}: step {step} was not saved; is a newer step there?")

    def restore(self, abstract_state):
        """(step, state, info) of the newest step, or None if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return None
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), info=ocp.args.JsonRestore())
        restored = self.manager.restore(step, args=args)
        return step, restored.state, restored.info

    def close(self) -> None:
        self.manager.close()
