"""One run on pods of several sizes: batches and the fsdp axis grow in proportion to the chips."""

from collections import Counter
from fractions import Fraction

from reft_jax.config import check_config, flatten, replaced
from reft_jax.plan.chips import chips_in, network_seconds
from reft_jax.plan.plan import Plan
from reft_jax.types import InputError

GROWING = ("rl.questions", "rl.micro_batch", "sft.batch_size", "sft.micro_batch", "rerank.batch_size")
GROWING += ("rerank.micro_batch", "engine.slots", "mesh.fsdp")


def grown(config, topology: str, base: int):
    """The config for this pod, if it was written for `base` chips. InputError if a batch cannot shrink so far."""
    factor, flat = Fraction(chips_in(topology), base), flatten(config)
    changes = {}
    for key in GROWING:
        size = flat[key] * factor
        if size.denominator > 1 or size < 1:
            raise InputError(f"--grow: {key}={flat[key]} on {base} chips makes no whole number on {topology}")
        changes[key] = int(size)
    return check_config(replaced(config, changes))


def growth_row(plan: Plan, config) -> list[str]:
    """Pod, chips, mesh, prompts, GiB a chip, seconds of an iteration, of an update and of a decode step (ms), and the
    collective that takes most of an iteration, with its share."""
    lines = {line.function.name: line for line in plan.lines}
    taken: Counter[str] = Counter()
    for line in plan.lines:
        for (kind, group), sums in line.measured.cost.collectives.items():
            once = network_seconds(plan.chip, {(kind, group): sums}) / line.function.once
            taken[f"{kind} of {group} in {line.function.name}"] += line.function.calls * once
    name, most = taken.most_common(1)[0] if taken else ("-", 0.0)
    return [
        plan.topology,
        str(plan.devices),
        f"{config.mesh.fsdp} × {config.mesh.tensor}",
        str(config.rl.questions),
        f"{plan.largest.resident / 2**30:.1f}",
        f"{plan.seconds:.2f}",
        f"{lines['PPO update'].seconds.estimate:.3f}",
        f"{1e3 * lines['decode, PPO'].seconds.estimate:.2f}",
        f"{name}, {most / plan.seconds:.0%}" if most else "-",
    ]


HEAD = ["pod", "chips", "fsdp × tensor", "prompts", "GiB a chip", "s an iteration", "s an update", "ms a decode step"]
HEAD += ["longest collective"]
