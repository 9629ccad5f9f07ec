"""The losses against hand-worked numbers and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reft_jax.algo import losses


def only(t: int) -> np.ndarray:
    """Weight 1 on entry t of [1,4], 0 on the others."""
    return (np.arange(4)[None] == t).astype(np.float32)


def test_policy_loss_by_hand_on_both_sides_of_the_clip():
    # ρ = 1.5: A=+1 is clipped to -1.2, A=-1 keeps the worse 1.5; ρ = 0.5: A=+1 keeps -0.5, A=-1 is clipped to 0.8
    ratio = np.array([[1.5, 1.5, 0.5, 0.5]], np.float32)
    advantage = np.array([[1, -1, 1, -1]], np.float32)
    for t, expected in enumerate([-1.2, 1.5, -0.5, 0.8]):
        loss = losses.policy_loss(np.log(ratio), np.zeros((1, 4), np.float32), advantage, only(t), clip=0.2)
        assert loss.shape == () and float(loss) == pytest.approx(expected, rel=1e-6)


def test_value_loss_by_hand():
    # V_old 0, V 0.5, R 1: plain (0.5)² = 0.25, clipped (0.2 - 1)² = 0.64, half of the larger
    one = np.ones((1, 1), np.float32)
    loss = losses.value_loss(0.5 * one, 0 * one, one, one, clip=0.2)
    assert loss.shape == () and float(loss) == pytest.approx(0.32, rel=1e-6)


def test_a_loss_is_a_sum_in_which_each_decision_has_its_weight():
    # The terms of the tests above, -1.2, 1.5, -0.5 and 0.8, weighing 0.5, 0.25, 0 and 2
    ratio, weight = np.array([[1.5, 1.5, 0.5, 0.5]], np.float32), np.array([[0.5, 0.25, 0, 2]], np.float32)
    advantage, nothing = np.array([[1, -1, 1, -1]], np.float32), np.zeros((1, 4), np.float32)
    policy = losses.policy_loss(np.log(ratio), nothing, advantage, weight, clip=0.2)
    assert float(policy) == pytest.approx(-0.6 + 0.375 + 1.6, rel=1e-6)
    critic = losses.value_loss(nothing + 0.5, nothing, nothing + 1, weight, clip=0.2)
    assert float(critic) == pytest.approx(0.32 * 2.75, rel=1e-6)
    tokens = losses.token_loss(np.array([[-1, -2, -3, -4]], np.float32), weight)
    assert float(tokens) == pytest.approx(0.5 + 0.5 + 8, rel=1e-6)


def row_means(x, mask) -> np.ndarray:
    """What each row adds to the mean over rows, times the number of rows."""
    return np.asarray((x * losses.row_weights(mask)).sum(1) * len(mask))


def test_rows_count_alike_whatever_their_length():
    x, mask = np.array([[1.0, 1, 1, 1], [5, 9, 9, 9]], np.float32), np.array([[1, 1, 1, 1], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(row_means(x, mask), [1, 5])
    weight = losses.row_weights(mask)
    assert weight.dtype == np.float32
    np.testing.assert_array_equal(weight, [[1 / 8] * 4, [1 / 2, 0, 0, 0]])


def test_a_row_without_actions_has_loss_0():
    x, mask = np.full((2, 3), 7.0, np.float32), np.array([[True, False, False], [False, False, False]])
    np.testing.assert_array_equal(row_means(x, mask), [7, 0])
    np.testing.assert_array_equal(losses.row_weights(mask), [[1 / 2, 0, 0], [0, 0, 0]])  # and counts as a row


def test_a_subset_of_the_rows_and_places_is_its_weights():
    """Entries of weight 0 are the same as never having had them."""
    rng = np.random.default_rng(1)
    x = [rng.normal(size=(3, 7)).astype(np.float32) for _ in range(3)]
    weight = np.zeros((3, 7), np.float32)
    weight[1, 2:5] = 1 / 3
    cut, third = [a[1:2, 2:5] for a in x], weight[1:2, 2:5]
    for loss in (losses.policy_loss, losses.value_loss):
        np.testing.assert_allclose(loss(*x, weight, clip=0.2), loss(*cut, third, clip=0.2), rtol=1e-6)
    np.testing.assert_allclose(losses.token_loss(x[0], weight), losses.token_loss(cut[0], third), rtol=1e-6)


def test_micro_batches_and_packing_add_up_to_the_whole():
    """The sums over any parts of the decisions, in any order and form, add up to the sum over all."""
    rng = np.random.default_rng(2)
    x = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3)]
    weight = np.asarray(losses.row_weights(np.arange(6)[None] < np.array([[6], [1], [0], [4]])))
    order = rng.permutation(24)
    for loss in (losses.policy_loss, losses.value_loss):
        whole = loss(*x, weight, clip=0.2)
        parts = sum(loss(*(a[rows] for a in (*x, weight)), clip=0.2) for rows in (slice(0, 1), slice(1, 4)))
        packed = loss(*(a.ravel()[order].reshape(2, 12) for a in (*x, weight)), clip=0.2)
        np.testing.assert_allclose([parts, packed], [whole] * 2, rtol=1e-6)


def test_entries_of_weight_0_change_nothing():
    rng = np.random.default_rng(0)
    x = [rng.normal(size=(2, 7)).astype(np.float32) for _ in range(3)]
    mask = np.arange(7)[None] < np.array([[4], [6]])
    weight, garbage = losses.row_weights(mask), [np.where(mask, a, 1e3) for a in x]
    for loss in (losses.policy_loss, losses.value_loss):
        np.testing.assert_array_equal(loss(*x, weight, clip=0.2), loss(*garbage, weight, clip=0.2))
    np.testing.assert_array_equal(losses.token_loss(x[0], weight), losses.token_loss(garbage[0], weight))
    infinite = np.where(mask, x[0], -np.inf)
    np.testing.assert_array_equal(losses.token_loss(x[0], weight), losses.token_loss(infinite, weight))


def test_gradient_of_a_row_without_actions_is_finite():
    zeros, weight = jnp.zeros((1, 3)), losses.row_weights(jnp.zeros((1, 3), bool))
    gradient = jax.grad(lambda x: losses.policy_loss(x, zeros, zeros, weight, clip=0.2))(zeros + 300.0)
    np.testing.assert_array_equal(gradient, zeros)
    np.testing.assert_array_equal(weight, zeros)


def test_class_loss_is_cross_entropy():
    logits, labels = np.array([[2.0, 0.0], [0.0, 0.0]], np.float32), np.array([0, 1])
    expected = [np.log(1 + np.exp(-2.0)), np.log(2.0)]
    for row in range(2):
        weight = (np.arange(2) == row).astype(np.float32)
        np.testing.assert_allclose(losses.class_loss(logits, labels, weight), expected[row], rtol=1e-6)
    weight = np.array([0.25, 3], np.float32)
    np.testing.assert_allclose(losses.class_loss(logits, labels, weight), weight @ expected, rtol=1e-6)
    lines = losses.class_loss(logits[None, None], labels[None, None], weight[None, None])  # [M,b,W]
    np.testing.assert_allclose(lines, weight @ expected, rtol=1e-6)
