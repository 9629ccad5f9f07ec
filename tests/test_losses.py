"""The losses against hand-worked numbers and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reft_jax.algo import losses


def test_policy_loss_by_hand_on_both_sides_of_the_clip():
    # ρ = 1.5: A=+1 is clipped to -1.2, A=-1 keeps the worse 1.5; ρ = 0.5: A=+1 keeps -0.5, A=-1 is clipped to 0.8
    ratio = np.array([[1.5, 1.5, 0.5, 0.5]], np.float32)
    advantage = np.array([[1, -1, 1, -1]], np.float32)
    for t, expected in enumerate([-1.2, 1.5, -0.5, 0.8]):
        mask = np.arange(4)[None] == t
        loss = losses.policy_loss(np.log(ratio), np.zeros((1, 4), np.float32), advantage, mask, clip=0.2)
        assert loss[0] == pytest.approx(expected, rel=1e-6)


def test_value_loss_by_hand():
    # V_old 0, V 0.5, R 1: plain (0.5)² = 0.25, clipped (0.2 - 1)² = 0.64, half of the larger
    one = np.ones((1, 1), np.float32)
    loss = losses.value_loss(0.5 * one, 0 * one, one, one > 0, clip=0.2)
    assert loss[0] == pytest.approx(0.32, rel=1e-6)


def test_rows_count_alike_whatever_their_length():
    x, mask = np.array([[1.0, 1, 1, 1], [5, 9, 9, 9]], np.float32), np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(losses.row_means(x, mask), [1, 5])


def test_a_row_without_actions_has_loss_0():
    x, mask = np.full((2, 3), 7.0, np.float32), np.array([[True, False, False], [False, False, False]])
    np.testing.assert_array_equal(losses.row_means(x, mask), [7, 0])


def test_a_subset_of_the_rows_and_places_is_its_mask():
    """Masking entries out is the same as never having had them."""
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, 7)).astype(np.float32) for _ in range(3)]
    mask = np.zeros((3, 7), bool)
    mask[1, 2:5] = True
    cut = [a[1:2, 2:5] for a in x]
    for loss in (losses.policy_loss, losses.value_loss):
        masked, alone = loss(*x, mask, clip=0.2), loss(*cut, np.ones((1, 3), bool), clip=0.2)
        np.testing.assert_allclose(masked, [0, alone[0], 0], rtol=1e-6)
    np.testing.assert_allclose(losses.token_loss(x[0], mask), losses.token_loss(cut[0], cut[0] == cut[0]), rtol=1e-6)


def test_masked_entries_change_nothing():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(2, 7)).astype(np.float32) for _ in range(3)]
    mask = np.arange(7)[None] < np.array([[4], [6]])
    garbage = [np.where(mask, a, 1e3) for a in x]
    for loss in (losses.policy_loss, losses.value_loss):
        np.testing.assert_array_equal(loss(*x, mask, clip=0.2), loss(*garbage, mask, clip=0.2))
    np.testing.assert_array_equal(losses.token_loss(x[0], mask), losses.token_loss(garbage[0], mask))


def test_gradient_of_a_row_without_actions_is_finite():
    zeros, mask = jnp.zeros((1, 3)), jnp.zeros((1, 3), bool)
    gradient = jax.grad(lambda x: losses.policy_loss(x, zeros, zeros, mask, clip=0.2).sum())(zeros + 300.0)
    np.testing.assert_array_equal(gradient, zeros)


def test_class_loss_is_cross_entropy():
    logits, labels = np.array([[2.0, 0.0], [0.0, 0.0]], np.float32), np.array([0, 1])
    expected = [np.log(1 + np.exp(-2.0)), np.log(2.0)]
    np.testing.assert_allclose(losses.class_loss(logits, labels), expected, rtol=1e-6)
