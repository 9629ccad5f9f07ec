"""Predicts whether a run fits a pod, how fast it can be and what it costs.

The TPU compiler compiles every function of the run, without a TPU, and their texts are counted (plan/hlo.py).
docs/pods.md explains the tables.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies

import reft_jax
from reft_jax.config import flatten
from reft_jax.model import families
from reft_jax.model.hf import read_config
from reft_jax.model.llama import Llama
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model_folder import read_json
from reft_jax.parallel.mesh import check_divides, make_mesh, on_mesh
from reft_jax.plan import chips
from reft_jax.plan.functions import Jitted, RunFunctions
from reft_jax.plan.hlo import Cost, count
from reft_jax.run.machine import LENGTHS, check_rows
from reft_jax.store import as_path, readable, write_whole
from reft_jax.toy.model import toy_config
from reft_jax.types import InputError

SPARE = 0.1  # share of a chip's memory for what no function accounts for: the runtime, fragments, the next batch


class Measured(NamedTuple):
    """What the compiler says about one function.

    arguments, temporaries, peak: bytes per chip. cost: of one call. problem: why it did not compile; "" if it did.
    """

    compile_seconds: float
    arguments: int
    temporaries: int
    peak: int
    cost: Cost
    problem: str


class Planned(NamedTuple):
    """One line of the plan.

    resident: bytes per chip, with what else is in memory then. seconds: of doing it once.
    """

    function: Jitted
    measured: Measured
    resident: int
    seconds: chips.Seconds


class Plan(NamedTuple):
    """The plan of a run on a pod.

    residents: bytes per chip of the arrays that stay in memory. iteration: seconds of each line in one PPO iteration.
    mfu, update_mfu: model FLOPs utilization of an iteration and of its updates.
    """

    topology: str
    devices: int
    chip: chips.Chip
    lines: list[Planned]
    residents: dict[str, int]
    iteration: dict[str, float]
    mfu: float
    update_mfu: float

    @property
    def largest(self) -> Planned:
        return max(self.lines, key=lambda line: line.resident)

    @property
    def fits(self) -> bool:
        return self.largest.resident <= (1 - SPARE) * self.chip.memory

    @property
    def seconds(self) -> float:
        return sum(self.iteration.values())

    @property
    def cost(self) -> float:
        """Chip-seconds of an iteration."""
        return self.seconds * self.devices


def topology_devices(topology: str) -> list:
    """The devices of a pod such as `v5e:4x8`, from the TPU compiler.

    Raises InputError if the compiler is not installed or does not know the pod.
    """
    chips.chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("plan needs the TPU compiler (no TPU): run launch/venv.sh plan")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # libtpu raises several types
        raise InputError(f"--topology: the TPU compiler does not know {topology!r} ({error})") from error


def shapes_of(config, config_file: Path) -> tuple[LlamaConfig, str]:
    """The model's shapes and their source: its folder, or models/NAME.json next to the config. Raises InputError."""
    if config.model.path == "toy":
        return toy_config(config, config.toy.vocab_size), "toy"
    families.use(config.model.family)
    folder = as_path(config.model.path)
    beside = config_file.parent / "models" / f"{folder.name}.json"
    if not folder.is_dir() and beside.is_file():
        return LlamaConfig.from_hf(read_json(beside), str(beside)), str(beside)
    return read_config(readable(folder)), str(folder / "config.json")


def make_plan(config, shapes: LlamaConfig, topology: str, cache: Path, say=print) -> Plan:
    """Plans a run; compiles the functions that are not in the folder `cache`.

    say: called with lines about the progress. Raises InputError if the mesh does not divide the model or the batches.
    """
    devices = topology_devices(topology)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    check_rows(config, mesh)
    shapes.check_lengths({key: flatten(config)[key] for key in LENGTHS})
    model = Llama(shapes, dtype=jax.numpy.dtype(config.model.dtype), remat=config.model.remat)
    key = cache_key(config, shapes, topology)
    chip = chips.per_device(chips.chip_of(topology), len(devices) // chips.chips_in(topology))
    functions = RunFunctions(config, model, mesh)
    check_divides(mesh, functions.policy)

    def result(function: Jitted, compiling: Future | None) -> Measured:
        if compiling:
            compiling.result()
        measured = recall(cache_path(function, cache, key), function.trips)
        say(f"{function.name}: {measured.problem or f'compiled in {measured.compile_seconds:.0f} s'}")
        return measured

    # Traced one after another (the mesh belongs to the thread), compiled in parallel: a compilation uses mostly one
    # thread.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        under_way = []
        for function in functions.all:
            compiling, path = None, cache_path(function, cache, key)
            if not path.exists():
                with on_mesh(mesh):
                    compiling = pool.submit(compile_into, path, function.lower())
            under_way.append((function, compiling))
        lines = [planned(f, result(f, compiling), functions.residents, chip) for f, compiling in under_way]
    return estimated(topology, len(devices), chip, lines, functions.residents)


def compile_into(path: Path, lowered) -> None:
    """Compiles a function and keeps what `recall` reads: its text, then sizes and seconds at `path`.

    It is not an error if the function needs more memory than a chip has: `problem` then says so.
    """
    begun, text, problem = time.monotonic(), "", ""
    arguments = temporaries = peak = 0
    try:
        compiled = lowered.compile()
        text, memory = compiled.as_text(), compiled.memory_analysis()
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        peak = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporaries
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        temporaries = peak = int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))
        problem = f"needs {used[1]} {used[2]}iB at once"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".hlo.gz"), gzip.compress(text.encode()))
    sizes = {"arguments": arguments, "temporaries": temporaries, "peak": peak, "problem": problem}
    write_whole(path, json.dumps({"compile_seconds": time.monotonic() - begun} | sizes))


def recall(path: Path, trips: dict[str, int]) -> Measured:
    """Reads what `compile_into` kept, and counts the text."""
    text = gzip.decompress(path.with_suffix(".hlo.gz").read_bytes()).decode()
    return Measured(**json.loads(path.read_text()), cost=count(text, trips) if text else Cost(0, 0, 0, {}))


def planned(function: Jitted, measured: Measured, residents: dict[str, int], chip: chips.Chip) -> Planned:
    """The line of a function, with memory and time on this chip."""
    resident = measured.peak + sum(residents[name] for name in function.beside)
    seconds = chips.Seconds(*(part / function.once for part in chips.seconds(chip, measured.cost)))
    return Planned(function, measured, resident, seconds)


def estimated(topology: str, devices: int, chip: chips.Chip, lines: list[Planned], residents: dict[str, int]) -> Plan:
    """The plan that these lines give: seconds of an iteration and MFU."""
    iteration = {line.function.name: line.function.calls * line.seconds.estimate for line in lines}
    iteration = {name: seconds for name, seconds in iteration.items() if seconds}
    at_peak = {line.function.name: line.function.calls * line.function.flops / (chip.flops * devices) for line in lines}
    updates = iteration.get("PPO update", 0.0)
    mfu = sum(at_peak.values()) / sum(iteration.values()) if iteration else 0.0
    return Plan(
        topology,
        devices,
        chip,
        lines,
        residents,
        iteration,
        mfu,
        at_peak["PPO update"] / updates if updates else 0.0,
    )


def cache_key(config, shapes: LlamaConfig, topology: str) -> str:
    """A hash of all that the compiled functions depend on: settings, shapes, pod, versions and this package's code."""
    package = Path(reft_jax.__file__).parent
    parts = [flatten(config), asdict(shapes), topology, *map(version, ("jax", "flax", "optax", "libtpu"))]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for part in ("algo", "engine", "model", "train", "parallel/mesh.py", "plan/functions.py"):
        for path in sorted((package / part).rglob("*.py")) or [package / part]:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def cache_path(function: Jitted, cache: Path, key: str) -> Path:
    """Where `compile_into` keeps a function."""
    return cache / key / f"{re.sub(r'[^a-zA-Z]+', '_', function.name)}.json"


def as_json(measured: Measured) -> dict:
    """The numbers of a function as plain JSON values."""
    cost = measured.cost._asdict()
    cost["kinds"] = dict(cost["kinds"])
    cost["collectives"] = [[*key, *sums] for key, sums in measured.cost.collectives.items()]
    return measured._asdict() | {"cost": cost}


def advice(plan: Plan) -> Iterator[str]:
    """Says what to change, by the largest part of the memory at the function that needs most."""
    line, names = plan.largest, {}
    names["temporaries"] = line.measured.temporaries
    names["arguments and results"] = line.measured.peak - line.measured.temporaries
    names |= {name: plan.residents[name] for name in line.function.beside}
    part = max(names, key=names.get)
    training = line.function.calls == 0 or "update" in line.function.name or "score" in line.function.name
    yield f"the largest part of the memory at {line.function.name} is {part}"
    if part == "temporaries" and training:
        yield "halve its micro_batch, set model.remat=full, or raise mesh.tensor"
    elif part in ("temporaries", "slots") or line.function.name.startswith("decode"):
        yield "lower engine.slots, or raise mesh.tensor, which divides cache and rollout weights"
    elif part == "rollout weights":
        yield "raise mesh.tensor, which divides them"
    else:
        yield "raise mesh.fsdp or mesh.tensor instead of mesh.data, or take more chips: they divide the state"
