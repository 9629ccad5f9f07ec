"""Intervals: published values, slow reference versions, and how often they cover the truth."""

import numpy as np
import pytest

from reft_jax.evaluation.intervals import mcnemar, paired_bootstrap, slope_interval, wilson
from reft_jax.types import InputError


def test_wilson_is_the_set_of_shares_a_score_test_does_not_reject():
    # The definition, scanned: all p with |share - p| <= z sqrt(p(1-p)/n).
    p = np.linspace(0, 1, 1_000_001)
    for correct, total in [(309, 500), (1, 10), (0, 20), (20, 20), (7, 9)]:
        kept = p[(correct / total - p) ** 2 <= 1.959963984540054**2 * p * (1 - p) / total]
        assert wilson(correct, total) == pytest.approx((kept[0], kept[-1]), abs=2e-6)


def test_wilson_of_a_known_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81/263 and 0/20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_what_is_no_share(correct, total):
    with pytest.raises(InputError, match=f"{correct} of {total}"):
        wilson(correct, total)


def test_paired_bootstrap_equals_resampling_the_questions_one_by_one():
    rng = np.random.default_rng(0)
    b = rng.random(200) < 0.5
    a = b ^ (rng.random(200) < 0.2)
    difference, low, high = paired_bootstrap(a, b, seed=1, draws=20_000)
    assert difference == pytest.approx((a.sum() - b.sum()) / 200)

    slow = []
    for _ in range(20_000):
        questions = rng.integers(200, size=200)
        slow.append(a[questions].mean() - b[questions].mean())
    # Differences come in steps of 1/200, and the quantile of either side may fall on the neighbouring step.
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.0051)


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(0)
    b = rng.random(1000) < 0.5
    a = b.copy()
    a[np.flatnonzero(~b)[:30]] = True  # right wherever b is, and 30 times more
    _, low, high = paired_bootstrap(a, b, seed=0)
    assert low > 0.015  # two unpaired shares of 1,000 questions would have a half-width of 0.044
    _, low, high = paired_bootstrap(a, rng.permutation(b), seed=0)
    assert low < 0


def test_paired_bootstrap_depends_on_the_seed_alone_and_identical_systems_do_not_differ():
    a, b = np.array([1, 1, 0, 1, 0, 1], bool), np.array([0, 1, 0, 1, 1, 0], bool)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, a, seed=3) == (0.0, 0.0, 0.0)


def test_paired_bootstrap_with_seeds_that_agree_is_wider_by_question_than_by_concatenation():
    a, b = np.array([1, 1, 0, 1] * 25, bool), np.array([0, 1, 0, 1] * 25, bool)
    one = paired_bootstrap(a, b, seed=0)
    mean_of_four = paired_bootstrap(a.astype(float), b.astype(float), seed=0)
    pooled = paired_bootstrap(np.tile(a, 4), np.tile(b, 4), seed=0)
    assert mean_of_four == one
    assert pooled[2] - pooled[1] == pytest.approx((one[2] - one[1]) / 2, rel=0.15)  # four times the rows


def test_paired_bootstrap_refuses_unequal_lengths():
    with pytest.raises(InputError, match=r"\(3,\) and \(4,\)"):
        paired_bootstrap(np.ones(3, bool), np.ones(4, bool), seed=0)


def test_slope_of_a_straight_line_is_certain():
    assert slope_interval(5 - 0.25 * np.arange(20), seed=0, draws=200) == pytest.approx((-0.25, -0.25, -0.25))


def test_slope_is_the_least_squares_one_and_its_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    index = np.arange(40)
    covered = 0
    for trial in range(100):
        y = 0.03 * index + rng.normal(size=40) * np.linspace(2, 0.5, 40)  # unequal scatter, as rewards have
        slope, low, high = slope_interval(y, seed=trial, draws=300)
        assert slope == pytest.approx(np.polyfit(index, y, 1)[0])
        covered += low <= 0.03 <= high
    assert 86 <= covered <= 99  # 95 nominal, a little less for a bootstrap of 40 points


@pytest.mark.parametrize("y", [[1.0, 2.0], [1.0, np.nan, 2.0, 3.0], [[1.0, 2.0, 3.0]]])
def test_slope_refuses_what_has_none(y):
    with pytest.raises(InputError, match="at least 3 finite values"):
        slope_interval(np.array(y), seed=0)


def test_mcnemar_is_the_binomial_test_of_the_questions_on_which_two_systems_differ():
    """5 against 1 of 6: 2 · (1 + 6) / 64; equally many: 1; what both have right or wrong does not count."""
    a, b = np.array([1, 1, 1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(14 / 64)
    assert mcnemar(np.tile(a[:6], 50), np.tile(b[:6], 50)) < 1e-30
    assert mcnemar(np.array([True, False]), np.array([False, True])) == 1
    assert mcnemar(a, a) == 1
    with pytest.raises(InputError, match="cannot pair"):
        mcnemar(a, b[:7])


def test_wilson_of_a_mean_of_shares_covers_the_truth_in_at_least_95_percent():
    """50 questions, each with its own share; the truth is the mean over all possible questions."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        shares = rng.beta(0.6, 0.4, 50)
        low, high = wilson(shares.sum(), 50)
        covered += low <= 0.6 <= high
    assert covered >= 0.95 * 2000
