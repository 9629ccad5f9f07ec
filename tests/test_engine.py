"""The engine: what it draws, and that this depends only on the model, the seed and the row's identity."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import rollouts_on, tiny_model

from reft_jax.engine import generate as engine_module
from reft_jax.engine.generate import Engine, item_number
from reft_jax.engine.sampling import draw, inverse_cdf, row_keys
from reft_jax.parallel.compilation import compiles
from reft_jax.parallel.mesh import make_mesh
from reft_jax.types import Completion, Prompt

EOS = 31  # greedy decoding of PROMPTS meets it as the first token, later, and never
TEMPERATURE = 0.7
MAX_LEN = 21  # rows are 24 long: the next multiple of 8
MODEL, LM = tiny_model()


def prompts_of(lengths, name="toy", sample=0) -> list[Prompt]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.config.vocab_size, length).astype(np.int32) for length in lengths]
    return [Prompt(f"{name}_{i}", sample, row) for i, row in enumerate(rows)]


PROMPTS = prompts_of([3, 8, 1, 5, 8, 2])  # in a batch of 8, the two rows left over are filler


def generate(prompts, *, batch=8, max_len=MAX_LEN, temperature=TEMPERATURE, seed=0, eos=EOS, **settings):
    """The completions in the order of the prompts."""
    engine = Engine(MODEL, make_mesh(1, 1, 1), slots=batch, pad_multiple=8, eos_id=eos, seed=seed)
    pairs = list(engine.generate(LM, prompts, max_len=max_len, temperature=temperature, **settings))
    assert sorted(i for i, _ in pairs) == list(range(len(prompts)))
    found = dict(pairs)
    completions = [found[i] for i in range(len(prompts))]
    assert [(c.item_id, c.sample) for c in completions] == [(p.item_id, p.sample) for p in prompts]
    return completions


draw_all = jax.jit(draw, static_argnames=("temperature", "top_k"))
pick = jax.jit(inverse_cdf)


def texts(completions) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@functools.partial(jax.jit, static_argnames="temperature")
def all_logprobs(tokens, temperature=1.0):
    return jax.nn.log_softmax(MODEL.apply({"params": LM}, tokens) / temperature)


def next_logprobs(tokens, temperature=1.0):
    """Log-softmax at the last of `tokens`, by a full forward of a row padded to 24."""
    row = np.zeros((1, 24), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(all_logprobs(row, temperature))[0, len(tokens) - 1]


def slow_text(prompt, choose) -> tuple[list[int], list[float]]:
    """Response and its log-probabilities, one full forward a token; `choose(logprobs [V], t)` picks token t of it."""
    tokens, logprobs = list(prompt.tokens), []
    while len(tokens) < MAX_LEN and (not logprobs or tokens[-1] != EOS):
        scores = next_logprobs(tokens)
        tokens.append(int(choose(scores, len(logprobs))))
        logprobs.append(scores[tokens[-1]])
    return tokens[len(prompt.tokens) :], logprobs


def test_greedy_equals_a_slow_loop_with_the_full_forward():
    completions = generate(PROMPTS, temperature=0.0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens, logprobs = slow_text(prompt, lambda scores, t: scores.argmax())
        assert completion.tokens.tolist() == tokens
        assert completion.finished == (tokens[-1] == EOS)
        np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-5)
    assert [len(completion.tokens) for completion in completions if completion.finished] == [4, 10, 1]


def test_a_draw_follows_from_seed_iteration_item_sample_and_place_alone():
    seed, iteration, sample = 3, 5, 2
    prompts = [prompt._replace(sample=sample) for prompt in PROMPTS]

    def choose(item, scores, t):
        key = jax.random.key(seed)
        for part in (iteration, item, sample, t):
            key = jax.random.fold_in(key, part)
        ends = np.exp(scores / TEMPERATURE).cumsum()
        return np.searchsorted(ends, (1 - jax.random.uniform(key)) * ends[-1])

    for prompt, completion in zip(prompts, generate(prompts, seed=seed, iteration=iteration), strict=True):
        expected, _ = slow_text(prompt, functools.partial(choose, item_number(prompt.item_id)))
        assert completion.tokens.tolist() == expected


def test_best_of_one_is_greedy():
    best_of_one = texts(generate(PROMPTS, top_k=1))
    assert best_of_one == texts(generate(PROMPTS, temperature=0.0))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_draws_the_same_tokens_in_any_batch_and_order(batch):
    expected = generate(PROMPTS)
    assert len({tuple(text) for text in texts(expected)}) == len(PROMPTS)
    found = generate(PROMPTS[::-1], batch=batch)[::-1]
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_tpus_form_of_weights_and_cache_draws_the_same_tokens(monkeypatch):
    """Rows begin and end within the chunks after which their cache is written there."""
    prompts, expected = samples(3), generate(samples(3))
    monkeypatch.setattr(engine_module, "for_rollouts", rollouts_on("tpu"))
    for a, b in zip(expected, generate(prompts), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_the_rows_beside_a_row_have_no_say():
    others = prompts_of([6, 8, 8, 1, 2], name="other")
    assert texts(generate(others[:2] + PROMPTS[:3] + others[2:]))[2:5] == texts(generate(PROMPTS))[:3]


def test_samples_iterations_and_seeds_draw_anew_and_a_repeat_does_not():
    twice = [prompt._replace(sample=1) for prompt in PROMPTS]
    runs = [generate(PROMPTS), generate(twice), generate(PROMPTS, iteration=1), generate(PROMPTS, seed=1)]
    for row in zip(*map(texts, runs), strict=True):
        assert len({tuple(text) for text in row}) == 4
    assert texts(generate(twice, iteration=1)) == texts(generate(twice, iteration=1))


def test_logprobs_are_those_of_a_full_forward_at_the_temperature():
    for prompt, completion in zip(PROMPTS, generate(PROMPTS), strict=True):
        assert completion.logprobs.dtype == np.float32 and completion.tokens.dtype == np.int32
        row = [*prompt.tokens, *completion.tokens]
        expected = [next_logprobs(row[:n], TEMPERATURE)[row[n]] for n in range(len(prompt.tokens), len(row))]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_a_row_ends_with_its_first_eos_or_at_max_len():
    prompts = [prompt._replace(sample=sample) for prompt in PROMPTS for sample in range(8)]
    completions = generate(prompts)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert EOS not in completion.tokens[:-1]
        assert completion.finished == (completion.tokens[-1] == EOS)
        if not completion.finished:
            assert len(prompt.tokens) + len(completion.tokens) == MAX_LEN
    assert 5 < sum(completion.finished for completion in completions) < 43


def test_a_row_ends_with_the_first_of_several_end_ids():
    """Cut from rows that nothing ended: what a draw is does not depend on what may end the row."""
    prompts = [prompt._replace(sample=sample) for prompt in PROMPTS for sample in range(8)]
    ends, seen = {EOS, 40, 7}, set()
    for endless, completion in zip(generate(prompts, eos=-1), generate(prompts, eos=ends), strict=True):
        tokens = endless.tokens.tolist()
        length = next((i for i, token in enumerate(tokens, 1) if token in ends), len(tokens))
        assert completion.tokens.tolist() == tokens[:length]
        assert completion.finished == (tokens[length - 1] in ends)
        seen |= {tokens[length - 1]} & ends
    assert seen == ends


def test_a_lower_max_len_cuts_the_same_text():
    for short, long in zip(generate(PROMPTS, max_len=18), generate(PROMPTS), strict=True):
        np.testing.assert_array_equal(short.tokens, long.tokens[: len(short.tokens)])
        assert len(short.tokens) == len(long.tokens) or not short.finished


def test_a_prompt_that_fills_max_len_gets_an_empty_completion():
    prompts = prompts_of([5, 4, 3, 8])
    sizes = [len(completion.tokens) for completion in generate(prompts, max_len=4)]
    assert sizes == [0, 0, 1, 0]
    (empty,) = generate(prompts[:1], max_len=5)
    assert not empty.finished and empty.tokens.dtype == np.int32 and empty.logprobs.dtype == np.float32


def test_item_numbers_are_the_first_31_bits_of_sha256():
    digest = hashlib.sha256(b"gsm8k_0").hexdigest()
    assert item_number("gsm8k_0") == int(digest[:8], 16) // 2 < 2**31


def columns(x, n: int):
    """The same n times: [V,n]."""
    return jnp.broadcast_to(x[:, None], (len(x), n))


def grid(n: int) -> np.ndarray:
    """n uniform numbers that cover (0,1] evenly, so that counts are exact but for the ends of each token's share."""
    return ((np.arange(n) + 0.5) / n).astype(np.float32)


@pytest.mark.parametrize("vocab", [7, 256, 600])
def test_inverse_cdf_gives_each_token_its_share(vocab):
    logits = np.random.default_rng(vocab).normal(0, 2, vocab).astype(np.float32)
    tokens, total = pick(columns(np.exp(logits), 10000), grid(10000))
    np.testing.assert_allclose(total, np.exp(logits).sum(), rtol=1e-5)
    share = np.bincount(np.asarray(tokens), minlength=vocab) / 10000
    np.testing.assert_allclose(share, np.exp(logits) / np.exp(logits).sum(), atol=1.5e-4)


def test_inverse_cdf_never_draws_a_token_of_probability_0():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (9000, 1300)).astype(np.float32)
    logits[generator.random(logits.shape) < 0.95] = -np.inf
    logits[:, 256:512] = -np.inf
    extremes = np.array([1.0, 1 - 2.0**-24, 2.0**-24], np.float32)
    uniform = np.concatenate([np.repeat(extremes, 2000), grid(3000)])
    tokens, _ = pick(np.exp(logits.T), uniform)
    assert np.isfinite(logits[np.arange(9000), tokens]).all()


@pytest.mark.parametrize("what", ["item", "sample", "token"])
def test_draws_of_different_identity_are_independent(what):
    """Frequencies over many items, samples or positions are those of softmax, within 5 sigma."""
    n, temperature = 20000, 0.8
    logits = np.random.default_rng(3).normal(0, 1.5, 300).astype(np.float32)
    zeros, numbers = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    items, samples, t = (numbers if what == varied else zeros for varied in ("item", "sample", "token"))
    keys = row_keys(jax.random.key(0), 0, items, samples)
    tokens, logprobs = draw_all(columns(logits, n), keys, t, temperature=temperature, top_k=0)
    p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    sigma = np.sqrt(n * p * (1 - p))
    assert np.all(np.abs(np.bincount(tokens, minlength=300) - n * p) < 5 * sigma + 1)
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)


def test_top_k_draws_from_the_k_best_and_reports_the_whole_distribution():
    n, k = 4000, 5
    logits = np.random.default_rng(4).normal(0, 1, 61).astype(np.float32)
    keys = row_keys(jax.random.key(0), 0, np.zeros(n, np.int32), np.arange(n, dtype=np.int32))
    t = np.zeros(n, np.int32)
    tokens, logprobs = draw_all(columns(logits, n), keys, t, temperature=1.0, top_k=k)
    best = np.argsort(logits)[-k:]
    p = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(logprobs, np.log(p)[tokens], atol=1e-5)
    kept = np.where(np.isin(np.arange(61), best), p, 0) / p[best].sum()
    counts = np.bincount(tokens, minlength=61)
    assert np.all(np.abs(counts - n * kept) <= 5 * np.sqrt(n * kept * (1 - kept)))  # 0 off the best


def samples(n: int) -> list[Prompt]:
    return [prompt._replace(sample=sample) for prompt in PROMPTS for sample in range(n)]


@pytest.mark.parametrize("slots", [1, 7, 64])
def test_the_number_of_slots_changes_no_token(slots):
    expected = texts(generate(samples(3), batch=16))
    assert len({tuple(text) for text in expected}) > 12
    assert texts(generate(samples(3), batch=slots)) == expected


def test_what_is_left_after_a_stop_in_the_middle_draws_the_same():
    expected = generate(samples(3))
    left = [i for i in range(18) if i % 5]  # the others had ended
    again = generate([samples(3)[i] for i in left])
    assert texts(again) == [expected[i].tokens.tolist() for i in left]


def counted(prompts, limits, slots: int) -> tuple[Engine, list[Completion]]:
    """Rows of given lengths (there is no EOS) and the engine with its counts."""
    engine = Engine(MODEL, make_mesh(1, 1, 1), slots=slots, pad_multiple=8, eos_id=-1, seed=0)
    found = dict(engine.generate(LM, prompts, max_len=limits, temperature=1.0))
    return engine, [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("tpu", [False, True])
def test_rows_across_blocks_of_keys_have_the_logprobs_of_a_full_forward(monkeypatch, tpu):
    """Prompts in one block and in two, rows that end before, at and after a block's end, one of them where its cache
    is full while another goes on, and a cache that grows twice."""
    monkeypatch.setattr(engine_module, "for_rollouts", rollouts_on("tpu" if tpu else "cpu"))
    prompts, limits = prompts_of([60, 70, 5, 63, 64, 1], name="long"), [65, 190, 64, 100, 128, 129]
    _, completions = counted(prompts, limits, slots=2)
    assert [len(p.tokens) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)] == limits
    rows = np.zeros((len(prompts), max(limits)), np.int32)
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        text = np.concatenate([prompt.tokens, completion.tokens])
        row[: len(text)] = text
    full = np.asarray(all_logprobs(rows))
    for row, prompt, completion, limit in zip(range(len(prompts)), prompts, completions, limits, strict=True):
        at = np.arange(len(prompt.tokens), limit)
        np.testing.assert_allclose(completion.logprobs, full[row, at - 1, completion.tokens], atol=2e-5)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_prompt_is_prefilled_once_however_many_samples_it_has(n):
    prompts = samples(n)
    engine, completions = counted(prompts, MAX_LEN, slots=4)  # fewer slots than samples
    assert engine.counts["prompts"] == len(PROMPTS)
    assert engine.counts["prompt_tokens"] == sum(len(prompt.tokens) for prompt in PROMPTS)
    assert engine.counts["tokens"] == sum(len(completion.tokens) for completion in completions)


def test_slots_are_busy_as_long_as_requests_wait():
    lengths = np.random.default_rng(5).integers(1, 40, 300)
    prompts = prompts_of([4] * 300)
    engine, completions = counted(prompts, 4 + lengths, slots=16)
    assert [len(completion.tokens) for completion in completions] == lengths.tolist()
    assert engine.counts["queue_tokens"] >= 0.9 * engine.counts["queue_slot_steps"]


def test_the_last_rows_do_not_pay_for_empty_slots():
    prompts = prompts_of([4] * 64)
    limits = [100] + [12] * 63
    engine, _ = counted(prompts, limits, slots=64)
    assert engine.counts["steps"] == 96
    assert engine.counts["slot_steps"] <= 64 * 16 + 8 * 96


def test_the_last_rows_leave_one_by_one():
    """A completion comes out when its row has ended, so that its program can run while the others decode."""
    engine = Engine(MODEL, make_mesh(1, 1, 1), slots=8, pad_multiple=8, eos_id=-1, seed=0)
    lengths = [3, 9, 1, 7, 14, 5, 11, 2]
    rows = engine.generate(LM, prompts_of([4] * 8), max_len=[4 + length for length in lengths], temperature=1.0)
    steps = {i: engine.counts["steps"] for i, _ in rows}
    assert [steps[i] for i in range(8)] == lengths


def test_a_second_rollout_compiles_nothing():
    def prompts(seed):
        lengths = np.random.default_rng(seed).permutation([3, 8, 1, 5, 8, 2, 7, 7, 6, 4] * 3)
        return prompts_of(lengths, name=f"seed{seed}")

    limits = np.resize([30, 9, 14, 22], 30)
    counted(prompts(0), limits, slots=16)
    before = compiles()
    counted(prompts(1), limits[::-1].copy(), slots=16)
    assert compiles() == before
