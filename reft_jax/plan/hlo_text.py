"""Parses the text of a compiled function (HLO, from `compiled.as_text()`) into instructions with sizes."""

import math
import re
from typing import NamedTuple

_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


class Array(NamedTuple):
    """One array of a type.

    bytes: size of its numbers. hbm: bytes of main memory, with the padding of tiles; 0 if the array is in the chip's
    own memory (`S(1)` in the layout).
    """

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    hbm: int


class Instruction(NamedTuple):
    """One line of the text.

    operands: names; for a parameter its number and for a constant its value, as text.
    """

    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def hbm(self) -> int:
        return sum(array.hbm for array in self.arrays)

    @property
    def source(self) -> str:
        """The named scopes and the primitive that it comes from, like `jit(step)/layers/while/body/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
        if not found:
            return []
        return [found[1]] if found[1] else re.findall(r"[\w.\-]+", found[2])


class Computation(NamedTuple):
    """One computation of the text: its instructions by name, in order, and the name of the one that it returns."""

    instructions: dict[str, Instruction]
    root: str


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a text by name, and the name of the entry computation."""
    computations: dict[str, Computation] = {}
    name = entry = root = ""
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if inside is None:
            if line.endswith("{") and " -> " in line:
                name, inside = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1], {}
                entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            computations[name], inside = Computation(inside, root), None
        elif match := _LINE.match(line):
            inside[match[2]] = _instruction(match[2], line[match.end() :])
            root = match[2] if match[1] else root
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    """Parses what follows `name = `: a type, an operation with its operands, attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    op = rest[end:opening].strip()
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = (inside,) if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, _arrays(rest[:end]), op, operands, rest[closing + 1 :].lstrip(", "))


def _closing(text: str, opening: int) -> int:
    """The index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"unbalanced: {text[:80]}")


def _arrays(kind: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(kind):
        dims = tuple(int(d) for d in dims.split(",") if d)
        bits = re.search(r"\d+", dtype)  # pred and token have no number of bits
        width = int(bits[0]) / 8 if bits else float(dtype == "pred")
        on_chip = re.search(r"S\([1-9]", layout)
        hbm = 0 if on_chip else int(math.prod(_padded(dims, layout)) * width)
        found.append(Array(dtype, dims, int(math.prod(dims) * width), hbm))
    return tuple(found)


def _padded(dims: tuple[int, ...], layout: str) -> list[int]:
    """The dimensions in memory, padded to whole tiles as in `{2,1,0:T(8,128)(2,1)}`."""
    order, _, tiling = layout.partition(":")
    tile, sizes = re.match(r"T\(([\d,]+)\)", tiling), list(dims)
    if tile and order:
        for at, length in zip(order.split(","), reversed(tile[1].split(",")), strict=False):
            sizes[int(at)] = -(-sizes[int(at)] // int(length)) * int(length)
    return sizes
