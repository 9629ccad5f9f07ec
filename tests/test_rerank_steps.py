"""The reranker's update and its scores against a slow version that shares no code with them."""

import jax
import numpy as np
import pytest
from step_rows import (
    LENGTH,
    ORDER,
    RERANK_PARAMS,
    RERANKER,
    TOKENS,
    TOTAL_LEN,
    Packed,
    assert_same,
    gradient,
    packed,
    prepared,
)

from reft_jax.train.steps import RerankBatch, make_rerank_scorer

LABELS = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.int32)
REAL = np.array([0, 1, 2, 4, 6])  # the other rows have weight 0


@jax.jit
def slow_rerank(params):
    """(loss, logits [8,2]), gradient."""

    def loss(params):
        hidden = RERANKER.apply({"params": params["lm"]}, TOKENS, method="hidden")
        logits = hidden[np.arange(8), TOTAL_LEN - 1] @ params["rerank_head"]["weight"]
        return -jax.nn.log_softmax(logits)[REAL, LABELS[REAL]].mean(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def judged_rows(order=range(8), **shape) -> Packed:
    """Rows that are judged at their last token."""
    return packed(order, first=TOTAL_LEN - 1, decisions=np.ones(8, int), **shape)


def judged_otherwise() -> list[Packed]:
    return [judged_rows(), judged_rows(ORDER), judged_rows(max_len=96)]


def test_a_rerank_step_equals_its_slow_twin():
    (loss, logits), expected = slow_rerank(RERANK_PARAMS)
    step, fresh = prepared("rerank")
    weight = np.isin(np.arange(8), REAL).astype(np.float32) / len(REAL)
    for rows in judged_otherwise():
        labels, weights = (rows.spread(x[:, None].repeat(LENGTH, 1)) for x in (LABELS, weight))
        labels = np.where(weights > 0, labels, 1 - labels)  # where nothing is judged any label will do
        state, metrics = step(fresh(), (rows.lines, RerankBatch(labels, weights)), rows.count)
        assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(float(np.mean(np.argmax(logits, -1)[REAL] == LABELS[REAL])))
        assert 0 < metrics["accuracy"] < 1
        assert_same(gradient(state, metrics), expected, atol=1e-6)


def test_a_rerank_step_over_some_rows_is_that_of_the_others_with_weight_0():
    (loss, _), expected = slow_rerank(RERANK_PARAMS)
    step, fresh = prepared("rerank")
    rows = judged_rows(REAL)
    labels = rows.spread(LABELS[:, None].repeat(LENGTH, 1))
    weight = rows.spread(np.full((8, LENGTH), 1 / len(REAL), np.float32))
    state, metrics = step(fresh(), (rows.lines, RerankBatch(labels, weight)), rows.count)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_same(gradient(state, metrics), expected, atol=1e-6)


def test_rerank_scores_are_read_at_the_last_real_token_whatever_the_packing():
    (_, logits), _ = slow_rerank(RERANK_PARAMS)
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(-1)
    scorer = make_rerank_scorer(RERANKER)
    for rows in judged_otherwise():  # the twin's rows are padded with other ids
        scored = rows.collect(scorer(RERANK_PARAMS, rows.lines, rows.count))
        np.testing.assert_allclose(scored[np.arange(8), TOTAL_LEN - 1], expected, atol=1e-5)
    scored = scorer(RERANK_PARAMS, judged_rows().lines, 1)
    assert scored[0].any() and not scored[1:].any()  # no more than was asked for
