"""Log-probabilities by decisions and chunks against the log-softmax of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_policy

from reft_jax.train import scoring
from reft_jax.train.packing import Lines, Packing
from reft_jax.train.scoring import LOGITS_AT_ONCE, hidden_states, make_scorer, score_lines

MODEL, PARAMS = tiny_policy()
LENGTH = 72
TOKENS = np.random.default_rng(1).integers(0, 61, (3, LENGTH)).astype(np.int32)
START, DECISIONS = [0, 3, 50], [64, 64, 21]  # the third row's last decision chooses its last token
PADDING = np.random.default_rng(2).integers(0, 61, 10_000)


def packed(rows=TOKENS, start=START, decisions=DECISIONS, *, micro_batch=3, micro_batches=1, length=LENGTH):
    """The rows in lines; padding is not zero: nothing may depend on it."""
    shape = {"micro_batch": micro_batch, "micro_batches": micro_batches, "max_len": length, "multiple": length}
    packing = Packing(rows, start, decisions, **shape)
    garbage = PADDING[: packing.lines.tokens.size].reshape(packing.lines.tokens.shape)
    tokens = np.where(packing.lines.segments == 0, garbage, packing.lines.tokens).astype(np.int32)
    packing.lines = packing.lines._replace(tokens=tokens)
    return packing


def first(tree):
    """The only micro-batch."""
    return jax.tree.map(lambda x: x[0], tree)


@functools.partial(jax.jit, static_argnames=("model", "temperature", "at_once"))
def by_decisions(model, lines, temperature, at_once):
    assert at_once == scoring.LOGITS_AT_ONCE  # an argument, so that each value is a program of its own
    return score_lines(model, PARAMS, lines, temperature)


@functools.partial(jax.jit, static_argnames=("model", "temperature"))
def all_at_once(model, tokens, temperature):
    """Log-softmax [B,T,V] and the hidden states it is of."""
    lm = PARAMS["lm"]
    hidden = model.apply({"params": lm}, tokens, method="hidden")
    logits = model.apply({"params": lm}, hidden, method="unembed")
    return jax.nn.log_softmax(logits / temperature), hidden


def gathered(full) -> np.ndarray:
    """Log-probability of token t+1 at each row's decisions t, 0 elsewhere, by a loop."""
    out = np.zeros((3, LENGTH), np.float32)
    for row, (start, count) in enumerate(zip(START, DECISIONS, strict=True)):
        for t in range(start, start + count):
            out[row, t] = full[row, t, TOKENS[row, t + 1]]
    return out


def added(logprob, weight):
    """A loss."""
    return (logprob * weight).sum(), {}


CHUNKS = pytest.mark.parametrize("at_once", [LOGITS_AT_ONCE, 50, 7])  # of 72 decisions a line all; 16; 2


@CHUNKS
@pytest.mark.parametrize(("dtype", "temperature"), [(jnp.float32, 0.7), (jnp.bfloat16, 1.0)])
def test_decisions_equal_the_full_log_softmax(monkeypatch, dtype, temperature, at_once):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    model, packing = MODEL.clone(dtype=dtype), packed()
    assert packing.lines.decisions.shape == (1, 3, LENGTH)
    logprob, _ = by_decisions(model, first(packing.lines), temperature, at_once)
    assert logprob.dtype == jnp.float32 and logprob.shape == (3, LENGTH)
    full, _ = all_at_once(model, TOKENS, temperature)
    found = packing.collect(logprob, LENGTH)
    np.testing.assert_allclose(found, gathered(np.asarray(full)), atol=2e-5)
    assert np.count_nonzero(found) == 64 + 64 + 21  # the third row's targets are tokens 51 to 71


@CHUNKS
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_the_full_log_softmax(monkeypatch, tied, at_once):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    model, params = tiny_policy(tie_embeddings=tied)
    rng, lines = np.random.default_rng(5), first(packed().lines)
    hidden, probe = (rng.normal(size=(3, LENGTH, *more)).astype(np.float32) for more in ((24,), ()))
    probe[lines.decisions < 0], used = 0, 64
    targets = scoring.at_decisions(lines.tokens, lines.decisions + 1)

    def loss(logprob, probe):
        loss = (probe * jnp.sin(logprob)).sum()
        counts = {"loss": loss, "decisions": (probe != 0).sum()}
        return 3 * loss, counts | {"cost_max": jnp.where(probe != 0, -logprob, 0).max()}

    def by_chunks(lm, hidden):
        found, numbers = scoring.decision_loss(loss, model, lm, hidden, lines, probe, 0.7)
        return 2 * found, numbers

    def whole(lm, hidden):
        logprobs = jax.nn.log_softmax(model.apply({"params": lm}, hidden, method="unembed") / 0.7)
        found, numbers = loss(jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0], probe)
        return 2 * found, numbers

    (made, found), (value, expected) = (
        jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))(params["lm"], hidden) for of in (by_chunks, whole)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), made, value)
    assert made[1]["decisions"] == sum(DECISIONS)
    assert np.abs(expected[0]["embed"] if tied else expected[0]["lm_head"]["kernel"]).max() > 1
    assert np.abs(expected[1][:, :used]).max() > 0.1
    for (path, leaf), other in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, leaf, atol=1e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


def test_chunks_without_decisions_are_not_scored(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 12)  # four a line
    hidden = np.random.default_rng(6).normal(size=(3, 10, 24)).astype(np.float32)
    tokens, targets = TOKENS[:, :11], TOKENS[:, 1:11]

    @jax.jit
    def score(hidden, used):
        return scoring.next_token_logprobs(MODEL, PARAMS["lm"], hidden, targets, used)

    @jax.jit
    @jax.grad
    def gradient(hidden, used):
        decisions = jnp.broadcast_to(jnp.where(jnp.arange(10) < used, jnp.arange(10), -1), (3, 10))
        lines = Lines(tokens, tokens, tokens, decisions)
        return scoring.decision_loss(added, MODEL, PARAMS["lm"], hidden, lines, np.ones((3, 10), np.float32))[0]

    whole = score(hidden, 10)
    assert np.all(whole < 0)
    for used, scored in ((0, 0), (1, 4), (4, 4), (5, 8), (8, 8), (9, 10)):
        found, to_hidden = score(hidden, used), gradient(hidden, used)
        np.testing.assert_allclose(found[:, :scored], whole[:, :scored], rtol=1e-6)
        assert to_hidden[:, :scored].any(-1).all()
        assert not found[:, scored:].any() and not to_hidden[:, scored:].any()
    assert score._cache_size() == gradient._cache_size() == 1  # whatever the number


def test_full_logits_exist_neither_forward_nor_backward():
    rows = np.tile(TOKENS, (4, 1))
    lines = first(packed(rows, START * 4, DECISIONS * 4, micro_batch=12).lines)
    assert lines.tokens.shape == lines.decisions.shape == (12, LENGTH)

    weight = np.ones(lines.decisions.shape, np.float32)

    def total(lm):
        return scoring.decision_loss(added, MODEL, lm, hidden_states(MODEL, lm, lines), lines, weight)[0]

    text = jax.jit(jax.grad(total)).lower(PARAMS["lm"]).as_text()
    assert 12 * 21 <= LOGITS_AT_ONCE < 12 * 22
    assert "tensor<12x21x61xf32>" in text  # the logits of one chunk of four
    # of all places; with what fills the last chunk; kept for the gradient
    for shape in (f"12x{LENGTH}x61", "12x84x61", "4x12x21x61"):
        assert f"tensor<{shape}xf32>" not in text


def test_the_scorer_returns_values_where_there_is_a_value_head():
    twice = np.concatenate([TOKENS, TOKENS[::-1]])
    packing = packed(twice, START + START[::-1], DECISIONS + DECISIONS[::-1], micro_batches=2)
    scorer = make_scorer(MODEL, temperature=0.7)
    logprob, value = (packing.collect(x, LENGTH) for x in scorer(PARAMS, packing.lines, packing.count))
    full, hidden = all_at_once(MODEL, TOKENS, 0.7)
    np.testing.assert_allclose(logprob[:3], gathered(np.asarray(full)), atol=2e-5)
    np.testing.assert_allclose(logprob[3:], logprob[:3][::-1], atol=2e-5)

    head = PARAMS["value_head"]
    expected = np.asarray(hidden) @ np.asarray(head["weight"]) + head["bias"]
    np.testing.assert_allclose(value[:3], np.where(logprob[:3] != 0, expected, 0), atol=2e-5)
    assert scorer(PARAMS, packing.lines, packing.count)[1].dtype == jnp.float32

    reference, nothing = scorer({"lm": PARAMS["lm"]}, packing.lines, packing.count)
    assert nothing is None
    np.testing.assert_allclose(packing.collect(reference, LENGTH), logprob, atol=2e-5)


def test_the_scorer_leaves_micro_batches_without_rows_out_and_compiles_once():
    scorer, packing = make_scorer(MODEL, temperature=0.7), packed(micro_batch=1, micro_batches=3)
    assert packing.count == 3
    whole = scorer(PARAMS, packing.lines, 3)
    for count in (2, 1):
        for found, expected in zip(scorer(PARAMS, packing.lines, count), whole, strict=True):
            np.testing.assert_array_equal(found[:count], expected[:count])
            assert not found[count:].any() and expected[count:].any()
    assert scorer._cache_size() == 1


def test_hidden_states_are_those_of_the_decisions():
    packing = packed(length=3 * LENGTH, micro_batch=1)
    assert packing.lines.tokens.shape == (1, 1, 216)  # all three rows in one line
    found = jax.jit(lambda lines: hidden_states(MODEL, PARAMS["lm"], lines))(first(packing.lines))
    _, hidden = all_at_once(MODEL, TOKENS, 1.0)
    np.testing.assert_allclose(found[packing.slot], np.asarray(hidden)[packing.at], atol=2e-5)
