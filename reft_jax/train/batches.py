"""Host side: token lists into padded numpy rows, and the order in which rows are visited."""

from collections.abc import Iterator

import numpy as np

from reft_jax.parallel.mesh import round_up
from reft_jax.types import Completion, Prompt, Rollout


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """A permutation of the rows, a pure function of (seed, epoch), so that no position needs saving."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def rows_at(seed: int, start: int, count: int, rows: int) -> np.ndarray:
    """Rows `start … start+count-1` of the endless sequence of shuffled epochs."""
    epochs = range(start // rows, (start + count - 1) // rows + 1)
    order = np.concatenate([epoch_order(seed, epoch, rows) for epoch in epochs])
    return order[start - epochs[0] * rows :][:count]


def minibatches(
    seed: int, iteration: int, rows: int, passes: int, parts: int, samples: int = 1
) -> Iterator[np.ndarray]:
    """Row numbers of each update of an iteration: every pass shuffles the questions and divides them into `parts`.

    The `samples` rows of a question are next to each other and stay together: their advantages are relative to each
    other, so in a part of them a question as a whole would be pushed up or down.
    """
    for one_pass in range(passes):
        questions = np.random.default_rng([seed, iteration, one_pass]).permutation(rows // samples)
        yield from (questions[:, None] * samples + np.arange(samples)).reshape(parts, -1)


def pad_tokens(rows, pad_multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids padded on the right with 0 to a common length: int32[B,T] and the real lengths int32[B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), round_up(int(lengths.max()), pad_multiple)), np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return tokens, lengths


def rollout_rows(prompts: list[Prompt], completions: list[Completion], scores, pad_multiple: int) -> Rollout:
    """Prompts and their completions (same order) as one Rollout [B,T]."""
    rows = [np.concatenate([p.tokens, c.tokens]) for p, c in zip(prompts, completions, strict=True)]
    tokens, total_len = pad_tokens(rows, pad_multiple)
    prompt_len = np.array([len(p.tokens) for p in prompts], np.int32)
    return Rollout(tokens, prompt_len, total_len, np.asarray(scores, np.float32))
