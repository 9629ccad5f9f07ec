"""One iteration of reinforcement learning on one rollout: score it, make the batch, update.

Also how far the engine that samples and the policy that is trained are apart. Both have the same parameters, but other
kernels, layouts and precision.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.algo.advantages import action_mask
from reft_jax.algo.algorithms import Algorithm, Scored
from reft_jax.model.lora import Lora
from reft_jax.parallel.mesh import put_rows
from reft_jax.train.packing import Packing, pack_rollout
from reft_jax.train.scoring import make_scorer
from reft_jax.train.state import TrainState
from reft_jax.train.steps import make_step, rl_loss
from reft_jax.types import PPOBatch, Rollout

LOW, HIGH = 0.5, 2.0  # ratios outside are no rounding


class Scores(NamedTuple):
    """What scoring gives for each action: log-probabilities under the policy that sampled and under the reference, and
    the policy's values. float32[B,T] each, 0 where there is no action; None without a reference, without a critic."""

    logprob: np.ndarray
    ref_logprob: np.ndarray | None
    value: np.ndarray | None


class Iteration:
    """The compiled functions of an iteration, and how its rows are packed."""

    def __init__(
        self,
        model,
        mesh,
        optimizer,
        algorithm: Algorithm,
        shardings,
        lora: Lora | None = None,
        *,
        micro_batch: int,
        max_len: int,
        multiple: int,
    ):
        """shardings: those of the TrainState. micro_batch, max_len, multiple: see Packing."""
        self.mesh, self.algorithm = mesh, algorithm
        self.size = {"micro_batch": micro_batch, "max_len": max_len, "multiple": multiple}
        self.score_lines = make_scorer(model, algorithm.temperature)
        self.make_batch = jax.jit(partial(make_batch, algorithm), static_argnames="minibatches")
        self.step = make_step(partial(rl_loss, algorithm), model, optimizer, shardings, lora)

    def pack(self, rollout: Rollout) -> Packing:
        """Packs the rows into lines. The arrays have as many lines as rows, so that their shape does not change."""
        return pack_rollout(rollout, micro_batches=len(rollout.tokens) // self.size["micro_batch"], **self.size)

    def score(self, params, reference, rollout: Rollout) -> tuple[Scores, Packing]:
        """Scores every row under the policy and under the reference, if there is one.

        params: of the policy, with its value head if there is a critic. reference: of a language model, or None. Both
        passes use the same packing.
        """
        packing, length = self.pack(rollout), rollout.tokens.shape[1]
        lines = put_rows(self.mesh, packing.lines, axis=1)
        policy = params if self.algorithm.critic else {"lm": params["lm"]}
        logprob, value = self.score_lines(policy, lines, packing.count)
        ref_logprob = None if reference is None else self.score_lines({"lm": reference}, lines, packing.count)[0]
        return Scores(
            packing.collect(logprob, length),
            None if ref_logprob is None else packing.collect(ref_logprob, length),
            None if value is None else packing.collect(value, length),
        ), packing

    def update(
        self, state: TrainState, rollout: Rollout, batch: PPOBatch, rows=slice(None), base=None
    ) -> tuple[TrainState, dict]:
        """Makes one update on the chosen `rows`. Returns the new state and the metrics, which stay on the device.

        base: with an adapter, the frozen language model. `state` is donated: do not use it afterwards.
        """
        rollout, batch = jax.tree.map(lambda x: x[rows], (rollout, batch))
        packing = self.pack(rollout)
        lines = put_rows(self.mesh, (packing.lines, packing.spread_all(batch)), axis=1)
        return self.step(state, lines, packing.count, base)


def make_batch(algorithm: Algorithm, rollout: Rollout, scores: Scores, *, minibatches: int = 1):
    """Returns the PPOBatch [B,T] that the updates read, and the metrics of the iteration.

    The advantages come from `algorithm.advantages`, which also applies the KL penalty. Each weight is multiplied by
    `minibatches`: weights are shares of all rows, and an update reads 1 / minibatches of the rows.

    Metrics: reward (mean score), kl (log π − log π_ref summed over a row's actions, mean over rows, nats; only with a
    reference), response_length (tokens), and those of the algorithm's advantages.
    """
    mask = action_mask(rollout.prompt_len, rollout.total_len, rollout.tokens.shape[1])
    scored = Scored(rollout.score, scores.logprob, scores.ref_logprob, scores.value, mask)
    advantage, return_, metrics = algorithm.advantages(scored)
    metrics |= {"reward": rollout.score.mean(), "response_length": mask.sum(1).mean(dtype=jnp.float32)}
    if scores.ref_logprob is not None:
        metrics["kl"] = jnp.where(mask, scores.logprob - scores.ref_logprob, 0.0).sum(1).mean()
    weight, logprob = algorithm.weights(scored) * minibatches, jnp.where(mask, scores.logprob, 0.0)
    value, return_ = (jnp.where(mask, scores.value, 0.0), return_) if algorithm.critic else (None, None)
    ref_logprob = scores.ref_logprob if algorithm.penalty("loss") else None
    return PPOBatch(weight, logprob, value, advantage, return_, ref_logprob), metrics


def gap_metrics(gap: np.ndarray) -> dict[str, float]:
    """How far sampler and trainer are apart. gap: float32[N], log π_trainer − log π_sampler of the N sampled tokens.

    sampler_gap, sampler_gap_mean, sampler_gap_p999: largest |gap|, its mean and its 99.9th percentile, nats.
    sampler_outside: share of tokens whose ratio exp(gap) is outside [0.5, 2]. sampler_ess: effective sample size of the
    ratios, `(Σ w)² / (N Σ w²)`, 1 if all are equal.
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
    """What multiplies the advantage of each token, float32[N]. gap: as in `gap_metrics`; the ratio is exp(gap).

    "tis": truncated importance sampling, min(ratio, cap) (Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training"). "mis": masked, the ratio or 0 if it is above cap (Liu et al. 2025, "When speed kills
    stability"; here token by token).
    """
    ratio = np.exp(np.minimum(gap, 80.0))  # no overflow: a cap is far below
    return (np.minimum(ratio, cap) if correction == "tis" else np.where(ratio <= cap, ratio, 0.0)).astype(np.float32)
