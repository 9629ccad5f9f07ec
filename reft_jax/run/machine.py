"""What a run computes with: the executor's processes, the devices, the model and the rollout engine."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from reft_jax import executor
from reft_jax.config import flatten
from reft_jax.engine.generate import Engine, make_engine
from reft_jax.model.hf import read_config
from reft_jax.model.llama import Llama
from reft_jax.parallel.mesh import make_mesh, row_shards
from reft_jax.types import InputError

LENGTHS = ("sft.max_len", "rl.max_len", "sample.max_len", "rerank.max_len")
BY_ROW = ("sft.micro_batch", "rl.micro_batch", "rerank.micro_batch", "engine.slots")


@dataclass(frozen=True)
class Machine:
    """Devices, the model's shape (no weights), and the engine that samples from it."""

    mesh: Mesh
    model: Llama
    engine: Engine


def make_machine(config, base: Path, end_ids: Sequence[int], mesh, after_chunk: Callable[[], None]) -> Machine:
    """The model of folder `base` on `mesh`, and its engine, whose rows end at any of `end_ids`.

    `after_chunk` is called between chunks of decode steps. Reads config.json and no weights.
    """
    shapes, settings = read_config(base), flatten(config)
    shapes.check_lengths({key: settings[key] for key in LENGTHS})
    model = Llama(shapes, dtype=jax.numpy.dtype(config.model.dtype), remat=config.model.remat)
    return Machine(mesh, model, make_engine(config, model, mesh, end_ids, after_chunk=after_chunk))


@contextmanager
def running_executor(workers: int, memory_mb: int, allow_unsandboxed: bool) -> Iterator[None]:
    """Keeps the executor's processes running inside the `with`; prints on stderr what guards a program.

    InputError if too little guards it and that is not allowed, or if this machine has no room for it.
    """
    try:
        print(executor.start(workers, memory_mb, allow_unsandboxed), file=sys.stderr, flush=True)
    except executor.InfrastructureError as error:
        raise InputError(str(error)) from error
    try:
        yield
    finally:
        executor.shutdown()


def open_mesh(config):
    """The config's mesh over this process's devices; JAX takes them here. InputError."""
    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def check_rows(config, mesh, keys: Sequence[str] = BY_ROW) -> None:
    """InputError unless what is spread by row divides evenly among the mesh's row shards."""
    for key in keys:
        if flatten(config)[key] % row_shards(mesh):
            raise InputError(f"config: {key} must be a multiple of the {row_shards(mesh)} row shards of the mesh")
