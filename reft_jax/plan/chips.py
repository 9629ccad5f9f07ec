"""The chips that a plan can be made for, their peak rates, and a roofline estimate of how long a function takes.

Sources. Peak FLOP/s, memory and memory rate: Google Cloud's page of each version (docs.cloud.google.com/tpu/docs/v4,
…/v5e, …/v5p, …/v6e). Links: the bidirectional bandwidth of a chip on the same pages, divided by ports and directions
(v5e 400 GB/s over 4 ports, v5p 1,200 over 6, v6e 800 over 4); v4 has 6 links of 50 GB/s (Table 4 of arXiv 2304.01433).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from reft_jax.plan.hlo import Cost
from reft_jax.types import InputError

HOP = 1e-6  # seconds that a message takes to the next chip; it dominates collectives of few bytes


class Chip(NamedTuple):
    """Peak numbers of a chip.

    flops: bfloat16 FLOPs per second. memory: bytes. memory_rate, link_rate (one link, one direction): bytes per second.
    clock: cycles per second, flops / (2 · 128² · matrix units); None if the number of units is not published.
    """

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
    """The time that a function needs of each part of a chip, if the other parts took no time."""

    compute: float
    memory: float
    network: float

    @property
    def best(self) -> float:
        """If all parts overlap: the slowest part hides the others."""
        return max(self)

    @property
    def estimate(self) -> float:
        """If the network overlaps with nothing; plans use this one."""
        return max(self.compute, self.memory) + self.network


def chips_in(topology: str) -> int:
    """The number of chips: 32 for `v5e:4x8`. Raises InputError if the topology is not written like this."""
    try:
        return math.prod(int(n) for n in topology.partition(":")[2].split("x"))
    except ValueError:
        raise InputError(f"--topology: {topology!r} is not written like v5e:4x8") from None


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as `v5e:4x8`. Raises InputError if the version is unknown."""
    version = topology.partition(":")[0]
    if version not in CHIPS:
        raise InputError(f"--topology: {topology!r} names no known chip; write one of {', '.join(CHIPS)}, like v5e:4x8")
    return CHIPS[version]


def per_device(chip: Chip, devices: int) -> Chip:
    """The share of a chip that one device has, if the compiler makes several devices of a chip (two of v4)."""
    return chip._replace(
        flops=chip.flops / devices,
        memory=chip.memory / devices,
        memory_rate=chip.memory_rate / devices,
        link_rate=chip.link_rate / devices,
    )


def seconds(chip: Chip, cost: Cost) -> Seconds:
    """The roofline of a function: FLOPs and bytes at the chip's peak rates, collectives one after another."""
    return Seconds(cost.flops / chip.flops, cost.bytes / chip.memory_rate, network_seconds(chip, cost.collectives))


def network_seconds(chip: Chip, collectives: Mapping[tuple[str, int], tuple[int, int]]) -> float:
    """Seconds that the collectives take, if each group of chips is a ring along one axis of the torus.

    The ring is used in both directions. A gather or scatter of an array of n bytes over g chips moves n (g-1)/g over
    two links, an all-reduce twice that, an all-to-all a quarter of a gather of all parts. None takes less than the hops
    half around the ring. collectives: (kind, devices in a group) -> (number, their bytes together).
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
