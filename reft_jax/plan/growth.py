"""Plans one run for pods of several sizes: batches and the fsdp axis grow in proportion to the number of chips."""

from collections import Counter
from fractions import Fraction

from reft_jax.config import check_config, flatten, replaced
from reft_jax.plan.chips import chips_in, network_seconds
from reft_jax.plan.plan import Plan
from reft_jax.types import InputError

GROWING = ("rl.questions", "rl.micro_batch", "sft.batch_size", "sft.micro_batch", "rerank.batch_size")
GROWING += ("rerank.micro_batch", "engine.slots", "mesh.fsdp")


def grown(config, topology: str, base: int):
    """Scales a config that was written for `base` chips to this pod. Raises InputError if a size is not whole."""
    factor, flat = Fraction(chips_in(topology), base), flatten(config)
    changes = {}
    for key in GROWING:
        size = flat[key] * factor
        if size.denominator > 1 or size < 1:
            raise InputError(f"--grow: {key}={flat[key]} on {base} chips does not give a whole number on {topology}")
        changes[key] = int(size)
    return check_config(replaced(config, changes))


def growth_row(plan: Plan, config) -> list[str]:
    """A row of the table, in the columns of HEAD.

    The last column is the collective that takes most of an iteration, with its share.
    """
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


HEAD = ["pod", "chips", "fsdp × tensor", "questions", "GiB per chip", "s per iteration", "s per update"]
HEAD += ["ms per decode step", "longest collective"]
