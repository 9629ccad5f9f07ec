"""The seam for algorithms: RLOO, written as a user would, in a file outside the package, trains a policy."""

import dataclasses
import json
import re
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from faults.starts import run
from tiny import tiny_policy, tiny_ppo, tiny_state

from reft_jax.algo.algorithms import PPO, Algorithm, Scored, make_algorithm
from reft_jax.config import check_config, load_config
from reft_jax.parallel.mesh import make_mesh
from reft_jax.run.executions import read_executions
from reft_jax.train.iteration import Iteration, Scores, make_batch
from reft_jax.train.state import make_optimizer
from reft_jax.types import InputError, Rollout

REPO = Path(__file__).resolve().parents[1]
MORE = '''
import jax.numpy as jnp

from reft_jax.algo.algorithms import Advantages, Algorithm


class WithoutRatio(RLOO):
    """With the loss of REINFORCE: its metrics are none of PPO's. Its advantages have a metric of their own."""

    def advantages(self, scored):
        found = self.compare(self.rewards(scored).reshape(-1, self.samples))
        advantage = jnp.where(scored.mask, found.reshape(-1, 1), 0.0)
        return Advantages(advantage, advantage, {"question_sum_max": jnp.abs(found.sum(1)).max()})

    def loss(self, logprob, old):
        return -jnp.where(old.weight > 0, old.weight * old.advantage * logprob, 0.0).sum(), {}


class Unfinished(Algorithm):
    pass
'''


@pytest.fixture
def rloo(tmp_path) -> str:
    """The example of CONTRIBUTING.md, and what these tests need besides."""
    (shown,) = re.findall(r"```python\n((?:(?!```).)*class RLOO.*?)```", (REPO / "CONTRIBUTING.md").read_text(), re.S)
    (tmp_path / "rloo.py").write_text(textwrap.dedent(shown) + MORE)
    return f"{tmp_path / 'rloo.py'}:RLOO"


def config_of(algorithm: str, **settings):
    config = load_config("configs/quickstart.py")
    config.rl.update({"algorithm": algorithm} | settings)
    return check_config(config)


def test_advantages_of_rloo_by_hand(rloo):
    algorithm = make_algorithm(config_of(rloo))
    assert isinstance(algorithm, Algorithm) and algorithm.samples == 4 and not algorithm.critic
    score, mask = np.array([1.0, 0, 0, 1, 1, 0, 0, 0], np.float32), np.tile([True, False], (8, 1))
    zeros = np.zeros((8, 2), np.float32)
    advantage, _, _ = algorithm.advantages(Scored(score, zeros, zeros, None, mask))
    # A right one of two right: 1 - (0 + 0 + 1) / 3; a wrong one: 0 - 2/3. Of one right: 1 - 0, and 0 - 1/3.
    third = 1 / 3
    expected = [2 * third, -2 * third, -2 * third, 2 * third, 1, -third, -third, -third]
    np.testing.assert_allclose(advantage[:, 0], expected, rtol=1e-6)
    assert not np.any(advantage[:, 1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"kl_in": "loss"}, {"kl_in": "none"}, {"kl_coef": 0.0}, {"loss_mean": "tokens"}, {"samples": 2}],
    ids=str,
)
def test_the_example_is_rloo_with_every_setting(rloo, settings):
    """Where the penalty is, whether there is a reference, what the loss is a mean over, and the loss itself."""
    rng, chosen = np.random.default_rng(0), {"samples": 4, "kl_coef": 0.3} | settings
    ours, theirs = (make_algorithm(config_of(name, **chosen)) for name in (rloo, "rloo"))
    assert type(ours) is not type(theirs) and ours.reference == theirs.reference and ours.critic == theirs.critic
    tokens, lengths = np.zeros((8, 12), np.int32), rng.integers(4, 13, 8).astype(np.int32)
    rollout = Rollout(tokens, np.full(8, 3, np.int32), lengths, rng.integers(0, 2, 8).astype(np.float32))
    logprob, reference, now = rng.normal(-1, 0.3, (3, 8, 12)).astype(np.float32)
    batch, other = (make_batch(one, rollout, Scores(logprob, reference, None))[0] for one in (ours, theirs))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), batch, other)
    assert np.abs(batch.advantage).max() > 0.1
    (loss, metrics), (other_loss, other_metrics) = (one.loss(now, batch) for one in (ours, theirs))
    assert float(loss) == pytest.approx(float(other_loss), abs=1e-6) and metrics.keys() == other_metrics.keys()


def test_ppo_is_the_default_with_the_settings_of_the_section():
    config = config_of("ppo")
    algorithm, rl = make_algorithm(config), config.rl
    assert type(algorithm) is PPO and algorithm.samples == 1 and algorithm.critic
    assert (algorithm.kl_coef, algorithm.clip, algorithm.vf_coef) == (rl.kl_coef, rl.clip, rl.vf_coef)
    assert hash(algorithm) == hash(make_algorithm(config))  # so that what is compiled for it is found again


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reinforce", "rl.algorithm='reinforce' must be path.py:NAME"),
        ("nowhere.py:X", "there is no file nowhere.py"),
        ("{file}:jnp", "is not a subclass of reft_jax.algo.algorithms.Algorithm"),
        ("{file}:Unfinished", "does not define `advantages`"),
    ],
)
def test_a_wrong_algorithm_is_refused(rloo, name, message):
    with pytest.raises(InputError, match=message):
        make_algorithm(config_of(name.format(file=rloo.removesuffix(":RLOO"))))


def test_without_a_critic_an_update_moves_the_policy_and_not_the_value_head(rloo):
    algorithm = dataclasses.replace(make_algorithm(config_of(rloo)), kl_coef=0.0)
    model, params = tiny_policy()
    optimizer = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0)
    mesh = make_mesh(1, 1, 1)
    state, where = tiny_state(model, params, optimizer, mesh)
    one = Iteration(model, mesh, optimizer, algorithm, where, micro_batch=4, max_len=16, multiple=8)
    tokens = np.random.default_rng(0).integers(0, 61, (8, 16)).astype(np.int32)
    score = np.array([1, 0, 0, 0, 0, 1, 1, 0], np.float32)
    rollout = Rollout(tokens, np.full(8, 3, np.int32), np.arange(8, 16, dtype=np.int32), score)
    before = jax.device_get(state.params)
    scores, _ = one.score(state.params, state.params["lm"], rollout)
    assert scores.value is None
    batch, metrics = one.make_batch(rollout, scores)
    assert metrics["reward"] == pytest.approx(3 / 8) and metrics["kl"] == 0
    state, numbers = one.update(state, rollout, batch)
    assert numbers["clip_share"] == 0 and numbers["ratio_error_max"] < 1e-5
    # On the first pass ρ is 1: Σ A_i |i| over 8 rows. The rows have 5 to 12 actions. The first question has
    # 5 − (6 + 7 + 8) / 3 = −2, the second 2/3 · (−9 + 10 + 11 − 12) = 0.
    assert numbers["loss"] == pytest.approx(2 / 8, abs=1e-6) and numbers["grad_norm"] > 1e-3
    after = jax.device_get(state.params)
    assert np.abs(after["lm"]["embed"] - before["lm"]["embed"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, after["value_head"], before["value_head"])


def test_an_algorithm_is_a_constant_of_a_compiled_function():
    """A frozen dataclass is a constant of what is compiled, not an argument."""
    ratio = jax.jit(lambda x, algorithm: x * algorithm.clip, static_argnums=1)
    assert ratio(1.0, tiny_ppo(clip=0.5)) == 0.5 and ratio(1.0, tiny_ppo(clip=0.25)) == 0.25


def test_rloo_of_ones_own_trains_a_policy(rloo, tmp_path):
    workdir, cache = tmp_path / "run", tmp_path / "compiled"
    algorithm = rloo.replace(":RLOO", ":WithoutRatio")
    chosen = [f"--config.rl.algorithm={algorithm}", "--config.rl.iterations=2", "--config.rl.eval_every=2"]
    for command in ("sft", "reft"):
        done = run(command, workdir, cache, *chosen)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "reft" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["question_sum_max"] < 1e-5 for line in lines)
    assert all("value_loss" not in line and np.isfinite(line["loss"]) for line in lines)
    rollouts = [line for line in read_executions(workdir / "executions.jsonl.gz") if "rollout" in line["purpose"]]
    asked = [line["item_id"] for line in rollouts]
    assert len(asked) == 2 * 16 * 4 and set(Counter(asked).values()) <= {4, 8}
    # The log says what was reinforced. In iteration 1 the policy is the reference, so there is no penalty.
    assert [line["row"] for line in rollouts] == [*range(64)] * 2
    reward = np.array([line["reward"] for line in rollouts[:64]]).reshape(16, 4)
    others = (reward.sum(1, keepdims=True) - reward) / 3
    np.testing.assert_allclose([line["advantage"] for line in rollouts[:64]], (reward - others).ravel(), atol=1e-5)
    for line in lines:
        gaps = [one["sampler_gap"] for one in rollouts if one["iteration"] == line["step"]]
        assert max(gaps) == pytest.approx(line["sampler_gap"], rel=1e-4) and len(set(gaps)) > 1
