"""The engine that samples against the policy that is trained: how far they are apart, and weights that make up for it.

Both have the same parameters, but other kernels, layouts and precision. `gap` is float32[N], log π_trainer − log
π_sampler of the N sampled tokens; the ratio is exp(gap). NumPy, on the host.
"""

import numpy as np

LOW, HIGH = 0.5, 2.0  # ratios outside are no rounding


def gap_metrics(gap: np.ndarray) -> dict[str, float]:
    """sampler_gap, sampler_gap_mean, sampler_gap_p999: largest |gap|, its mean and its 99.9th percentile, nats.

    sampler_outside: share of tokens whose ratio is outside [0.5, 2]. sampler_ess: effective sample size of the ratios,
    `(Σ w)² / (N Σ w²)`, 1 if all are equal.
    """
    far, ratio = np.abs(gap), np.exp(gap.astype(np.float64))
    return {
        "sampler_gap": far.max(),
        "sampler_gap_mean": far.mean(),
        "sampler_gap_p999": np.percentile(far, 99.9),
        "sampler_outside": np.mean((ratio < LOW) | (ratio > HIGH)),
        "sampler_ess": ratio.sum() ** 2 / (len(ratio) * np.square(ratio).sum()),
    }


def importance_weights(gap: np.ndarray, correction: str, cap: float) -> np.ndarray:
    """What multiplies the advantage of each token, float32[N].

    "tis": truncated importance sampling, min(ratio, cap) (Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training"). "mis": masked, the ratio or 0 if it is above cap (Liu et al. 2025, "When speed kills
    stability"; here token by token).
    """
    ratio = np.exp(np.minimum(gap, 80.0))  # no overflow: a cap is far below
    return (np.minimum(ratio, cap) if correction == "tis" else np.where(ratio <= cap, ratio, 0.0)).astype(np.float32)
