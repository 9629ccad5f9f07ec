"""Token rewards, GAE and whitening against numbers worked by hand and against a slow twin."""

import jax.numpy as jnp
import numpy as np
import pytest

from reft_jax.algo import advantages


@pytest.fixture
def rows():
    """Three random rows [3,9] with different prompt and total lengths."""
    rng = np.random.default_rng(0)
    prompt_len, total_len = np.array([2, 4, 1]), np.array([9, 6, 2])
    arrays = {name: rng.normal(size=(3, 9)).astype(np.float32) for name in ("old", "ref", "values")}
    return prompt_len, total_len, np.array([1.0, 0.1, 0.0], np.float32), arrays


def slow_gae(rewards, values, mask, gamma, lam):
    """Straight from the definition: A_t = Σ_k (γλ)^k δ_{t+k}, over the row's own actions."""
    advantage = np.zeros_like(rewards)
    for b in range(len(rewards)):
        actions = np.flatnonzero(mask[b])
        for i, t in enumerate(actions):
            for k, u in enumerate(actions[i:]):
                after = values[b, u + 1] if u + 1 in actions else 0.0
                advantage[b, t] += (gamma * lam) ** k * (rewards[b, u] + gamma * after - values[b, u])
    return advantage


def test_action_mask_covers_the_response_and_its_eos():
    mask = advantages.action_mask(jnp.array([3]), jnp.array([6]), 8)
    # tokens 3, 4, 5 are the response; the decisions about them are entries 2, 3, 4
    np.testing.assert_array_equal(mask[0], [False, False, True, True, True, False, False, False])


def test_score_is_paid_once_on_the_last_action_and_a_tenth_survives(rows):
    prompt_len, total_len, score, x = rows
    mask = advantages.action_mask(prompt_len, total_len, 9)
    rewards, score_rewards, kl_rewards = advantages.token_rewards(score, x["old"], x["ref"], mask, kl_coef=0.05)
    expected = np.zeros((3, 9), np.float32)
    expected[[0, 1, 2], total_len - 2] = [1.0, 0.1, 0.0]
    np.testing.assert_array_equal(score_rewards, expected)
    np.testing.assert_allclose(kl_rewards, np.where(mask, -0.05 * (x["old"] - x["ref"]), 0), atol=1e-7)
    np.testing.assert_array_equal(rewards, score_rewards + kl_rewards)


def test_rewards_of_a_row_sum_to_score_minus_beta_kl(rows):
    prompt_len, total_len, score, x = rows
    mask = advantages.action_mask(prompt_len, total_len, 9)
    rewards, _, _ = advantages.token_rewards(score, x["old"], x["ref"], mask, kl_coef=0.05)
    kl = np.where(mask, x["old"] - x["ref"], 0).sum(1)
    np.testing.assert_allclose(rewards.sum(1), score - 0.05 * kl, atol=1e-6)


def test_gae_by_hand():
    # one row of two actions: δ_1 = 1 - 0.5 = 0.5; δ_0 = 0 + 0.9*0.5 - 0.2 = 0.25; A_0 = 0.25 + 0.9*0.8*0.5 = 0.61
    rewards, values = jnp.array([[0.0, 1.0, 0.0]]), jnp.array([[0.2, 0.5, 7.0]])
    mask = jnp.array([[True, True, False]])
    advantage, returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(advantage, [[0.61, 0.5, 0.0]], atol=1e-6)
    np.testing.assert_allclose(returns, [[0.81, 1.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.97, 0.9), (1.0, 1.0), (0.9, 0.0)])
def test_gae_equals_its_slow_twin(rows, gamma, lam):
    prompt_len, total_len, score, x = rows
    mask = np.asarray(advantages.action_mask(prompt_len, total_len, 9))
    rewards = np.where(mask, x["old"], 0)
    advantage, returns = advantages.gae(rewards, x["values"], mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(advantage, slow_gae(rewards, x["values"], mask, gamma, lam), atol=1e-5)
    np.testing.assert_allclose(returns, advantage + np.where(mask, x["values"], 0), atol=1e-6)


def test_lambda_zero_gives_the_one_step_error(rows):
    prompt_len, total_len, score, x = rows
    mask = np.asarray(advantages.action_mask(prompt_len, total_len, 9))
    rewards, values = np.where(mask, x["old"], 0), np.where(mask, x["values"], 0)
    advantage, _ = advantages.gae(rewards, x["values"], mask, gamma=0.9, lam=0.0)
    following = np.pad(values[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(advantage, np.where(mask, rewards + 0.9 * following - values, 0), atol=1e-6)


def test_lambda_one_gives_the_plain_return(rows):
    prompt_len, total_len, score, x = rows
    mask = np.asarray(advantages.action_mask(prompt_len, total_len, 9))
    rewards = np.where(mask, x["old"], 0)
    _, returns = advantages.gae(rewards, x["values"], mask, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(returns, np.where(mask, rewards[:, ::-1].cumsum(1)[:, ::-1], 0), atol=1e-5)


def test_whitened_actions_have_mean_0_and_variance_1(rows):
    prompt_len, total_len, _, x = rows
    mask = np.asarray(advantages.action_mask(prompt_len, total_len, 9))
    white = np.asarray(advantages.whiten(x["values"], mask))
    assert abs(white[mask].mean()) < 1e-6
    assert abs(white[mask].var(ddof=1) - 1) < 1e-5
    assert not white[~mask].any()


def test_explained_variance_of_a_perfect_a_constant_and_a_hopeless_critic(rows):
    prompt_len, total_len, _, x = rows
    mask, returns = np.asarray(advantages.action_mask(prompt_len, total_len, 9)), x["old"]
    assert advantages.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert advantages.explained_variance(np.full_like(returns, 3.0), returns, mask) == pytest.approx(0, abs=1e-6)
    assert advantages.explained_variance(-5 * returns, returns, mask) == -1
