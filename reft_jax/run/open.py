"""Opens a work directory for a command: checks everything and makes it ready.

Cheap checks come first. Only the lock and the toy's data and model are written before all checks have passed.
The executor starts before JAX takes its devices. Weights are read and functions compiled last.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.config import flatten
from reft_jax.model import families
from reft_jax.model.heads import ValueHead
from reft_jax.parallel import hosts
from reft_jax.parallel.compilation import keep_compiled
from reft_jax.parallel.mesh import check_divides, on_mesh
from reft_jax.run import lock
from reft_jax.run.about import versions
from reft_jax.run.executions import ExecutionLog
from reft_jax.run.guards import Guards
from reft_jax.run.inputs import Inputs, checked_tokenizer, load_data, read_inputs
from reft_jax.run.machine import Machine, check_rows, make_machine, open_mesh, running_executor
from reft_jax.run.watch import Silence, warn_of_settings
from reft_jax.run.workdir import check_workdir, create_workdir, with_absolute_paths
from reft_jax.settings import Config
from reft_jax.store import as_path, readable, remove
from reft_jax.tasks.rewards import check_reward
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.toy.model import MADE, write_data, write_model
from reft_jax.train.state import abstract_params
from reft_jax.train.trackers import load_trackers
from reft_jax.types import InputError


@dataclass(frozen=True)
class Workdir:
    """Where a run writes: its folder, and the audit log in it."""

    path: Path
    executions: ExecutionLog

    def model(self, name: str) -> Path:
        """Where a finished stage puts its model; the warm-up model is there as soon as its epoch is over."""
        return self.path / "models" / name

    def samples(self, name: str, split: str) -> Path:
        return self.path / "samples" / f"{name}_{split}.jsonl"


@dataclass(frozen=True)
class Run:
    """A work directory made ready for a command.

    `guards` say when to stop; `silence` counts rollouts without an answer; `programs` counts the outcomes of programs.
    """

    inputs: Inputs
    machine: Machine
    workdir: Workdir
    guards: Guards
    silence: Silence = field(default_factory=Silence)
    programs: Counter = field(default_factory=Counter)

    @property
    def config(self):
        return self.inputs.config


@contextmanager
def open_run(
    config, workdir: Path, needs: list[str], allowed: Sequence[str] = (), *, read_only: bool = False
) -> Iterator[Run]:
    """Checks everything, cheap checks first, and yields the Run; stops the executor at the end.

    allowed: settings that may differ from those the work directory was made with. read_only: the command writes nothing
    in the work directory, so it may run while another one uses it.
    """
    workdir = workdir.absolute()
    config = checked_settings(config, workdir, needs, allowed, read_only=read_only)
    make_algorithm(config)  # a wrong one is found now, not after SFT
    load_trackers(config.tracking)
    check_reward(config.reward)
    with Guards(config.watchdog_minutes) as guards:
        with _opened(config, workdir, guards, read_only) as run:
            guards.check()
            yield run


def checked_settings(
    config, workdir: Path, needs: list[str], allowed: Sequence[str] = (), *, read_only: bool = False
) -> Config:
    """The config with absolute paths, if this command may use the work directory and all hosts run the same one.

    Arguments as for `open_run`. InputError if not; writes nothing.
    """
    hosts.agree("the command", workdir=str(workdir), **flatten(config), **versions())
    if not read_only:
        lock.look(workdir)
    config = with_absolute_paths(config, workdir)
    check_workdir(config, workdir, needs, allowed, read_only=read_only)
    families.use(config.model.family)
    return config


@contextmanager
def in_workdir(config, workdir: Path, mesh, *, read_only: bool = False) -> Iterator[Workdir]:
    """Makes the work directory if it is new, keeps logs and compiled functions there, and computes on `mesh`."""
    if not read_only:
        create_workdir(config, workdir)
        hosts.log_to(workdir / "logs")
    keep_compiled(as_path(config.compiled) if config.compiled else workdir / "compiled")
    with on_mesh(mesh):
        yield Workdir(workdir, ExecutionLog(workdir))


@contextmanager
def _opened(config, workdir: Path, guards: Guards, read_only: bool) -> Iterator[Run]:
    toy = config.model.path == "toy"
    if not toy:
        base = readable(as_path(config.model.path))
        data = load_data(config, {"train": config.data.train, "dev": config.data.dev, "test": config.data.test})
        inputs = read_inputs(config, base, checked_tokenizer(base), data)
    limits = config.executor
    with (
        nullcontext() if read_only else lock.held(workdir),
        running_executor(limits.workers, limits.memory_mb, limits.allow_unsandboxed),
    ):
        mesh = open_mesh(config)
        check_rows(config, mesh)
        if not read_only:
            warn_of_settings(config, mesh.devices.flat[0].platform)
        if toy:
            inputs = toy_inputs(config, workdir, read_only)
        machine = make_machine(config, inputs.base, inputs.end_ids, mesh, guards.step)
        check_divides(mesh, abstract_params(machine.model, ValueHead(), "value_head"))
        with in_workdir(config, workdir, mesh, read_only=read_only) as opened:
            hosts.agree("the data", **inputs.facts())
            yield Run(inputs, machine, opened, guards)


def toy_inputs(config, workdir: Path, read_only: bool) -> Inputs:
    """The inputs of the toy. The first host writes its data and its tiny model if they are missing.

    InputError if the work directory is new and has a folder toy/ that no start of a run has made.
    """
    folder = workdir / "toy"

    def write() -> dict[str, str]:
        if not read_only and not (workdir / "config.json").exists() and any(folder.glob("*")):
            if not (folder / MADE).exists():
                problem = f"{folder} is there already, and no run has made it"
                raise InputError(f"--workdir: {problem}; choose another, or move that folder away")
            remove(folder)  # left by a start with other settings
        return write_data(config, folder)

    data = load_data(config, hosts.from_first("the toy's data", write))
    base = folder / "model"
    hosts.from_first("the toy's model", lambda: write_model(config, data.train, base))
    base = readable(base)
    return read_inputs(config, base, load_tokenizer(base), data)
