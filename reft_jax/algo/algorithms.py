"""Reinforcement-learning algorithms: samples per question, a critic or not, the advantages, the loss.

docs/algorithms.md says which to choose. To add one, subclass `Algorithm` in a file of your own and name it in the
settings: `rl.algorithm = "path.py:NAME"`.
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

    score: float32[B]. logprob, ref_logprob: float32[B,T], under the policy that sampled and under the reference. value:
    float32[B,T]. mask: bool[B,T], true at actions. ref_logprob is None without a reference, value without a critic.
    """

    score: Array
    logprob: Array
    ref_logprob: Array | None
    value: Array | None
    mask: Array


class Advantages(NamedTuple):
    """advantage, return_ float32[B,T], 0 off the actions; metrics: float32 scalars by name.

    Only a critic reads return_: without one it may be None.
    """

    advantage: Array
    return_: Array | None
    metrics: dict[str, Array]


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of algorithms. Its fields are settings of section `rl`. JAX traces all methods.

    A subclass may set its own `samples`, `kl_in`, `loss_mean` and `clip_high`. They hold if the setting is 0 or empty.

    critic: whether values are computed and trained. reference: whether rows are scored under the reference model too.
    fewest: samples per question that the advantages need. leaves_out: whether a question whose samples all have the
    same score does not count in the loss; `redraws` times it is replaced by another question first.
    """

    kl_coef: float
    gamma: float
    lam: float
    clip: float
    value_clip: float
    vf_coef: float
    temperature: float
    samples: int = 1
    clip_high: float = 0.0
    kl_in: str = "reward"
    kl_estimator: str = "k3"
    loss_mean: str = "rows"
    overlong: int = 0
    redraws: int = 0
    max_prompt: int = 0
    max_len: int = 0
    critic: ClassVar[bool] = True
    reference: ClassVar[bool] = True
    fewest: ClassVar[int] = 1
    leaves_out: ClassVar[bool] = False

    @abstractmethod
    def advantages(self, scored: Scored) -> Advantages:
        """The advantages and returns of a rollout. A KL penalty in the reward is applied here too."""

    def penalty(self, *places: str) -> bool:
        """Whether there is a KL penalty in one of these places, "reward" and "loss"."""
        return self.kl_coef > 0 and self.kl_in in places

    def token_rewards(self, scored: Scored):
        """float32[B,T]: the score at each row's last action, minus the KL penalty if that is in the reward."""
        reference = scored.ref_logprob if self.penalty("reward") else scored.logprob
        return formulas.token_rewards(scored.score, scored.logprob, reference, scored.mask, kl_coef=self.kl_coef)[0]

    def weights(self, scored: Scored):
        """The weight of each decision in the loss, float32[B,T]: see `losses.decision_weights`."""
        mask = scored.mask
        if self.leaves_out:
            kept = formulas.differs(scored.score.reshape(-1, self.samples))
            mask = mask & jnp.repeat(kept, self.samples, 0)
        return losses.decision_weights(mask, self.loss_mean, self.max_len - self.max_prompt)

    def loss(self, logprob, old: PPOBatch) -> tuple[Any, dict[str, Any]]:
        """Loss and metrics of the policy at decisions float32[b,w], to be summed over all decisions.

        A decision with `old.weight` 0 must add nothing. A metric's name says how the results of the micro-batches are
        combined: "…_max" by their maximum (at least 0), "…_share" by their sum over the number of decisions, any other
        by their sum. This default is PPO's clipped surrogate, and a KL penalty if that is in the loss. Its metrics are
        the share of actions whose ratio ρ left the clip range, the largest |ρ − 1| (0 on the first pass, up to
        rounding), and kl_loss, the penalty before `kl_coef` multiplies it.
        """
        high = self.clip_high or self.clip
        loss = losses.policy_loss(logprob, old.old_logprob, old.advantage, old.weight, clip=self.clip, clip_high=high)
        change = jnp.exp(jnp.where(old.weight > 0, logprob - old.old_logprob, 0.0)) - 1
        error = jnp.abs(change)
        metrics = {"clip_share": (error > jnp.where(change > 0, high, self.clip)).sum(), "ratio_error_max": error.max()}
        if self.penalty("loss"):
            metrics["kl_loss"] = losses.kl_loss(logprob, old.ref_logprob, old.weight, self.kl_estimator)
            loss += self.kl_coef * metrics["kl_loss"]
        return loss, metrics

    def value_loss(self, value, old: PPOBatch):
        """The critic's loss at decisions float32[b,W], summed; used only if `critic` is true."""
        return losses.value_loss(value, old.old_value, old.return_, old.weight, clip=self.value_clip)


def _penalised(algorithm: Algorithm) -> bool:
    """The reference is needed for a KL penalty and for nothing else."""
    return algorithm.penalty("reward", "loss")


class PPO(Algorithm):
    """The paper's method: one sample per question, the KL penalty in the token rewards, GAE, whitened advantages."""

    reference = property(_penalised)

    def advantages(self, scored: Scored) -> Advantages:
        mask, value = scored.mask, jnp.where(scored.mask, scored.value, 0.0)
        advantage, return_ = formulas.gae(self.token_rewards(scored), value, mask, gamma=self.gamma, lam=self.lam)
        _, variance = formulas.masked_moments(advantage, mask)
        metrics = {
            "vf_expl_var": formulas.explained_variance(value, return_, mask),
            "advantage_std": jnp.sqrt(variance),
            "return_mean": formulas.masked_moments(return_, mask)[0],
        }
        return Advantages(formulas.whiten(advantage, mask), return_, metrics)


class Group(Algorithm):
    """Base of the algorithms without a critic: a question's samples are compared with each other.

    The reward of a row is one number, and each of its actions has the row's advantage. Metrics: advantage_std over
    actions; reward_std, the mean over questions of the standard deviation of a question's scores; same_score, the share
    of questions whose samples all have the same score.
    """

    samples, critic, fewest = 8, False, 2
    reference = property(_penalised)

    @abstractmethod
    def compare(self, reward):
        """The advantage of each sample, float32[Q,n], from the rewards of the n samples of Q questions."""

    def rewards(self, scored: Scored):
        """The reward of each row, float32[B]: its score, minus the KL penalty if that is in the reward."""
        return self.token_rewards(scored).sum(1)

    def advantages(self, scored: Scored) -> Advantages:
        compared = self.compare(self.rewards(scored).reshape(-1, self.samples))
        advantage = jnp.where(scored.mask, compared.reshape(-1, 1), 0.0)
        score = scored.score.reshape(-1, self.samples)
        metrics = {
            "advantage_std": jnp.sqrt(formulas.masked_moments(advantage, scored.mask)[1]),
            "reward_std": score.std(1).mean(),
            "same_score": 1.0 - formulas.differs(score).mean(),
        }
        return Advantages(advantage, None, metrics)


class RLOO(Group):
    """REINFORCE leave-one-out (arXiv 2402.14740): a sample's baseline is the mean reward of the question's others.

    `A_i = R_i − Σ_{j≠i} R_j / (n−1)`, R with the KL penalty. The loss is summed over a row's actions: on the first pass
    its gradient is that of REINFORCE with whole responses as actions. One sample per question is REINFORCE itself.
    """

    fewest, kl_in, loss_mean = 1, "reward", "sum"

    def compare(self, reward):
        return formulas.leave_one_out(reward)


class GRPO(Group):
    """Group relative policy optimization (arXiv 2402.03300): `A_i = (R_i − mean R) / std R`, KL penalty in the loss."""

    kl_in, loss_mean = "loss", "rows"

    def compare(self, reward):
        return formulas.group_standardised(reward)


class DrGRPO(Group):
    """GRPO done right (arXiv 2503.20783): `A_i = R_i − mean R`, and a sum over a row's actions over a constant.

    Without the standard deviation very easy and very hard questions do not weigh more than others. With a constant in
    place of the row's length, a long wrong response does not cost less than a short one. The constant is max_len −
    max_prompt. No KL penalty.
    """

    kl_in, loss_mean = "none", "constant"

    def compare(self, reward):
        return formulas.group_centred(reward)


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling (arXiv 2503.14476): GRPO's advantages without a KL penalty, and four changes.

    The clip range is wider above (1 − clip, 1 + clip_high). The loss is a mean over the tokens of all rows. A question
    whose samples all have the same score is replaced (`redraws` times) or left out. A response that takes the last
    `overlong` tokens that it has room for loses up to 1 of its reward.
    """

    kl_in, loss_mean, clip_high, leaves_out = "none", "tokens", 0.28, True

    def rewards(self, scored: Scored):
        shaped = super().rewards(scored)
        if self.overlong:
            shaped += formulas.overlong(scored.mask, max_len=self.max_len, buffer=self.overlong)
        return shaped


ALGORITHMS = {"ppo": PPO, "rloo": RLOO, "grpo": GRPO, "dr_grpo": DrGRPO, "dapo": DAPO}


def make_algorithm(config) -> Algorithm:
    """The algorithm that `rl.algorithm` names, with its settings. Raises InputError if there is none."""
    rl = config.rl
    made = ALGORITHMS.get(rl.algorithm) or load(rl.algorithm, "rl.algorithm")
    if not (isinstance(made, type) and issubclass(made, Algorithm)):
        raise InputError(f"rl.algorithm={rl.algorithm}: is not a subclass of reft_jax.algo.algorithms.Algorithm")
    if isabstract(made):
        raise InputError(f"rl.algorithm={rl.algorithm}: does not define `advantages`; see reft_jax/algo/algorithms.py")
    algorithm = made(
        kl_coef=rl.kl_coef,
        gamma=rl.gamma,
        lam=rl.lam,
        clip=rl.clip,
        value_clip=rl.value_clip,
        vf_coef=rl.vf_coef,
        temperature=rl.temperature,
        samples=rl.samples or made.samples,
        clip_high=rl.clip_high or made.clip_high,
        kl_in=rl.kl_in or made.kl_in,
        kl_estimator=rl.kl_estimator,
        loss_mean=rl.loss_mean or made.loss_mean,
        overlong=rl.overlong,
        redraws=rl.redraws,
        max_prompt=rl.max_prompt,
        max_len=rl.max_len,
    )
    if algorithm.samples < algorithm.fewest:
        raise InputError(
            f"config: rl.samples={rl.samples}: {rl.algorithm} compares the samples of a question; "
            f"it must be at least {algorithm.fewest}, or 0 for {made.samples}"
        )
    if rl.redraws and not algorithm.leaves_out:
        raise InputError(
            f"config: rl.redraws={rl.redraws}: {rl.algorithm} replaces no questions; set it to 0, or use dapo"
        )
    if rl.overlong and rl.algorithm in ALGORITHMS and made is not DAPO:  # one's own may read it
        raise InputError(
            f"config: rl.overlong={rl.overlong}: {rl.algorithm} does not read it; set it to 0, or use dapo"
        )
    room = rl.max_len - rl.max_prompt
    if rl.overlong and rl.overlong >= room:
        raise InputError(
            f"config: rl.overlong={rl.overlong}: must be below rl.max_len - rl.max_prompt = {room}; else it lowers the "
            "reward of every response to a long prompt"
        )
    if rl.questions * algorithm.samples % (rl.minibatches * rl.micro_batch):
        raise InputError(
            f"config: rl.questions={rl.questions} * {algorithm.samples} samples of {rl.algorithm} must be a multiple "
            f"of rl.minibatches={rl.minibatches} * rl.micro_batch={rl.micro_batch}"
        )
    return algorithm
