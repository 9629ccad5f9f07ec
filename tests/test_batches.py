"""Rows on the host: their order and their padding."""

import numpy as np
import pytest

from reft_jax.train.batches import epoch_order, minibatches, pad_tokens, rollout_rows, rows_at
from reft_jax.types import Completion, Prompt


def test_an_epoch_visits_each_row_once_in_an_order_of_its_own():
    orders = [epoch_order(seed, epoch, 20).tolist() for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(1, 1, 20).tolist() == orders[1]


@pytest.mark.parametrize(("start", "count"), [(0, 7), (3, 4), (5, 9), (7, 7), (13, 1), (6, 30)])
def test_rows_are_a_slice_of_the_endless_sequence_of_epochs(start, count):
    endless = np.concatenate([epoch_order(5, epoch, 7) for epoch in range(6)])
    np.testing.assert_array_equal(rows_at(5, start, count, 7), endless[start : start + count])


def test_a_minibatch_has_all_samples_of_its_questions_and_every_pass_visits_each_row_once():
    parts = list(minibatches(7, 3, rows=24, passes=2, parts=3, samples=4))
    assert [part.shape for part in parts] == [(8,)] * 6
    for part in parts:
        questions, counts = np.unique(part // 4, return_counts=True)
        assert counts.tolist() == [4, 4] and len(questions) == 2
    for one_pass in (parts[:3], parts[3:]):
        assert sorted(np.concatenate(one_pass)) == list(range(24))
    assert not np.array_equal(np.concatenate(parts[:3]), np.concatenate(parts[3:]))


def test_minibatches_of_one_sample_per_question_are_those_of_rows():
    order = np.random.default_rng([7, 3, 0]).permutation(8)
    np.testing.assert_array_equal(list(minibatches(7, 3, rows=8, passes=1, parts=2)), order.reshape(2, 4))


def test_padding_is_on_the_right_and_lengths_are_real():
    tokens, lengths = pad_tokens([[5, 6, 7], [], [1, 2, 3, 4, 5]], 4)
    np.testing.assert_array_equal(tokens, [[5, 6, 7] + [0] * 5, [0] * 8, [1, 2, 3, 4, 5] + [0] * 3])
    np.testing.assert_array_equal(lengths, [3, 0, 5])
    assert tokens.dtype == lengths.dtype == np.int32
    assert pad_tokens([[1] * 4], 4)[0].shape == (1, 4)  # a full row gets no padding


def test_a_rollout_row_is_the_prompt_and_its_sampled_tokens():
    prompts = [Prompt("a_0", 0, np.array([5, 6])), Prompt("a_1", 0, np.array([7, 8, 9]))]
    completions = [
        Completion("a_0", 0, np.array([1, 2, 3]), np.zeros(3), True),
        Completion("a_1", 0, np.array([], np.int32), np.zeros(0), False),
    ]
    rollout = rollout_rows(prompts, completions, [1.0, 0.1], 4)
    np.testing.assert_array_equal(rollout.tokens, [[5, 6, 1, 2, 3, 0, 0, 0], [7, 8, 9, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.prompt_len, [2, 3])
    np.testing.assert_array_equal(rollout.total_len, [5, 3])
    np.testing.assert_array_equal(rollout.score, np.array([1.0, 0.1], np.float32))
    with pytest.raises(ValueError, match="shorter"):
        rollout_rows(prompts, completions[:1], [1.0], 4)
