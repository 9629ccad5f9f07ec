"""The model against slower ways to compute the same thing."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config, tiny_model

from reft_jax.engine import slots as programs
from reft_jax.engine.slots import rollout_weights
from reft_jax.model import attention
from reft_jax.model import decode as forms
from reft_jax.model.cache import BLOCK, KVCache, grow, in_blocks, init_cache, init_recent, join, write
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.llama import Block, Llama, project, rms_norm, rope_tables
from reft_jax.model.llama_config import LlamaConfig
from reft_jax.model.rollout_weights import RolloutModel

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 61, (3, 9)))


@functools.partial(jax.jit, static_argnames="model")
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames=("model", "length"))
def prefill(model, params, tokens, length):
    """The cache of `length` positions after the tokens; `model` and `params` are those of rollouts."""
    return tuple(grow(layer, length) for layer in forms.prefill(model, params, tokens))


@functools.partial(jax.jit, static_argnames="model")
def decode(model, params, tokens, at, cache):
    logits, cache = forms.step_in_place(model, params, tokens, at, cache)
    return logits.T, cache


@functools.partial(jax.jit, static_argnames="model")
def decode_beside(model, params, tokens, begin, step, cache, recent):
    logits, recent = forms.step_beside(model, params, tokens, begin, step, cache, recent)
    return logits.T, recent


@jax.jit
def join_all(cache, recent, begin, count):
    return tuple(join(old, new, begin, count) for old, new in zip(cache, recent, strict=True))


def unrolled(model, params, tpu=False):
    model = RolloutModel(model.config, model.dtype, "tpu" if tpu else "cpu")
    return model, rollout_weights(model, params)


def ragged(tied: bool, room: int, tpu: bool):
    """Three rows prefilled to 5, of which 3, 5 and 1 count (what padding wrote is overwritten unseen): what a rollout
    takes, the cache, those lengths, and the logits of the full forward."""
    model, params = tiny_model(tie_embeddings=tied)
    rollout = unrolled(model, params, tpu)
    cache = prefill(*rollout, TOKENS[:, :5], length=room)
    return rollout, cache, np.array([3, 5, 1]), forward(model, params, TOKENS)


@pytest.mark.parametrize(("tied", "room"), [(False, 2 * BLOCK), (True, BLOCK)])
def test_prefill_and_ragged_decode_equal_the_full_forward(tied, room):
    rollout, cache, lengths, full = ragged(tied, room, tpu=False)
    for _ in range(4):
        logits, cache = decode(*rollout, TOKENS[np.arange(3), lengths], lengths, cache)
        np.testing.assert_allclose(logits, full[np.arange(3), lengths], atol=1e-5)
        lengths = lengths + 1


@pytest.mark.parametrize(("tied", "room"), [(False, 12), (True, 9)])
def test_prefill_and_ragged_decode_of_a_tpu_equal_the_full_forward(tied, room):
    rollout, cache, lengths, full = ragged(tied, room, tpu=True)
    for _ in range(2):
        begin, recent = lengths, init_recent(tiny_config(), 3, 2)
        for step in range(2):
            logits, recent = decode_beside(*rollout, TOKENS[np.arange(3), lengths], begin, step, cache, recent)
            np.testing.assert_allclose(logits, full[np.arange(3), lengths], atol=1e-5)
            lengths = lengths + 1
        cache = join_all(cache, recent, begin, jnp.full(3, 2))


def test_joining_writes_what_was_drawn_inside_the_cache_and_nothing_else():
    rng, begin, count = np.random.default_rng(0), [1, 4, 5, 2], [2, 0, 3, 3]
    k, v, k_new, v_new = (rng.normal(size=(4, *shape)).astype(np.float32) for shape in ((2, 5, 6), (2, 6, 5)) * 2)
    k_new, v_new = k_new.swapaxes(2, 3)[:, :, :3], v_new[:, :, :3]
    found = jax.jit(join)(KVCache(k, v), KVCache(k_new, v_new), jnp.array(begin), jnp.array(count))
    k, v = k.copy(), v.copy()  # the program may read the arrays themselves, and later than this line
    for row in range(4):
        for i in range(count[row]):
            if begin[row] + i < 6:
                k[row, :, :, begin[row] + i], v[row, :, begin[row] + i] = k_new[row, :, i], v_new[row, :, i]
    np.testing.assert_array_equal(found.k, k)
    np.testing.assert_array_equal(found.v, v)


def test_blocks_hold_the_keys_in_order_and_grow():
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, BLOCK + 6), (2, 3, BLOCK + 6, 4)))
    found = grow(in_blocks(KVCache(k, v)), 4 * BLOCK)
    assert found.length == 4 * BLOCK and found.k.shape == (2, 3, 4, 4, BLOCK)
    np.testing.assert_array_equal(found.k[:, :, 1, :, :6], k[..., BLOCK:])
    for got, want, axis in ((np.concatenate(np.moveaxis(found.k, 2, 0), -1), k, 3), (found.v, v, 2)):
        held, rest = np.split(got, [BLOCK + 6], axis)
        np.testing.assert_array_equal(held, want)
        assert not rest.any()


def test_a_row_is_written_at_its_position_and_nowhere_past_the_end():
    """Row 0 in the last block, row 1 at the first place past it, where an ended row may stand."""
    (before,) = init_cache(tiny_config(num_layers=1), 2, 2 * BLOCK, jnp.float32, blocks=True)
    k, v = jnp.ones((2, *before.k.shape[1:4:2])), 2 * jnp.ones((2, *before.k.shape[1:4:2]))
    at = jnp.array([BLOCK + 3, 2 * BLOCK])
    after = jax.jit(write)(before, at, k, v)
    want = KVCache(np.zeros(before.k.shape), np.zeros(before.v.shape))
    want.k[0, :, 1, :, 3], want.v[0, :, BLOCK + 3] = 1, 2
    for got, expected in zip(after, want, strict=True):
        np.testing.assert_array_equal(got, expected)


def slow_attention(q, k, v, seen):
    """One row's heads [N,H] in float64, a head at a time: k [K,H,S], v [K,S,H], seen bool[S]."""
    out = np.zeros(q.shape)
    for head, query in enumerate(q):
        group = head * len(k) // len(q)
        weights = np.exp(query @ k[group][:, seen] * len(query) ** -0.5)
        out[head] = weights @ v[group][seen] / weights.sum()
    return out


@pytest.mark.parametrize(("dtype", "atol"), [(np.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize(("kv_heads", "blocks"), [(1, True), (2, True), (2, False), (6, True), (6, False)])
def test_attention_of_one_token_equals_its_slow_twin(dtype, atol, kv_heads, blocks):
    """To three blocks; and to two parts as on a TPU, of the first of which one row sees nothing and another all."""
    rng, length = np.random.default_rng(0), 3 * BLOCK
    shapes = (4, 6, 8), (4, kv_heads, 8, length), (4, kv_heads, length, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    seen = rng.random((4, length)) < 0.3
    seen[0, : length - 5], seen[1, : length - 5], seen[:, -1] = False, True, True
    if blocks:
        found = jax.jit(attention.attend)(q, *in_blocks(KVCache(k, v)), seen)
    else:
        parts = [(k[..., at], v[:, :, at], seen[:, at]) for at in (slice(length - 5), slice(length - 5, None))]
        found = jax.jit(attention.attend_parts)(q, *parts)
    assert found.dtype == dtype
    want = [slow_attention(*row) for row in zip(*(np.asarray(x, float) for x in (q, k, v)), seen, strict=True)]
    np.testing.assert_allclose(np.asarray(found, float), want, atol=atol)


def test_decoding_never_copies_the_cache():
    """A chunk of steps writes where it lies, a TPU's step only reads: there is room for a layer, not for the whole."""
    tiny, zeros = tiny_model(num_layers=8), jnp.zeros(4, jnp.int32)
    model, params = unrolled(*tiny)
    slots = programs.empty_slots(model, 4, 16, 512)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(slots.cache))
    settings = {"eos_ids": (-1,), "temperature": 1.0, "top_k": 0}
    lowered = programs.decode.lower(model, params, slots, jax.random.key(0), 0, 16, 4, **settings)
    chunk = lowered.compile().memory_analysis()
    assert chunk.alias_size_in_bytes >= size and chunk.temp_size_in_bytes < size / 8
    model, params = unrolled(*tiny, tpu=True)
    cache, recent = init_cache(model.config, 4, 512, jnp.float32, blocks=False), init_recent(model.config, 4, 2)
    step = decode_beside.lower(model, params, TOKENS[0, :4], zeros, 0, cache, recent).compile()
    assert step.memory_analysis().temp_size_in_bytes < size / 2


def test_a_cache_of_half_the_size_costs_only_precision():
    model, params = tiny_model()
    rollout = unrolled(model, params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), prefill(*rollout, TOKENS[:, :8], length=BLOCK))
    logits, after = decode(*rollout, TOKENS[:, 8], jnp.full(3, 8), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(logits, forward(model, params, TOKENS)[:, 8], atol=0.1)


def test_rows_in_one_line_do_not_see_each_other():
    """Three texts one after another, the last of them padding, give what each gives alone."""
    model, params = tiny_model()
    lengths, line = (4, 3, 2), np.concatenate([TOKENS[0, :4], TOKENS[1, :3], TOKENS[2, :2]])[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat([1, 2, 0], lengths)[None]
    together = jax.jit(lambda *xs: model.apply({"params": params}, *xs, method="hidden"))(line, positions, segments)
    alone = jax.jit(lambda tokens: model.apply({"params": params}, tokens, method="hidden"))(TOKENS)
    for row, (begin, n) in enumerate(((0, 4), (4, 3), (7, 2))):
        np.testing.assert_allclose(together[0, begin : begin + n], alone[row, :n], atol=1e-5)


@pytest.mark.parametrize("block", [1, 4, 9])
def test_blocks_of_queries_see_what_the_whole_row_does(monkeypatch, block):
    """Output and gradient, with segments that begin inside a block."""
    model, params = tiny_model()
    positions, segments = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1]] * 3), np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * 3)

    def loss(params):
        return jnp.sum(PROBE * model.apply({"params": params}, TOKENS, positions, segments, method="hidden"))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    jax.clear_caches()
    found = jax.jit(jax.value_and_grad(lambda params: loss(params)))(params)
    for want, got in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()) + 1e-6)
    jax.clear_caches()


def looped_hidden(model, params, tokens):
    """The slow twin of `hidden`: a Python loop over the layers, no scan, no remat."""
    index = jnp.arange(tokens.shape[1])
    tables = rope_tables(model.config, index[None])
    mask = jnp.tril(jnp.ones((index.size, index.size), bool))[None]
    x = params["embed"][tokens]
    for layer in range(model.config.num_layers):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        x, _ = Block(model.config, model.dtype).apply({"params": own}, x, tables, mask)
    return rms_norm(x, params["final_norm"], model.config.rms_norm_eps)


PROBE = np.random.default_rng(2).normal(size=(*TOKENS.shape, tiny_config().hidden_size)).astype(np.float32)


@functools.cache
def looped_gradients():
    model, params = tiny_model()
    return jax.jit(jax.grad(lambda p: jnp.sum(PROBE * looped_hidden(model, p, TOKENS))))(params)


def test_the_gradients_of_products_with_one_input_are_those_of_jax():
    rng = np.random.default_rng(3)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 6), (6, 4), (6, 3))]
    found, back = jax.vjp(project, *arrays)
    _, plain = jax.vjp(lambda x, *weights: tuple(x @ weight for weight in weights), *arrays)
    for got, want in zip(back(found), plain(found), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_remat_computes_again():
    """Products in the gradient of a scanned layer: two of attention, or also those with weights but the last."""
    model, params = tiny_model()

    def products(remat: str) -> int:
        ours = model.clone(remat=remat)
        return jax.jit(jax.grad(lambda p: forward(ours, p, TOKENS).sum())).lower(params).as_text().count("dot_general")

    assert (products("dots") - products("none"), products("full") - products("none")) == (2, 2 + 6)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scan_and_remat_change_no_gradient(remat):
    model, params = tiny_model()
    ours = model.clone(remat=remat)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(PROBE * ours.apply({"params": p}, TOKENS, method="hidden"))))(params)
    assert float(jnp.abs(grads["layers"]["q"]).max()) > 1e-3
    for path, want in jax.tree.leaves_with_path(looped_gradients()):
        got = functools.reduce(lambda tree, key: tree[key.key], path, grads)
        np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()) + 1e-7, err_msg=str(path))


def test_rows_and_later_tokens_do_not_leak():
    model, params = tiny_model()
    full = forward(model, params, TOKENS)
    changed = forward(model, params, TOKENS.at[0, 6].add(1).at[1].add(1) % 61)
    np.testing.assert_array_equal(full[0, :6], changed[0, :6])
    np.testing.assert_array_equal(full[2], changed[2])
    assert np.abs(full[0, 6:] - changed[0, 6:]).min() > 0


def test_compute_dtype_is_bfloat16_and_logits_are_float32():
    model, params = tiny_model()
    half = model.clone(dtype=jnp.bfloat16)
    hidden = jax.eval_shape(lambda p: half.apply({"params": p}, TOKENS, method="hidden"), params)
    logits = forward(half, params, TOKENS)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(model, params, TOKENS), atol=0.15)


def test_fresh_parameters_are_small_float32_and_differ_between_layers():
    model = Llama(tiny_config(hidden_size=64))
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), TOKENS))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    q = np.asarray(params["layers"]["q"])
    np.testing.assert_allclose(q.std(axis=(1, 2, 3)), 0.02, rtol=0.1)
    assert np.abs(q[0] - q[1]).mean() > 0.01
    np.testing.assert_array_equal(params["layers"]["mlp_norm"], np.ones((2, 64)))


def test_every_parameter_and_cache_axis_is_named():
    heads = {"value": ValueHead(), "rerank": RerankHead()}
    boxed = {name: jax.eval_shape(head.init, jax.random.key(0), jnp.zeros((2, 8))) for name, head in heads.items()}
    boxed["lm"] = jax.eval_shape(Llama(tiny_config()).init, jax.random.key(0), TOKENS)
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert len(leaves) == 3 + 12
    for path, leaf in leaves:
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == leaf.value.ndim and None not in leaf.names, path
    assert boxed["lm"]["params"]["layers"]["q"].names == ("layers", "embed", "heads", "head_dim")
    for blocks in (False, True):
        layer = init_cache(tiny_config(), 3, BLOCK, jnp.float32, blocks=blocks)[0]
        assert [x.ndim for x in layer] == [len(axes) for axes in layer.axes]


def test_codellama_7b_has_its_published_size():
    config = LlamaConfig(32016, 4096, 11008, 32, 32, 32, 128, rope_theta=1e6, max_position_embeddings=16384)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), TOKENS)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6_738_546_688


def test_value_head_by_hand():
    head = {"weight": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array(0.25)}
    hidden = jnp.array([[[2.0, 1.0, 4.0], [0.0, 1.0, 0.0]]], jnp.bfloat16)
    value = ValueHead().apply({"params": head}, hidden)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, [[2.25, -1.75]])  # 2 - 2 + 2 + 0.25 and -2 + 0.25


def test_heads_start_as_the_method_says():
    hidden = jnp.zeros((2, 400))
    value = nn.unbox(ValueHead().init(jax.random.key(0), hidden))["params"]
    assert 0.045 < float(jnp.abs(value["weight"]).max()) <= 0.05 and abs(float(value["bias"])) <= 0.05
    rerank = nn.unbox(RerankHead().init(jax.random.key(0), hidden))["params"]
    assert rerank["weight"].shape == (400, 2)
    np.testing.assert_allclose(jnp.std(rerank["weight"]), 0.02, rtol=0.1)


def test_importing_the_package_imports_no_jax():
    code = "import sys, reft_jax; reft_jax.__version__; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
