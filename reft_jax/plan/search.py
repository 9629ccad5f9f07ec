"""Searches mesh, micro-batch and remat policy for a run: ranks all candidates by arithmetic; the best are compiled.

The arithmetic knows sizes and the roofline but not the compiler: it orders the candidates, and `plan` judges them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.config import check_config, replaced
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.parallel.mesh import round_up
from reft_jax.plan import chips
from reft_jax.plan import flops as cost
from reft_jax.plan.hlo import Cost
from reft_jax.plan.plan import SPARE
from reft_jax.types import InputError

COMPILED = 3  # candidates that are compiled
# Per remat policy: activations that a layer keeps per token, in units of the model's width, and FLOPs relative to the
# formulas.
REMAT = {"full": (1, 8 / 6), "dots": (None, 1.05)}  # dots keeps the result of every product


class Candidate(NamedTuple):
    """One choice of pod, mesh, micro-batches and remat policy.

    memory: bytes per chip of an update or of a rollout, the larger of the two. seconds: of one PPO iteration.
    """

    topology: str
    chips: int
    fsdp: int
    tensor: int
    micro_batches: int
    remat: str
    memory: float
    seconds: float

    def apply(self, config):
        """The config with these settings."""
        changes = {"mesh.data": -1, "mesh.fsdp": self.fsdp, "mesh.tensor": self.tensor, "model.remat": self.remat}
        changes["rl.samples"] = make_algorithm(config).samples
        changes["rl.micro_batch"] = rollout_rows(config) // config.rl.minibatches // self.micro_batches
        shards = self.chips // self.tensor
        for name, rows in (("sft", config.sft.batch_size), ("rerank", config.rerank.batch_size)):
            most = max(rows // self.micro_batches, shards)
            changes[f"{name}.micro_batch"] = max(d for d in _divisors(rows) if d % shards == 0 and d <= most)
        return check_config(replaced(config, changes))


def candidates(config, shapes: LlamaConfig, topologies: list[str]) -> list[Candidate]:
    """Returns the candidates that divide the model and the batches.

    Those that fit come first, in order of chip-seconds, then the others in order of memory. Raises InputError if none
    divides.
    """
    found = [one for topology in topologies for one in _of(config, shapes, topology)]
    if not found:
        raise InputError("--search: no mesh divides the model and the batches on these topologies; change batch sizes")

    def rank(one: Candidate):
        memory = chips.chip_of(one.topology).memory * (1 - SPARE)
        # Seconds of all chips together, because a pod that is as fast with more chips is not better.
        return (one.memory > memory, one.seconds * one.chips if one.memory <= memory else one.memory)

    return sorted(found, key=rank)


def _of(config, shapes: LlamaConfig, topology: str) -> Iterator[Candidate]:
    chip, number = chips.chip_of(topology), chips.chips_in(topology)
    for tensor in _divisors(number):
        if any(n % tensor for n in (shapes.num_kv_heads, shapes.intermediate_size, shapes.vocab_size)):
            continue
        for fsdp in _divisors(number // tensor):
            shards = number // tensor
            rows = rollout_rows(config) // config.rl.minibatches
            whole = (rollout_rows(config), config.sft.batch_size, config.rerank.batch_size, config.engine.slots)
            if shapes.hidden_size % fsdp or any(n % shards for n in whole):
                continue
            for micro_batches in _divisors(rows):
                if rows // micro_batches % shards:
                    continue
                for remat in REMAT:
                    memory, seconds = estimate(config, shapes, chip, number, fsdp, tensor, micro_batches, remat)
                    yield Candidate(topology, number, fsdp, tensor, micro_batches, remat, memory, seconds)


def rollout_rows(config) -> int:
    """Rows of one iteration: questions times samples."""
    return config.rl.questions * make_algorithm(config).samples


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def estimate(config, shapes, chip, number: int, fsdp: int, tensor: int, micro_batches: int, remat: str):
    """Estimates (bytes per chip, seconds per iteration) by arithmetic.

    For each pass over the layers weights are gathered over fsdp in two bytes per number, and gradients are scattered
    back. A layer's activations are summed over tensor twice in a forward pass, twice in a backward pass and once in a
    recomputed forward pass. Gradients are summed over data once per update.
    """
    rl, n, wide = config.rl, cost.parameters(shapes), shapes.hidden_size
    length, shards = round_up(rl.max_len, config.data.pad_multiple), number // tensor
    tokens = rollout_rows(config) * length // shards  # per chip and iteration
    kept, work = REMAT[remat]
    numbers = kept or 4 + (2 * shapes.intermediate_size / wide + 3) / tensor
    a_time = tokens // micro_batches // rl.minibatches
    activations = 2 * shapes.num_layers * numbers * a_time * wide + 8 * a_time * (
        wide + shapes.intermediate_size / tensor
    )
    trains = not config.lora.rank  # every parameter; an adapter's own are left out here, they are few
    gradients = trains * (2 if micro_batches > 1 else 1) * 4 * n / (fsdp * tensor)
    reference = make_algorithm(config).reference
    held = 12 + 4 * reference if trains else 2  # bytes per parameter of the state and of the reference, or of the base
    update = (held + 2 * trains) * n / (fsdp * tensor) + gradients + activations  # and of the compute copy
    slots = config.engine.slots // shards
    weight, key = (1 if kind == "int8" else 2 for kind in (config.engine.weights, config.engine.cache))  # bytes
    cache = cost.cache_bytes(shapes, slots, round_up(config.sample.max_len, config.data.pad_multiple), key) / tensor
    rollout = held * n / (fsdp * tensor) + weight * n / tensor + cache

    def collective(kind, group, size, times):
        return {(kind, group): (times, size * times)} if group > 1 else {}

    # Passes over the layers, in updates and scoring.
    passes = rl.ppo_epochs * (4 * (work > 1.1) + 3 * (work < 1.1)) + 1 + reference
    layer = 2 * n / shapes.num_layers / tensor
    weights = collective("all-gather", fsdp, layer, shapes.num_layers * passes * micro_batches)
    sums = collective("all-reduce", tensor, 2 * tokens * wide, shapes.num_layers * (2 * passes - rl.ppo_epochs))
    forward = cost.forward_flops(shapes, rollout_rows(config), length)
    flops = forward * (1 + reference + (3 * work - (not trains)) * rl.ppo_epochs) / number
    updates = trains * rl.ppo_epochs * rl.minibatches
    copies = collective("all-reduce", number // fsdp // tensor, 4 * n / (fsdp * tensor), updates)
    training = chips.seconds(chip, Cost(int(flops), 0, 0, weights)).estimate
    training += chips.network_seconds(chip, sums) + chips.network_seconds(chip, copies)
    rows = min(-(-rollout_rows(config) // shards), slots)
    steps = (rl.max_len - rl.max_prompt) * -(-rollout_rows(config) // (rows * shards))  # for each filling of the slots
    read = weight * n / tensor + cost.cache_bytes(shapes, rows, length, key) / tensor
    each = collective("all-reduce", tensor, 2 * rows * wide, 2 * shapes.num_layers)
    decode = cost.decode_flops(shapes, rows, length) / tensor
    rollouts = steps * chips.seconds(chip, Cost(int(decode), int(read), 0, each)).estimate
    return max(update, rollout), training + rollouts


def words(one: Candidate) -> list[str]:
    """A row of the table: pod, data × fsdp × tensor, micro-batches, remat, GiB per chip, seconds per iteration."""
    mesh = f"{one.chips // one.fsdp // one.tensor} × {one.fsdp} × {one.tensor}"
    return [one.topology, mesh, str(one.micro_batches), one.remat, f"{one.memory / 2**30:.1f}", f"{one.seconds:.2f}"]
