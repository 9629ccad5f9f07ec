"""Rows packed into lines: their places, the small share of padding, and that rows do not affect their neighbours."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_policy, tiny_ppo

from reft_jax.parallel.mesh import sizes_up_to
from reft_jax.stages import rerank, sft
from reft_jax.train.iteration import Iteration
from reft_jax.train.packing import LINE_LENGTHS, Lines, Packing, first_fit, packing_size
from reft_jax.train.scoring import make_scorer
from reft_jax.types import Rollout

SHAPE = {"max_len": 64, "micro_batch": 4, "micro_batches": 5, "multiple": 8}


def some_rows(seed: int, count: int = 20, longest: int = 64):
    """Rows of other lengths and ids for every seed, with the place of each's first decision and their number."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, 61, n).astype(np.int32) for n in rng.integers(1, longest + 1, count)]
    first = [int(rng.integers(0, len(row))) for row in rows]
    return rows, first, [int(rng.integers(0, len(row) - begin)) for row, begin in zip(rows, first, strict=True)]


def packed(seed: int, **shape):
    rows, first, decisions = some_rows(seed)
    return rows, first, decisions, Packing(rows, first, decisions, **SHAPE | shape)


def flat(lines: Lines) -> Lines:
    """[M,b,…] as [lines,…]."""
    return Lines(*(x.reshape(-1, x.shape[-1]) for x in lines))


SEEDS = pytest.mark.parametrize("seed", range(5))


@SEEDS
def test_each_row_lies_whole_and_alone_in_its_segment(seed):
    rows, _, _, packing = packed(seed)
    for x in packing.lines:
        assert x.shape[:2] == (5, 4) and x.dtype == np.int32
    lines, found = flat(packing.lines), []
    for line, (tokens, positions, segments) in enumerate(zip(*lines[:3], strict=True)):
        numbers = [int(number) for number in np.unique(segments) if number]
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers:
            places = np.flatnonzero(segments == number)
            assert places[-1] - places[0] + 1 == len(places)  # no gap, nobody in between
            np.testing.assert_array_equal(positions[places], np.arange(len(places)))
            found.append((line, tokens[places].tolist()))
        assert not tokens[segments == 0].any()
    expected = [(int(line), row.tolist()) for line, row in zip(packing.line, rows, strict=True)]
    assert sorted(found) == sorted(expected)


def test_positions_restart_at_every_row_of_a_line():
    packing = Packing([[5, 6, 7], [8, 9]], [0, 0], [2, 1], max_len=8, micro_batch=1, micro_batches=2, multiple=8)
    lines = flat(packing.lines)
    np.testing.assert_array_equal(lines.tokens, [[5, 6, 7, 8, 9, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(lines.positions, [[0, 1, 2, 0, 1, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(lines.segments, [[1, 1, 1, 2, 2, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(lines.decisions, [[0, 1, 3, -1, -1, -1, -1, -1], [-1] * 8])


@SEEDS
def test_decisions_are_the_places_that_were_asked_for(seed):
    """The token at a decision and the one after it are the row's own; a line's decisions come first, then nothing."""
    rows, first, decisions, packing = packed(seed)
    rows_at, places = packing.at
    asked = [(row, first[row] + i) for row in range(len(rows)) for i in range(decisions[row])]
    assert list(zip(rows_at, places, strict=True)) == asked
    lines, (line, slot) = flat(packing.lines), packing.slot
    at = lines.decisions[line, slot]
    np.testing.assert_array_equal(lines.tokens[line, at], [rows[row][t] for row, t in asked])
    np.testing.assert_array_equal(lines.tokens[line, at + 1], [rows[row][t + 1] for row, t in asked])
    np.testing.assert_array_equal(lines.positions[line, at], places)
    assert len(set(zip(line, slot, strict=True))) == len(asked)
    taken = np.zeros(lines.decisions.shape, bool)
    taken[packing.slot] = True
    np.testing.assert_array_equal(taken, lines.decisions >= 0)
    assert (lines.decisions[~taken] == -1).all() and not (taken[:, 1:] & ~taken[:, :-1]).any()


@SEEDS
def test_spread_and_collect_are_each_others_inverse_and_0_elsewhere(seed):
    rows, first, decisions, packing = packed(seed)
    rng, mask = np.random.default_rng(seed), np.zeros((len(rows), 70), bool)
    for row, (begin, count) in enumerate(zip(first, decisions, strict=True)):
        mask[row, begin : begin + count] = True
    x = rng.normal(size=mask.shape).astype(np.float32)
    there = packing.spread(x[packing.at])
    assert there.shape == packing.lines.decisions.shape and there.dtype == np.float32
    assert np.count_nonzero(there) == mask.sum()
    np.testing.assert_array_equal(packing.collect(there, 70), np.where(mask, x, 0))

    everywhere = rng.normal(size=there.shape).astype(np.float32)  # what is off the decisions does not come back
    back = packing.collect(everywhere, 70)
    assert back.dtype == np.float32 and not back[~mask].any()
    is_decision = packing.spread(1.0) > 0
    np.testing.assert_array_equal(packing.spread(back[packing.at]), np.where(is_decision, everywhere, 0))
    numbers = packing.spread(packing.at[0] + 1, np.int32)
    assert numbers.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(numbers[numbers > 0] - 1, minlength=len(rows)), decisions)


@SEEDS
def test_first_fit_never_overfills_and_beats_one_row_a_line(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 50)
    line, offset = first_fit(lengths, 64)
    taken = np.zeros((50, 64), int)
    for at, begin, length in zip(line, offset, lengths, strict=True):
        assert begin + length <= 64
        taken[at, begin : begin + length] += 1
    assert taken.max() == 1 and taken.sum() == lengths.sum()
    filled = taken.sum(1)[: line.max() + 1]
    assert filled.all()  # lines are used from the first on
    assert len(filled) < 45  # rows alone would take 50, and no packing can do with less than the sum
    assert (filled < 32).sum() <= 1  # two half empty lines would have been one
    for at, count in enumerate(filled):
        assert taken[at, :count].all()  # and without gaps


def test_first_fit_by_hand():
    # Longest first: 6 → line 0; 5 → line 1; 4 → line 0 (full at 10); 3 → line 1; 3 → line 2; 2 → line 1 (full)
    line, offset = first_fit(np.array([3, 6, 2, 4, 5, 3]), 10)
    np.testing.assert_array_equal(line, [1, 0, 1, 0, 1, 2])
    np.testing.assert_array_equal(offset, [5, 0, 8, 6, 0, 0])


def of_lengths(*lengths: int, decisions: int = 1, **shape) -> Packing:
    return Packing([[1] * n for n in lengths], [0] * len(lengths), [decisions] * len(lengths), **SHAPE | shape)


@pytest.mark.parametrize(
    ("max_len", "multiple", "lengths"),
    [(64, 8, (16, 32, 48, 64)), (100, 8, (32, 56, 80, 104)), (224, 224, (224,)), (24, 8, (8, 16, 24))],
)
def test_one_row_is_in_the_shortest_of_few_lines_that_hold_it(max_len, multiple, lengths):
    """Quarters of max_len, rounded up."""
    assert sizes_up_to(max_len, LINE_LENGTHS, multiple) == list(lengths)
    for longest in range(1, max_len + 1):
        expected = min(length for length in lengths if length >= longest)
        assert of_lengths(longest, max_len=max_len, multiple=multiple).length == expected
    found = of_lengths(1, max_len // 2, 2, max_len=max_len, multiple=multiple)
    assert found.length == min(length for length in lengths if length >= max_len // 2)
    assert found.lines.tokens.shape == found.lines.decisions.shape == (5, 4, found.length)


def test_padding_by_hand():
    # 22 + 22 tokens: two lines of 32 are 64 places, and so is one line of 64. One of 48 has the fewest
    one = of_lengths(22, 22, micro_batch=1)
    assert (one.length, one.count) == (48, 1) and one.padding == pytest.approx(1 - 44 / 48)
    # 30 + 30 tokens: two lines of 32, a micro-batch each, and one line of 64 are 64 places; the shorter line is taken
    two = of_lengths(30, 30, micro_batch=1)
    assert (two.length, two.count) == (32, 2) and two.padding == pytest.approx(1 - 60 / 64)
    # 20 and 12 share a line
    assert of_lengths(20, 12, 20, micro_batch=1).padding == pytest.approx(1 - 52 / 64)
    # Two lines of 32 with 30 each, of a micro-batch of 4 lines: the two empty ones are run too
    assert of_lengths(30, 30, micro_batch=4).padding == pytest.approx(1 - 60 / 128)
    assert of_lengths(16, 16, 16, 16, micro_batch=4).padding == pytest.approx(0)
    three = of_lengths(30, 30, 30, micro_batch=2)
    assert (three.length, three.count) == (32, 2) and three.padding == pytest.approx(1 - 90 / 128)


def test_lines_hold_any_number_of_decisions():
    assert (of_lengths(64, 64, decisions=63).lines.decisions >= 0).sum() == 126
    none = of_lengths(9, 9, decisions=0)  # rows without a decision are rows
    assert (none.lines.decisions == -1).all() and none.count == 1 and none.lines.tokens.sum() == 18


def test_shapes_come_from_few_sizes_whatever_the_rows():
    """However rows vary, four programs compile at most, and few places are padding."""
    shapes, padding = set(), []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rows, first, decisions = some_rows(seed, count=int(rng.integers(1, 21)), longest=int(rng.integers(2, 101)))
        packing = Packing(rows, first, decisions, max_len=100, micro_batch=4, micro_batches=5, multiple=8)
        (shape,) = {x.shape for x in packing.lines}
        assert packing.spread(0.0).shape == shape and shape[:2] == (5, 4)
        places = packing.lines.segments[: packing.count]
        assert packing.padding == pytest.approx((places == 0).mean()) and (places > 0).sum() == sum(map(len, rows))
        assert packing.lines.segments[packing.count - 1].any() and not packing.lines.segments[packing.count :].any()
        shapes.add(shape)
        if len(rows) == 20:
            padding.append(packing.padding)
    assert {shape[2] for shape in shapes} <= {32, 56, 80, 104} and len(shapes) <= LINE_LENGTHS
    assert np.mean(padding) < 0.2  # rows alone in lines of the longest's length are half padding


def test_room_is_for_a_row_a_line():
    """As many rows as lines, all as long as a line may be: every line is full."""
    packing = of_lengths(*[64] * 20)
    assert packing.count == 5 and packing.padding == 0
    assert sorted(packing.line) == list(range(20))


# --- what the stages pack


def test_lines_may_be_longer_than_rows():
    """data.line_len: rows of at most 40 tokens, in lines of up to 128. The room is still one row a line."""
    assert packing_size(RUN.config, 40, 1, 12)["max_len"] == 40
    config = SimpleNamespace(data=SimpleNamespace(pad_multiple=8, line_len=128))
    packing = Packing([[1] * 36] * 12, [0] * 12, [35] * 12, **packing_size(config, 40, 1, 12))
    assert (packing.length, packing.count) == (128, 4)  # three rows a line; in lines of 40 there is one
    assert packing.lines.tokens.shape == (12, 1, 128) and packing.padding == pytest.approx(1 - 12 * 36 / 512)


RUN = SimpleNamespace(
    config=SimpleNamespace(
        data=SimpleNamespace(pad_multiple=8, line_len=0),
        **{name: SimpleNamespace(max_len=16, micro_batch=2, batch_size=4) for name in ("sft", "rerank", "rl")},
    )
)


def targets(packing: Packing) -> list[list[int]]:
    """The tokens that the decisions of each row chose."""
    lines, (line, slot) = flat(packing.lines), packing.slot
    chosen = lines.tokens[line, lines.decisions[line, slot] + 1]
    return [chosen[packing.at[0] == row].tolist() for row in range(len(packing.line))]


def test_targets_of_sft_are_the_tokens_after_the_prompt():
    # prompt 5 6, target 7 8 9: tokens 2, 3, 4 are trained, chosen at entries 1, 2, 3
    packing = sft.pack(RUN, [([5, 6, 7, 8, 9], 2), ([1, 2, 3], 1), ([4, 4], 2)])
    assert targets(packing) == [[7, 8, 9], [2, 3], []]
    np.testing.assert_array_equal(packing.at, [[0, 0, 0, 1, 1], [1, 2, 3, 0, 1]])
    assert packing.shape == (2, 2)


def test_decisions_of_reft_are_the_actions():
    tokens = np.arange(1, 33, dtype=np.int32).reshape(4, 8)
    prompt_len, total_len = np.array([3, 1, 5, 4], np.int32), np.array([8, 2, 7, 4], np.int32)
    rollout = Rollout(tokens, prompt_len, total_len, np.zeros(4, np.float32))
    one = Iteration(None, None, None, tiny_ppo(), None, micro_batch=2, max_len=16, multiple=8)
    packing = one.pack(rollout)
    assert packing.shape == (2, 2) and targets(packing) == [[4, 5, 6, 7, 8], [10], [22, 23], []]
    minibatch = Rollout(*(x[[2, 0]] for x in rollout))  # its rows in its order
    packing = one.pack(minibatch)
    assert packing.shape == (1, 2) and targets(packing) == [[22, 23], [4, 5, 6, 7, 8]]
    np.testing.assert_array_equal(packing.at, [[0, 0, 1, 1, 1, 1, 1], [4, 5, 2, 3, 4, 5, 6]])


def test_the_reranker_decides_once_a_row_at_its_last_token():
    packing = rerank.pack(RUN, [[5, 6, 7], [8], [1, 2]])
    lines = flat(packing.lines)
    last = lines.tokens[packing.slot[0], lines.decisions[packing.slot]]
    np.testing.assert_array_equal(last, [7, 8, 2])
    np.testing.assert_array_equal(packing.at, [[0, 1, 2], [2, 0, 1]])


# --- the model on lines


MODEL, PARAMS = tiny_policy()


def row_by_row(rows, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each next token and value at each token, [B,64]: every row run alone, at the front of 64."""

    @jax.jit
    def alone(tokens):
        hidden = MODEL.apply({"params": PARAMS["lm"]}, tokens, method="hidden")
        logits = MODEL.apply({"params": PARAMS["lm"]}, hidden, method="unembed")
        value = hidden[0] @ PARAMS["value_head"]["weight"] + PARAMS["value_head"]["bias"][None]
        return jax.nn.log_softmax(logits / temperature)[0], value

    logprobs, values = np.zeros((len(rows), 64), np.float32), np.zeros((len(rows), 64), np.float32)
    for i, row in enumerate(rows):
        scores, values[i] = alone(jnp.asarray(np.pad(row, (0, 64 - len(row))))[None])
        logprobs[i, : len(row) - 1] = np.asarray(scores)[np.arange(len(row) - 1), row[1:]]
    return logprobs, values


@pytest.mark.parametrize("shape", [{}, {"max_len": 200, "micro_batch": 1, "micro_batches": 20}])
def test_packed_scores_equal_those_of_rows_alone(shape):
    rows, first, decisions, packing = packed(3, **shape)
    assert np.bincount(packing.line).max() > 2  # several rows in a line
    scored = make_scorer(MODEL, temperature=0.7)(PARAMS, packing.lines, packing.count)
    for found, expected in zip(scored, row_by_row(rows, 0.7), strict=True):
        np.testing.assert_allclose(packing.collect(found, 64)[packing.at], expected[packing.at], atol=2e-5)
