"""Counts what a compiled function does from its HLO text: matrix FLOPs, bytes of main memory, collectives.

The body of a loop is multiplied by the number of its turns, in nested loops too; XLA's own `cost_analysis()` counts a
body once. All numbers are those of one device for one call.

The number of turns is read from the loop's condition, which compares a counter with a constant, and from the counter's
first value and step (the TPU compiler runs some loops in steps of two). A loop whose number of turns is an argument has
a `jax.named_scope`, and the caller says how often it runs (`trips`).
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from reft_jax.plan.hlo_text import Array, Computation, Instruction, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Operations that only name existing data.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "domain", "iota"}
RENAMED = ("bitcast", "reshape")
SCOPES = ("attention", "cache", "draw", "loss", "optimizer")  # `jax.named_scope`s of the model, the engine, training
KINDS = ("products", *SCOPES, "rest")  # products: with weights, as those of attention are in its scope
SLICES = ("dynamic-slice", "slice", "gather")  # read as many bytes as they return, from an operand of any size
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # work in place: the index of the operand with the new values


class Collective(NamedTuple):
    """One collective operation.

    group: number of devices that take part. bytes: size of the largest of its arrays on a device: after a gather,
    before a scatter. channel: equal for the instructions that do parts of one collective while other work runs.
    """

    kind: str
    group: int
    bytes: int
    channel: int | None


class Work(NamedTuple):
    """One instruction that runs `times` times.

    FLOPs, bytes of main memory and cycles (the compiler's own estimate, or 0) are those of one time.
    """

    times: int
    instruction: Instruction
    flops: int
    read: int
    written: int
    cycles: int
    collectives: tuple[Collective, ...]


class Cost(NamedTuple):
    """Sums over a function. collectives: (kind, devices in a group) -> (number, their bytes together). kinds: the
    cycles by what they are spent on, one of KINDS."""

    flops: int
    bytes: int
    cycles: int
    collectives: dict[tuple[str, int], tuple[int, int]]
    kinds: Mapping[str, int] = MappingProxyType({})


class LoopError(Exception):
    """The number of turns of a loop is neither in the text nor in `trips`."""


def count(text: str, trips: Mapping[str, int] | None = None) -> Cost:
    """The cost of a compiled function, from `compiled.as_text()`.

    trips: how often the loops of a named scope run (`with jax.named_scope("micro_batches"): fori_loop(...)`).
    Raises LoopError.
    """
    flops = moved = cycles = 0
    collectives: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    kinds = dict.fromkeys(KINDS, 0)
    for work in run(text, trips or {}):
        flops += work.times * work.flops
        moved += work.times * (work.read + work.written)
        cycles += work.times * work.cycles
        kinds[kind_of(work)] += work.times * work.cycles
        for kind, group, size, _ in work.collectives:
            collectives[kind, group][0] += work.times
            collectives[kind, group][1] += work.times * size
    return Cost(flops, moved, cycles, {key: tuple(sums) for key, sums in sorted(collectives.items())}, kinds)


def kind_of(work: Work) -> str:
    """Which of KINDS an instruction is: by its named scope, else a product if it is one.

    A fusion has the scope of its last operation, so a little of one kind may count as another.
    """
    scopes = work.instruction.source
    named = next((kind for kind in SCOPES if re.search(rf"\b{kind}\b", scopes)), None)
    return named or ("products" if work.flops else "rest")


def run(text: str, trips: Mapping[str, int]) -> list[Work]:
    """Everything that one call of a compiled function does. Raises LoopError."""
    computations, entry = parse(text)
    return _Counter(computations, trips).runs(entry)


class _Counter:
    """The computations of one compiled function, and the work of those that have been counted."""

    def __init__(self, computations: dict[str, Computation], trips: Mapping[str, int]):
        self.computations, self.trips = computations, trips
        self.counted: dict[str, list[Work]] = {}
        self.used: dict[int, dict[str, list[Instruction]]] = {}

    def runs(self, name: str) -> list[Work]:
        """The work of a computation, for one call of it."""
        if name not in self.counted:
            here, channels = self.computations[name], set()
            self.counted[name] = []
            for one in here.instructions.values():
                for work in self.work(here, one):
                    new = tuple(c for c in work.collectives if c.channel is None or c.channel not in channels)
                    channels |= {c.channel for c in work.collectives}
                    self.counted[name].append(work._replace(collectives=new))
        return self.counted[name]

    def work(self, here: Computation, one: Instruction) -> Iterator[Work]:
        if one.op == "while":
            times = self.turns(here, one)
            for part in ("condition", "body"):
                for work in self.runs(one.called(part)[0]):
                    yield work._replace(times=work.times * times)
        elif one.op == "conditional":
            names = one.called("branch_computations")
            names = names or one.called("true_computation") + one.called("false_computation")
            # The most expensive branch: this is an upper bound, not an average.
            yield from max(map(self.runs, names), key=lambda works: sum(w.times * (w.flops + w.read) for w in works))
        elif one.op in ("call", "async-start"):
            yield from self.runs((one.called("to_apply") or one.called("calls"))[0])
        elif one.op not in FREE and not one.op.endswith(("-done", "-update")):
            flops, collectives = self.inside(here, one)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
            read, written = self.read(here, one), self.written(here, one)
            yield Work(1, one, flops, read, written, int(cycles[1]) if cycles else 0, collectives)

    def inside(self, here: Computation, one: Instruction) -> tuple[int, tuple[Collective, ...]]:
        """FLOPs and collectives of an instruction; for a fusion, those of its computation."""
        arrays = [
            array for name in one.operands if name in here.instructions for array in here.instructions[name].arrays
        ]
        if one.op == "fusion":
            name = one.called("calls")[0]
            deeper = self.computations[name]
            parts = [self.inside(deeper, part) for part in deeper.instructions.values()]
            collectives = tuple(c for _, found in parts for c in found)
            if name.startswith("all-reduce-scatter"):  # how the TPU compiler writes a reduce-scatter
                collectives = tuple(c._replace(kind="reduce-scatter") for c in collectives)
            return sum(flops for flops, _ in parts), collectives
        if one.op.removesuffix("-start") in COLLECTIVES:
            size = max(array.bytes for array in (*one.arrays, *arrays))
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            kind, number = one.op.removesuffix("-start"), int(channel[1]) if channel else None
            return 0, (Collective(kind, _group(one.attributes), size, number),)
        if one.op == "dot":
            return _dot_flops(one, arrays[0]), ()
        if one.op == "convolution":
            return _convolution_flops(one, *arrays), ()
        return 0, ()

    # Bytes. If a fusion slices an array, only the slice is read; if it updates an array in place, only the update is
    # written. Counting whole arrays would count a cache again for every row that is written to it.

    def read(self, here: Computation, one: Instruction) -> int:
        sizes = [here.instructions[name].hbm for name in one.operands]
        if one.op == "fusion":
            deeper = self.computations[one.called("calls")[0]]
            return sum(
                min(size, self.read_of(deeper, name))
                for size, name in zip(sizes, self.parameters(deeper), strict=True)
                if size
            )
        if one.op == "slice-start":
            return min(sizes[0], self.destination(one).bytes)
        if one.op in SLICES:
            return min(sizes[0], one.bytes) + sum(sizes[1:])
        return sum(sizes[1:] if one.op in UPDATES else sizes)

    def parameters(self, fused: Computation) -> list[str]:
        numbered = {int(i.operands[0]): i.name for i in fused.instructions.values() if i.op == "parameter"}
        return [numbered[number] for number in range(len(numbered))]

    def read_of(self, fused: Computation, name: str) -> float:
        """Bytes that a fusion reads of a parameter (or of a renamed one), summed over all users; inf: all of it."""
        if name == fused.root:
            return math.inf
        size = 0
        for user in self.users(fused)[name]:
            if user.op in RENAMED:
                size += self.read_of(fused, user.name)
            elif user.op in SLICES and user.operands[0] == name:
                size += user.bytes
            elif user.op == "fusion":
                deeper = self.computations[user.called("calls")[0]]
                root = deeper.instructions[deeper.root]
                if root.op in RENAMED and len(deeper.instructions) == 2:  # a fusion that holds only a bitcast
                    size += self.read_of(fused, user.name)
                    continue
                names = zip(user.operands, self.parameters(deeper), strict=True)
                size += sum(self.read_of(deeper, inner) for outer, inner in names if outer == name)
            elif not (user.op in UPDATES and user.operands[0] == name):
                return math.inf
        return size

    def users(self, fused: Computation) -> dict[str, list[Instruction]]:
        if id(fused) not in self.used:
            users = self.used[id(fused)] = defaultdict(list)
            for instruction in fused.instructions.values():
                for name in set(instruction.operands):
                    users[name].append(instruction)
        return self.used[id(fused)]

    def written(self, here: Computation, one: Instruction) -> int:
        if one.op.endswith("-start"):
            return self.destination(one).hbm
        if one.op != "fusion":
            return self.stored(here, one, one.hbm)
        fused = self.computations[one.called("calls")[0]]
        root = fused.instructions[fused.root]
        roots = [fused.instructions[name] for name in root.operands] if root.op == "tuple" else [root]
        if len(roots) != len(one.arrays):
            return one.hbm
        return sum(self.stored(fused, part, array.hbm) for part, array in zip(roots, one.arrays, strict=True))

    def destination(self, one: Instruction) -> Array:
        """The array in which an asynchronous operation puts its result.

        It is the first array of copy-start; else it comes after the operands and before the other results.
        """
        return one.arrays[0 if one.op == "copy-start" or len(one.arrays) == 1 else len(one.operands)]

    def stored(self, here: Computation, one: Instruction, size: int) -> int:
        """Bytes that are written for a result of `size` bytes; for an update in place, those of the update."""
        while one.op in RENAMED:
            one = here.instructions[one.operands[0]]
        if one.op == "fusion":
            fused = self.computations[one.called("calls")[0]]
            return self.stored(fused, fused.instructions[fused.root], size)
        if one.op in UPDATES:
            return min(size, here.instructions[one.operands[UPDATES[one.op]]].bytes)
        return size

    # Loops

    def turns(self, here: Computation, loop: Instruction) -> int:
        label = re.search(r"(\w+)\)*/while$", loop.source)
        if label and label[1] in self.trips:
            return self.trips[label[1]]
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called(part)[0]] for part in ("condition", "body"))
        compare = condition.instructions[condition.root]
        names = compare.operands
        if compare.op == "fusion":  # on a CPU, a fusion that holds only the comparison
            compare = self.computations[compare.called("calls")[0]]
            compare = compare.instructions[compare.root]
        begin, end = here.instructions[loop.operands[0]], body.instructions[body.root].operands
        start = {i: self.number(here, name, {}) for i, name in enumerate(begin.operands)} if begin.op == "tuple" else {}
        same = {i: value for i, value in start.items() if _element(body, end[i]) == i}  # the same in every turn
        limits = [value for name in names if (value := self.number(condition, name, same)) is not None]
        counters = [i for name in names if (i := _element(condition, name)) is not None and same.get(i) is None]
        if compare.op == "compare" and "direction=LT" in compare.attributes and len(limits) == len(counters) == 1:
            [limit], [i] = limits, counters
            step = self.number(body, end[i], same | {i: 0})
            if step and start.get(i) is not None:
                return max(0, math.ceil((limit - start[i]) / step))
        raise LoopError(f"{loop.name} ({loop.source}): no constants give the number of turns; name it in trips")

    def number(self, here: Computation, name: str, elements: Mapping[int, int | None]) -> int | None:
        """The integer that a name stands for; None if it is not known.

        elements: the known arguments of the computation: elements of a loop's tuple, or operands of a fusion.
        """
        one = here.instructions[name]
        if one.op == "constant":
            return int(one.operands[0]) if re.fullmatch(r"-?\d+", one.operands[0]) else None
        if one.op == "get-tuple-element":
            return elements.get(_element(here, name))
        if one.op == "parameter" and len(one.arrays) == 1:  # not a loop's tuple
            return elements.get(int(one.operands[0]))
        if one.op not in ("copy", "bitcast", "add", "fusion"):
            return None
        values = [self.number(here, operand, elements) for operand in one.operands]
        if one.op == "fusion":
            fused = self.computations[one.called("calls")[0]]
            return self.number(fused, fused.root, dict(enumerate(values)))
        return None if None in values else sum(values)


def _element(here: Computation, name: str) -> int | None:
    """The index of the element of the computation's argument that a name stands for; None for anything else."""
    one = here.instructions[name]
    while one.op in ("copy", "bitcast"):
        one = here.instructions[one.operands[0]]
    if one.op != "get-tuple-element" or here.instructions[one.operands[0]].op != "parameter":
        return None
    return int(re.search(r"index=(\d+)", one.attributes)[1])


def _group(attributes: str) -> int:
    """Number of devices that take part in a collective; 2 for a permutation, where each sends to one other."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2


def _dot_flops(one: Instruction, left: Array) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
    return 2 * math.prod(one.arrays[0].dims) * math.prod(left.dims[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(one: Instruction, left: Array, right: Array) -> int:
    """FLOPs of a convolution, counted only where kernel and input overlap.

    On TPUs matrix products are convolutions; their batch dimensions become windows that mostly cover padding.
    """
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    met = 1
    for dim in range(len(inputs) - 2):
        at = {name: value.split("x")[dim] for name, value in fields.items()}
        stride, dilation, spread = (int(at.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        length, size = left.dims[inputs.index(str(dim))], right.dims[kernel.index(str(dim))]
        outs = np.arange(one.arrays[0].dims[output.index(str(dim))])
        place = outs[:, None] * stride + np.arange(size)[None] * dilation - int(at.get("pad", "0_0").split("_")[0])
        met *= int(((place >= 0) & (place <= (length - 1) * spread) & (place % spread == 0)).sum())
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    batch = left.dims[inputs.index("b")] // (int(groups[1]) if groups else 1)
    # The kernel's input features are already those of one feature group.
    return 2 * met * batch * right.dims[kernel.index("i")] * right.dims[kernel.index("o")]
