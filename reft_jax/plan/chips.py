"""Chips that a plan can be made for, what they do at best, and how long a program takes on them by a roofline.

Peak FLOP/s, memory and its rate: Google Cloud's page of each version (docs.cloud.google.com/tpu/docs/v4, …/v5e, …/v5p,
…/v6e). Links: the same pages' bidirectional bandwidth of a chip, over its ports and both directions (v5e 400 GB/s over
4, v5p 1,200 over 6, v6e 800 over 4); of v4, 6 links of 50 GB/s, Table 4 of arXiv 2304.01433.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from reft_jax.plan.hlo import Cost
from reft_jax.types import InputError

HOP = 1e-6  # seconds that a message takes to the next chip: what a collective of few bytes costs


class Chip(NamedTuple):
    """flops: bfloat16 a second; memory: bytes; memory_rate, link_rate (one link, one direction): bytes a second; clock:
    cycles a second, which is flops / (2 · 128² · matrix units), None where their number is not published."""

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    clock: float | None


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 50e9, 275e12 / (2 * 128**2 * 8)),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 50e9, 197e12 / (2 * 128**2 * 4)),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 100e9, 459e12 / (2 * 128**2 * 8)),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 100e9, None),
}


class Seconds(NamedTuple):
    """What a program takes of each of a chip's parts, if it had the others to itself."""

    compute: float
    memory: float
    network: float

    @property
    def best(self) -> float:
        """Everything at once: the slowest part hides the others."""
        return max(self)

    @property
    def estimate(self) -> float:
        """Nothing of the network hidden: what a plan counts with."""
        return max(self.compute, self.memory) + self.network


def chips_in(topology: str) -> int:
    """Of `v5e:4x8`, 32. InputError if it is not written so."""
    try:
        return math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    except ValueError:
        raise InputError(f"--topology: {topology!r} is not written as v5e:4x8") from None


def chip_of(topology: str) -> Chip:
    """Of `v5e:4x8`. InputError if the version is unknown."""
    version = topology.partition(":")[0]
    if version not in CHIPS:
        raise InputError(f"--topology: {topology!r} names no known chip; write one of {', '.join(CHIPS)}, as v5e:4x8")
    return CHIPS[version]


def per_device(chip: Chip, devices: int) -> Chip:
    """Its share where the compiler makes several devices of a chip (two of v4)."""
    return chip._replace(
        flops=chip.flops / devices,
        memory=chip.memory / devices,
        memory_rate=chip.memory_rate / devices,
        link_rate=chip.link_rate / devices,
    )


def seconds(chip: Chip, cost: Cost) -> Seconds:
    """The roofline of a program: FLOPs and bytes at the chip's peak rates, collectives one after another."""
    return Seconds(cost.flops / chip.flops, cost.bytes / chip.memory_rate, network_seconds(chip, cost.collectives))


def network_seconds(chip: Chip, collectives: Mapping[tuple[str, int], tuple[int, int]]) -> float:
    """Each group of chips is taken to lie in a ring along one axis of the torus, used in both directions.

    So a gather or scatter of an array of n bytes over g chips takes n (g-1)/g over two links, an all-reduce twice
    that, an all-to-all a quarter of a gather of all parts; and never less than the hops half around the ring.
    """
    total = 0.0
    for (kind, group, *_), (number, size) in collectives.items():
        ring, hops = 2 * chip.link_rate, number * HOP * (group // 2)
        once = size * (group - 1) / group / ring
        if kind == "all-reduce":
            total += max(2 * once, 2 * hops)
        elif kind in ("all-to-all", "ragged-all-to-all"):
            total += max(group * once / 4, hops)
        elif kind == "collective-permute":
            total += max(size / chip.link_rate, number * HOP)
        else:
            total += max(once, hops)
    return total
