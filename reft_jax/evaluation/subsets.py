"""Estimates upper bound, rerank and voting for k samples per question from the n samples that were drawn.

The number for k < n is a mean over subsets of k samples. The n samples are independent draws, so this mean is an
unbiased estimate of what k new samples would give. For upper bound and rerank it has a closed form; voting is averaged
over random subsets. At k = n there is one subset, and each number is that of evaluation/voting.py.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations

import numpy as np

from reft_jax.evaluation.voting import deduplicate, is_valid

SUBSETS = 200  # per question, for voting: their noise is less than a tenth of the noise of the questions


def sizes(n: int) -> list[int]:
    """The numbers of samples in a curve: 1, 2, 4, … and n."""
    return [*(2**i for i in range(n.bit_length()) if 2**i < n), n]


def upper_bound_at(predictions: Sequence[dict], k: int) -> float:
    """The probability that one of k samples is correct: 1 − C(n−c, k) / C(n, k) (arXiv 2107.03374, eq. 1).

    c is the number of correct predictions among the n.
    """
    n = len(predictions)
    correct = sum(prediction["correctness"] for prediction in predictions)
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def rerank_at(predictions: Sequence[dict], probabilities: Sequence[float], k: int) -> float:
    """The probability that the reranker's choice among k samples is correct.

    probabilities: one per prediction of `deduplicate`. Sort the valid predictions by falling probability (equal ones in
    their order). Then prediction r = 0, 1, … is chosen if it is among the k and no earlier one is:

        Σ_r correct_r · C(n−1−r, k−1) / C(n, k)
    """
    n = len(predictions)
    by_text = {p["completion"]: x for p, x in zip(deduplicate(predictions), probabilities, strict=True)}
    valid = [p for p in predictions if is_valid(p["solving_res"])]
    ranked = sorted(valid, key=lambda p: -by_text[p["completion"]])
    return sum(math.comb(n - 1 - r, k - 1) for r, p in enumerate(ranked) if p["correctness"]) / math.comb(n, k)


def voting_at(predictions: Sequence[dict], ks: Sequence[int], seed: int) -> list[float]:
    """For each k, the share of subsets of k predictions whose vote is correct; in a tie the first value wins.

    Uses all subsets if there are at most SUBSETS, else SUBSETS random ones. Depends on (predictions, ks, seed) only.
    """
    n = len(predictions)
    values = [p["solving_res"] if is_valid(p["solving_res"]) else None for p in predictions]
    kinds = {value: i for i, value in enumerate(dict.fromkeys(value for value in values if value is not None))}
    if not kinds:
        return [0.0] * len(ks)
    kind = np.array([kinds.get(value, len(kinds)) for value in values])  # the last: no answer
    order = np.argsort(kind, kind="stable")
    begins = np.searchsorted(kind[order], np.arange(len(kinds)))
    end = int((kind < len(kinds)).sum())
    order = order[:end]
    right = np.array([predictions[i]["correctness"] for i in order[begins]])
    rank = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (SUBSETS, 1)), axis=1)
    shares = []
    for k in ks:
        chosen = (all_subsets(n, k) if math.comb(n, k) <= SUBSETS else rank < k)[:, order]
        votes = np.add.reduceat(chosen, begins, axis=1, dtype=np.int64)
        first = np.minimum.reduceat(np.where(chosen, order, n), begins, axis=1)
        best = np.argmax(votes * (n + 1) - first, axis=1)
        won = right[best] & (votes[np.arange(len(best)), best] > 0)
        shares.append(float(won.mean()))
    return shares


@cache
def all_subsets(n: int, k: int) -> np.ndarray:
    """All subsets of k out of n, one per row: bool[C(n,k),n]."""
    members = np.array(list(combinations(range(n), k)))
    chosen = np.zeros((len(members), n), bool)
    np.put_along_axis(chosen, members, True, axis=1)
    return chosen
