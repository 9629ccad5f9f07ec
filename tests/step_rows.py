"""Eight rows, packed in several ways, and a tiny policy that test_steps.py and test_rerank_steps.py train on them."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
from tiny import tiny_policy, tiny_ppo, tiny_state

from reft_jax.train.packing import Lines, Packing
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import make_step, rerank_loss, rl_loss, sft_loss

LENGTH, RATE = 40, 1e-2
MODEL, PARAMS = tiny_policy()
RERANKER, RERANK_PARAMS = tiny_policy("rerank_head")
SETTINGS = tiny_ppo(value_clip=0.3, temperature=0.8)
# One action; an action at the last place of the longest row; a prompt of one token.
PROMPT_LEN = np.array([9, 20, 1, 3, 5, 7, 2, 6], np.int32)
TOTAL_LEN = np.array([10, 40, 12, 35, 20, 30, 9, 18], np.int32)
ACTIONS = [range(p - 1, n - 1) for p, n in zip(PROMPT_LEN, TOTAL_LEN, strict=True)]
MASK = np.array([[t in actions for t in range(LENGTH)] for actions in ACTIONS])
B, T = np.nonzero(MASK)  # row and place of every action, for the slow twins


def numbers(metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


TOKENS = rng(1).integers(0, 61, (8, LENGTH)).astype(np.int32)
ROWS = [row[:n].tolist() for row, n in zip(TOKENS, TOTAL_LEN, strict=True)]
ORDER = np.array([5, 2, 7, 0, 3, 1, 6, 4])


class Packed(NamedTuple):
    """Rows in lines: decision i is that of row at[0][i] at its place at[1][i], and lies at where[:, i] of [M,b,W]."""

    lines: Lines
    count: int
    at: tuple
    where: tuple

    def spread(self, x) -> np.ndarray:
        """Of x [8,T] what belongs to the decisions, [M,b,W], 0 elsewhere."""
        out = np.zeros(self.lines.decisions.shape, np.asarray(x).dtype)
        out[self.where] = np.asarray(x)[self.at]
        return out

    def collect(self, x) -> np.ndarray:
        """The way back, [8,T]."""
        out = np.zeros((8, LENGTH), np.float32)
        out[self.at] = np.asarray(x)[self.where]
        return out


def spoilt(x, real, high: int) -> np.ndarray:
    """What is not real is garbage: nothing may depend on it."""
    return np.where(real, x, rng(9).integers(0, high, x.shape)).astype(np.int32)


def packed(order=range(8), first=PROMPT_LEN - 1, decisions=TOTAL_LEN - PROMPT_LEN, **shape) -> Packed:
    """Rows of ROWS in lines, several in one; all 8 in three of four micro-batches of two lines of 40."""
    order, shape = np.asarray(order), {"max_len": 40, "micro_batch": 2, "micro_batches": 4, "multiple": 8} | shape
    packing = Packing([ROWS[i] for i in order], first[order], decisions[order], **shape)
    tokens, positions, segments, places = packing.lines
    lines = Lines(spoilt(tokens, segments > 0, 61), spoilt(positions, segments > 0, 99), segments, places)
    where = *np.unravel_index(packing.slot[0], packing.shape), packing.slot[1]
    return Packed(lines, packing.count, (order[packing.at[0]], packing.at[1]), where)


def laid_by_hand() -> Packed:
    """The rows in arrays of the shapes of `packed()`, but one a line, in another order, at any place of the line, with
    any number as its segment, and its decisions in any order."""
    tokens, positions = rng(9).integers(0, 61, (2, 4, 2, 40)).astype(np.int32)
    segments, decisions, random = np.zeros((4, 2, 40), np.int32), np.full((4, 2, 40), -1, np.int32), rng(10)
    at, where = [], []
    for row, line in zip(ORDER, np.ndindex(4, 2), strict=True):
        begin = random.integers(0, 40 - TOTAL_LEN[row] + 1)
        here = (*line, np.s_[begin : begin + TOTAL_LEN[row]])
        tokens[here], positions[here], segments[here] = ROWS[row], np.arange(TOTAL_LEN[row]), random.integers(1, 99)
        for slot, t in enumerate(random.permutation(ACTIONS[row])):
            decisions[*line, slot] = begin + t
            at.append((row, t))
            where.append((*line, slot))
    lines = Lines(tokens, positions, segments, decisions)
    return Packed(lines, 4, tuple(np.transpose(at)), tuple(np.transpose(where)))


def packed_otherwise() -> dict[str, Packed]:
    """The same rows in other orders, line lengths and micro-batches."""
    return {
        "another order": packed(ORDER),
        "one row a line, by hand": laid_by_hand(),
        "lines of 48": packed(ORDER[::-1], max_len=96),
        "one micro-batch": packed(micro_batch=8, micro_batches=1),
        "micro-batches of one long line": packed(max_len=88, multiple=88, micro_batch=1, micro_batches=8),
    }


@functools.cache
def prepared(kind: str, model=MODEL):
    """(jitted step, function that makes a state at step 0 around PARAMS)."""
    optimizer = make_optimizer(optax.constant_schedule(RATE), weight_decay=0.0, clip_norm=1.0)
    loss = {"sft": sft_loss, "ppo": functools.partial(rl_loss, SETTINGS), "rerank": rerank_loss}[kind]
    params = RERANK_PARAMS if kind == "rerank" else PARAMS
    _, where = tiny_state(model, params, optimizer)
    return make_step(loss, model, optimizer, shardings=where), lambda: tiny_state(model, params, optimizer)[0]


def gradient(state, metrics):
    """The gradient of a first step: Adam's first moment is (1 - 0.9) times the gradient clipped to norm 1."""
    scale = max(1.0, float(metrics["grad_norm"])) / (1 - 0.9)
    return jax.tree.map(lambda moment: np.asarray(moment) * scale, optax.tree.get(state.opt_state, "mu"))


def assert_same(found, expected, atol: float):
    for path, leaf in jax.tree.leaves_with_path(expected):
        other = functools.reduce(lambda tree, key: tree[key.key], path, found)
        np.testing.assert_allclose(other, leaf, atol=atol, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def global_norm(tree) -> float:
    return float(np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(tree))))
