"""Packs rows of many lengths into arrays of few shapes: several rows per line, with little padding (host side).

Training and scoring look at the *decisions* of a row: the places t whose next token was a choice (types.py). A line has
an array with the decisions of all its rows, and everything about decisions has that form, [M,b,W], instead of [B,T].
"""

from typing import NamedTuple

import jax
import numpy as np

from reft_jax.parallel.hosts import fetch
from reft_jax.parallel.mesh import sizes_up_to
from reft_jax.types import Array, Rollout

LINE_LENGTHS = 4  # line lengths are quarters of the longest: few, because each one is compiled


class Lines(NamedTuple):
    """M micro-batches of b lines of T places with W = T decisions at most, all int32.

    tokens, positions [M,b,T]. segments [M,b,T]: the number of the row in its line, from 1; 0 for padding. decisions
    [M,b,W]: places in the line, then −1 where a line has fewer than W.
    """

    tokens: Array
    positions: Array
    segments: Array
    decisions: Array


def first_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Line and offset of each row, int[B]. The longest row comes first; each goes to the first line that has room."""
    line, offset, used = np.zeros(len(lengths), int), np.zeros(len(lengths), int), []
    for row in np.argsort(-lengths, kind="stable"):
        at = next((at for at, there in enumerate(used) if there + lengths[row] <= capacity), len(used))
        if at == len(used):
            used.append(0)
        line[row], offset[row] = at, used[at]
        used[at] += lengths[row]
    return line, offset


class Packing:
    """Where each row of a batch is, and where its decisions are.

    at: (row int[N], place int[N]) of all N decisions, so that `x[packing.at]` takes them from an array [B,T]. slot:
    (line int[N], number in it int[N]) of the same decisions, in an array [M·b,W]. line: that of each row, int[B].
    length: of a line. count: the number of micro-batches that hold rows. padding: the share of their places that is
    padding.
    """

    def __init__(self, rows, first, decisions, *, max_len: int, micro_batch: int, micro_batches: int, multiple: int):
        """rows: token ids; row i has `decisions[i]` decisions, from place first[i] on. max_len: of a line.

        The arrays always have room for `micro_batches` of `micro_batch` lines, enough for one row per line. The length
        of a line is one of a few that hold the longest row: that with the least padding. No other shape depends on the
        rows.
        """
        lengths = np.array([len(row) for row in rows])
        fits = {n: first_fit(lengths, n) for n in sizes_up_to(max_len, LINE_LENGTHS, multiple) if n >= lengths.max()}
        counts = {length: int(line.max()) // micro_batch + 1 for length, (line, _) in fits.items()}
        self.length = min(counts, key=lambda length: (counts[length] * length, length))
        self.line, offset = fits[self.length]
        self.count = needed = counts[self.length]
        if needed > micro_batches:
            raise ValueError(f"{len(rows)} rows need {needed} micro-batches of {micro_batch} lines: {micro_batches}")
        self.shape = (micro_batches, micro_batch)
        self.padding = 1 - lengths.sum() / (self.count * micro_batch * self.length)
        self.at = np.repeat(np.arange(len(rows)), decisions), _ranges(first, decisions)

        used, begin = np.zeros(np.prod(self.shape), int), np.zeros(len(rows), int)
        for row, line in enumerate(self.line):
            begin[row] = used[line]
            used[line] += decisions[row]
        self.slot = self.line[self.at[0]], _ranges(begin, decisions)

        places = (np.prod(self.shape), self.length)
        tokens, positions, segments = (np.zeros(places, np.int32) for _ in range(3))
        for row, line, start in zip(rows, self.line, offset, strict=True):
            here = np.s_[line, start : start + len(row)]
            tokens[here], positions[here], segments[here] = row, np.arange(len(row)), segments[line].max() + 1
        shaped = (x.reshape(*self.shape, self.length) for x in (tokens, positions, segments))
        self.lines = Lines(*shaped, self.spread(offset[self.at[0]] + self.at[1] + 1, np.int32) - 1)

    def spread(self, values, dtype=np.float32) -> np.ndarray:
        """Values [N] of the decisions as dtype[M,b,W], 0 where there is no decision."""
        out = np.zeros((np.prod(self.shape), self.length), dtype)
        out[self.slot] = values
        return out.reshape(*self.shape, self.length)

    def spread_all(self, tree):
        """Every array [B,T] of the tree as `spread` has it."""
        return jax.tree.map(lambda x: self.spread(np.asarray(x)[self.at]), tree)

    def collect(self, values, length: int) -> np.ndarray:
        """Values [M,b,W] on the mesh as float32[B,length], 0 where there is no decision: the inverse of
        `spread(x[packing.at])`."""
        out = np.zeros((len(self.line), length), np.float32)
        out[self.at] = fetch(values).reshape(-1, self.length)[self.slot]
        return out


def line_size(config, max_len: int, micro_batch: int) -> dict[str, int]:
    """The size of the micro-batches of a Packing. Rows have at most `max_len` tokens; lines may be longer."""
    data = config.data
    return {"max_len": max(max_len, data.line_len), "micro_batch": micro_batch, "multiple": data.pad_multiple}


def packing_size(config, max_len: int, micro_batch: int, rows: int) -> dict[str, int]:
    """The size of a Packing of at most `rows` rows, each of at most `max_len` tokens."""
    return line_size(config, max_len, micro_batch) | {"micro_batches": -(-rows // micro_batch)}


def pack_rollout(rollout: Rollout, **size) -> Packing:
    """The rows of a rollout; their decisions are their actions. `size` as in Packing."""
    rows = [tokens[:length] for tokens, length in zip(rollout.tokens, rollout.total_len, strict=True)]
    return Packing(rows, rollout.prompt_len - 1, rollout.total_len - rollout.prompt_len, **size)


def pack_targets(rows: list[tuple], **size) -> Packing:
    """Rows (ids, prompt length, …); their decisions chose the tokens after the prompt. `size` as in Packing."""
    ids, prompt_lens, *_ = zip(*rows, strict=True)
    first = [prompt - 1 for prompt in prompt_lens]
    decisions = [len(row) - prompt for row, prompt in zip(ids, prompt_lens, strict=True)]
    return Packing(ids, first, decisions, **size)


def _ranges(first, count) -> np.ndarray:
    """first[i] … first[i]+count[i]-1 for every i, concatenated."""
    return np.concatenate([np.arange(begin, begin + n) for begin, n in zip(first, count, strict=True)])
