"""Reinforcement-learning algorithms: samples per question, a critic or not, the advantages, the loss.

To add one, subclass `Algorithm` in a file of your own and name it in the settings: `rl.algorithm = "path.py:NAME"`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import isabstract
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from reft_jax.algo import advantages as formulas
from reft_jax.algo import losses
from reft_jax.plugins import load
from reft_jax.types import Array, InputError, PPOBatch


class Scored(NamedTuple):
    """A scored rollout: what `Algorithm.advantages` reads. The rows of a question are next to each other.

    score: float32[B]. logprob, ref_logprob: float32[B,T], under the policy that sampled and under the reference.
    value: float32[B,T], or None without a critic. mask: bool[B,T], true at actions.
    """

    score: Array
    logprob: Array
    ref_logprob: Array
    value: Array | None
    mask: Array


class Advantages(NamedTuple):
    """advantage, return_ float32[B,T], 0 off the actions; metrics: float32 scalars by name."""

    advantage: Array
    return_: Array
    metrics: dict[str, Array]


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of algorithms. Its fields are settings of section `rl`. JAX traces all methods.

    samples: solutions sampled per question. critic: whether values are computed and trained.
    """

    kl_coef: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    vf_coef: float
    temperature: float
    samples: ClassVar[int] = 1
    critic: ClassVar[bool] = True

    @abstractmethod
    def advantages(self, scored: Scored) -> Advantages:
        """The advantages and returns of a rollout. A KL penalty is applied here too."""

    def loss(self, logprob, old: PPOBatch) -> tuple[Any, dict[str, Any]]:
        """Loss and metrics of the policy at decisions float32[b,w], to be summed over all decisions.

        A decision with `old.weight` 0 must add nothing. A metric's name says how the results of the micro-batches are
        combined: "…_max" by their maximum (at least 0), "…_share" by their sum over the number of decisions, any other
        by their sum. This default is PPO's clipped surrogate. Its metrics are the share of actions whose ratio ρ left
        the clip range, and the largest |ρ − 1| (0 on the first pass, up to rounding).
        """
        loss = losses.policy_loss(logprob, old.old_logprob, old.advantage, old.weight, clip=self.clip)
        error = jnp.abs(jnp.exp(jnp.where(old.weight > 0, logprob - old.old_logprob, 0.0)) - 1)
        return loss, {"clip_share": (error > self.clip).sum(), "ratio_error_max": error.max()}

    def value_loss(self, value, old: PPOBatch):
        """The critic's loss at decisions float32[b,W], summed; used only if `critic` is true."""
        return losses.value_loss(value, old.old_value, old.return_, old.weight, clip=self.value_clip)


class PPO(Algorithm):
    """The paper's method: one sample per question, the KL penalty in the token rewards, GAE, whitened advantages."""

    def advantages(self, scored: Scored) -> Advantages:
        mask, value = scored.mask, jnp.where(scored.mask, scored.value, 0.0)
        rewards, _, _ = formulas.token_rewards(
            scored.score, scored.logprob, scored.ref_logprob, mask, kl_coef=self.kl_coef
        )
        advantage, return_ = formulas.gae(rewards, value, mask, gamma=self.gamma, lam=self.lam)
        _, variance = formulas.masked_moments(advantage, mask)
        metrics = {
            "vf_expl_var": formulas.explained_variance(value, return_, mask),
            "advantage_std": jnp.sqrt(variance),
            "return_mean": formulas.masked_moments(return_, mask)[0],
        }
        return Advantages(formulas.whiten(advantage, mask), return_, metrics)


ALGORITHMS = {"ppo": PPO}


def make_algorithm(config) -> Algorithm:
    """The algorithm that `rl.algorithm` names, with its settings. Raises InputError if there is none."""
    rl = config.rl
    made = ALGORITHMS.get(rl.algorithm) or load(rl.algorithm, "rl.algorithm")
    if not (isinstance(made, type) and issubclass(made, Algorithm)):
        raise InputError(f"rl.algorithm={rl.algorithm}: is not a subclass of reft_jax.algo.algorithms.Algorithm")
    if isabstract(made):
        raise InputError(f"rl.algorithm={rl.algorithm}: does not define `advantages`; see reft_jax/algo/algorithms.py")
    return made(
        kl_coef=rl.kl_coef,
        gamma=rl.gamma,
        lam=rl.lam,
        clip=rl.clip,
        value_clip=rl.value_clip,
        vf_coef=rl.vf_coef,
        temperature=rl.temperature,
    )
