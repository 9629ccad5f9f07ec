"""Log-probabilities by window and chunk against the log-softmax of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_policy

from reft_jax.train.scoring import CHUNK, make_scorer, next_token_logprobs, score_rows

MODEL, PARAMS = tiny_policy()
LENGTH, WIDTH = 72, 2 * CHUNK
TOKENS = np.random.default_rng(1).integers(0, 61, (3, LENGTH)).astype(np.int32)
START = np.array([0, 3, 50], np.int32)  # the last row's window passes the end


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def both_ways(model, tokens, temperature):
    """Windowed log-probabilities [B,T], log-softmax [B,T,V] and the hidden states of both."""
    lm = PARAMS["lm"]
    hidden, _ = model.apply({"params": lm}, tokens, method="hidden")
    windowed = next_token_logprobs(model, lm, hidden, tokens, START, WIDTH, temperature)
    logits = model.apply({"params": lm}, hidden, method="unembed")
    return windowed, jax.nn.log_softmax(logits / temperature), hidden


def gathered(full) -> np.ndarray:
    """Log-probability of token t+1 inside each row's window, 0 elsewhere, by a loop."""
    out = np.zeros((3, LENGTH), np.float32)
    for row, start in enumerate(START):
        for t in range(start, min(start + WIDTH, LENGTH - 1)):
            out[row, t] = full[row, t, TOKENS[row, t + 1]]
    return out


@pytest.mark.parametrize(("dtype", "temperature"), [(jnp.float32, 0.7), (jnp.bfloat16, 1.0)])
def test_the_window_equals_the_full_log_softmax(dtype, temperature):
    windowed, full, _ = both_ways(MODEL.clone(dtype=dtype), TOKENS, temperature)
    assert windowed.dtype == jnp.float32
    np.testing.assert_allclose(windowed, gathered(np.asarray(full)), atol=2e-5)
    assert np.count_nonzero(windowed) == 64 + 64 + 21  # the third row's targets are tokens 51 to 71


def test_full_logits_exist_neither_forward_nor_backward():
    def total(params):
        return score_rows(MODEL, params, TOKENS, START, WIDTH)[0].sum()

    text = jax.jit(jax.grad(total)).lower(PARAMS).as_text()
    assert f"tensor<3x{CHUNK}x61xf32>" in text  # the logits of one chunk
    for shape in (f"3x{LENGTH}x61", f"3x{WIDTH}x61", f"2x3x{CHUNK}x61"):  # of all; of the window; kept for the gradient
        assert f"tensor<{shape}xf32>" not in text


def test_the_scorer_returns_values_where_there_is_a_value_head():
    groups, starts = np.stack([TOKENS, TOKENS[::-1]]), np.stack([START, START[::-1]])
    scorer = make_scorer(MODEL, temperature=0.7)
    logprob, value = scorer(PARAMS, groups, starts, width=WIDTH)
    windowed, _, hidden = both_ways(MODEL, TOKENS, 0.7)
    np.testing.assert_allclose(logprob[0], windowed, atol=2e-5)
    np.testing.assert_allclose(logprob[1], logprob[0][::-1], atol=2e-5)

    head = PARAMS["value_head"]
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value[0], np.asarray(hidden) @ np.asarray(head["weight"]) + head["bias"], atol=2e-5)

    reference, nothing = scorer({"lm": PARAMS["lm"]}, groups, starts, width=WIDTH)
    assert nothing is None
    np.testing.assert_allclose(reference, logprob, atol=2e-5)
