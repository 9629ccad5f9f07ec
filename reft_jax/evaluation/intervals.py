"""95 % intervals for a share, for the difference of two systems and for a slope, and McNemar's test.

Shares are fractions between 0 and 1, never percentages. Every random draw depends only on the given seed.
"""

import math

import numpy as np

from reft_jax.types import InputError

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson(correct: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of the share correct/total (Wilson 1927, J. Am. Stat. Assoc. 22:209).

        centre = (p + z²/2n) / (1 + z²/n)      half = z √(p(1-p)/n + z²/4n²) / (1 + z²/n)

    Unlike p ± z√(p(1-p)/n) it stays inside [0, 1] and has a width even when all or none are correct. `correct` may be a
    sum of shares, one per question (the mean over subsets of its samples). Shares vary less than ones and zeros with
    the same mean, whose variance is p(1-p), so the interval may then be too wide but never too narrow.
    Raises InputError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise InputError(f"{correct} of {total} is not a share: give 0 <= correct <= total, and at least 1 question")
    share = correct / total
    scale = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float, float]:
    """How much better system a is than b on the same questions: (mean(a) - mean(b), low, high).

    a, b: bool[Q]; entry q of both is about question q. The questions are resampled with replacement, for both systems
    together; low and high are the 2.5 % and 97.5 % quantiles of the difference. To pool runs with several seeds,
    concatenate them (in the same order in a and b): this treats the answers to one question under two seeds as
    independent, so the interval is somewhat too narrow. Or pass float[Q], the mean of each question over the seeds;
    that interval is not too narrow. Raises InputError if the lengths differ or are 0.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise InputError(f"cannot pair results of shapes {a.shape} and {b.shape}: both need one entry per question")
    # Only the number of draws of each distinct difference matters. It is multinomial: [draws,3] instead of [draws,Q].
    differences, counts = np.unique(a - b, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(a.size, counts / a.size, size=draws)
    low, high = np.quantile(drawn @ differences / a.size, [0.025, 0.975])
    return float(np.mean(a - b)), float(low), float(high)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of "a and b are equally often correct": McNemar's exact test (1947, Psychometrika 12:153).

    a, b: bool[Q]; entry q of both is about question q. Only questions that exactly one of them answers correctly count;
    under the hypothesis, that one is a with probability 1/2. Raises InputError if the lengths differ.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"cannot pair results of shapes {a.shape} and {b.shape}: both need one entry per question")
    ours, theirs = int((a & ~b).sum()), int((b & ~a).sum())
    differ = ours + theirs
    tail = sum(math.comb(differ, i) for i in range(min(ours, theirs) + 1))
    return min(1.0, 2 * tail / 2**differ)


def slope_interval(y: np.ndarray, seed: int, draws: int = 10_000) -> tuple[float, float, float]:
    """Least-squares slope of y over its index 0, 1, 2, …: (slope, low, high), in units of y per step.

    y: float[n], n >= 3, finite. A pairs bootstrap resamples the points (index, y) with replacement. To resample
    residuals would assume the same scatter everywhere, but rewards and accuracies scatter less near 1; it would also
    assume that the straight line is true, and a learning curve is not straight. Both ways ignore correlation between
    neighbours: a curve that is already smoothed gets an interval that is too narrow.
    Raises InputError for fewer than 3 values or one that is not finite.
    """
    y = np.asarray(y, np.float64)
    if y.ndim != 1 or y.size < 3 or not np.isfinite(y).all():
        raise InputError(f"a slope's interval needs at least 3 finite values, one per step; got shape {y.shape}")
    index = np.arange(y.size, dtype=np.float64)
    rng = np.random.default_rng(seed)
    slopes = []
    while len(slopes) < draws:
        rows = rng.integers(y.size, size=y.size)
        if rows.min() < rows.max():  # one point drawn n times has no slope: draw again
            slopes.append(_slope(index[rows], y[rows]))
    low, high = np.quantile(slopes, [0.025, 0.975])
    return _slope(index, y), float(low), float(high)


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    x = x - x.mean()
    return float(x @ y / (x @ x))
