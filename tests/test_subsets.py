"""Estimates for k of n samples, compared with the mean over all subsets, each judged by the rules of voting.py."""

from itertools import combinations

import numpy as np
import pytest

from reft_jax.evaluation import subsets
from reft_jax.evaluation.subsets import rerank_at, sizes, upper_bound_at, voting_at
from reft_jax.evaluation.voting import deduplicate, rerank_choice, upper_bound, voted_correct

N = 9


def draw(seed: int, n: int = N) -> tuple[list[dict], list[float]]:
    """n predictions with repeats, ties and invalid answers, and probabilities of the distinct ones, some equal."""
    rng = np.random.default_rng(seed)
    predictions = []
    for _ in range(n):
        value = [1.0, 2.0, 2.004, None, float("nan"), "x1"][rng.integers(6)]
        text = f"text {rng.integers(3)} of {value}"
        predictions.append({"completion": text, "solving_res": value, "correctness": value == 2.0})
    return predictions, [float(x) for x in rng.integers(0, 4, len(deduplicate(predictions))) / 4]


def over_subsets(predictions, k: int, worth) -> float:
    """The mean of `worth(subset)`, members in the order of sampling."""
    return float(np.mean([worth(list(subset)) for subset in combinations(predictions, k)]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 2, 4, 8, 9])
def test_closed_forms_are_the_mean_over_all_subsets(seed, k):
    predictions, probabilities = draw(seed)
    by_text = dict(zip((p["completion"] for p in deduplicate(predictions)), probabilities, strict=True))

    def reranked(subset) -> bool:
        distinct = deduplicate(subset)
        choice = rerank_choice(distinct, [by_text[p["completion"]] for p in distinct])
        return choice is not None and distinct[choice]["correctness"]

    assert upper_bound_at(predictions, k) == pytest.approx(over_subsets(predictions, k, upper_bound))
    assert rerank_at(predictions, probabilities, k) == pytest.approx(over_subsets(predictions, k, reranked))
    assert voting_at(predictions, [k], seed=0) == pytest.approx([over_subsets(predictions, k, voted_correct)])


def test_voting_over_random_subsets_comes_near_the_mean_over_all(monkeypatch):
    """Where all would be too many; the seed decides, and more subsets come nearer."""
    monkeypatch.setattr(subsets, "SUBSETS", 20)
    errors = {}
    for draws in (20, 80):
        monkeypatch.setattr(subsets, "SUBSETS", draws)
        errors[draws] = [
            voting_at(draw(seed)[0], [4], seed=seed)[0] - over_subsets(draw(seed)[0], 4, voted_correct)
            for seed in range(40)
        ]
    assert abs(np.mean(errors[20])) < 0.05  # unbiased: the error of one question is up to 0.11
    assert np.std(errors[80]) < np.std(errors[20]) < 0.15
    predictions, _ = draw(3)
    assert voting_at(predictions, [4], seed=1) == voting_at(predictions, [4], seed=1)


def test_no_valid_answer_is_wrong_at_every_k():
    predictions = [{"completion": f"{i}", "solving_res": None, "correctness": False} for i in range(4)]
    assert voting_at(predictions, [1, 2, 4], seed=0) == [0.0, 0.0, 0.0]
    assert [rerank_at(predictions, [0.5] * 4, k) for k in (1, 4)] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (100, [1, 2, 4, 8, 16, 32, 64, 100])]
)
def test_sizes_are_the_powers_of_two_and_all(n, expected):
    assert sizes(n) == expected
