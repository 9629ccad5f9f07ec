"""Rollouts in int8: the table of one quantization by hand, and the engine against a slow version in NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import rollouts_on, tiny_config, tiny_model

from reft_jax.config import default_config
from reft_jax.engine import generate, slots
from reft_jax.model.lora import LORA_A, LORA_B, merged
from reft_jax.model.quantized import Quantized, matmul, quantize, turned
from reft_jax.model.rollout_weights import RolloutModel, rollout_layer
from reft_jax.parallel.mesh import make_mesh
from reft_jax.types import InputError, Prompt

MODEL, LM = tiny_model(num_kv_heads=2, qkv_bias=True)
CONFIG = MODEL.config
MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # axes that a product sums over
BOTH = ("weights", "cache")


@pytest.mark.parametrize(
    ("numbers", "scale", "q"),
    [
        ([127, -64, 1], 1, [127, -64, 1]),
        ([-254, 1, 3], 2, [-127, 0, 2]),  # 0.5 and 1.5 are rounded to even
        ([0.5, -0.25, 0], 0.5 / 127, [127, -64, 0]),  # -63.5 too
        ([0, 0, 0], 1, [0, 0, 0]),
    ],
)
def test_one_quantization_by_hand(numbers, scale, q):
    found = quantize(jnp.array([numbers], jnp.bfloat16), axis=1)
    assert (found.q.dtype, found.scale.dtype) == (jnp.int8, jnp.float32) and found.scale.shape == (1,)
    assert found.scale[0] == np.float32(scale) and found.q.tolist() == [q]
    np.testing.assert_array_equal(found.numbers(1, jnp.float32), np.float32(scale) * np.array([q], np.float32))
    other = quantize(jnp.array([numbers]).T, axis=0)
    assert other.scale.shape == (1,) and other.q[:, 0].tolist() == q


def test_what_is_no_number_is_not_hidden():
    for spoilt in (np.nan, np.inf):
        found = quantize(jnp.array([[1, spoilt], [2, 4]]), axis=1)
        assert not np.isfinite(found.numbers(1, jnp.float32)[0]).any() and found.q[1].tolist() == [64, 127]


def test_a_product_by_hand_on_both_sides():
    """[[1, 2], [-3, 0.5]] with scales 0.5 and 2 of its outputs."""
    x, q, scale = jnp.array([[1.0, 2.0], [-3.0, 0.5]]), jnp.array([[2, -4], [10, 1]], jnp.int8), jnp.array([0.5, 2.0])
    expected = [[11, -4], [-0.5, 25]]
    assert matmul(x, Quantized(q, scale)).tolist() == expected
    assert matmul(Quantized(q.T, scale), x.T).T.tolist() == expected
    assert matmul(x.astype(jnp.bfloat16), Quantized(q, scale)).dtype == jnp.float32


def test_a_layer_is_quantized_after_its_adapter_is_merged_one_scale_per_output():
    rng, layers = np.random.default_rng(0), dict(LM["layers"])
    layers["o" + LORA_A] = jnp.asarray(rng.normal(size=(2, 4, 8, 3)), jnp.float32)
    layers["o" + LORA_B] = jnp.asarray(rng.normal(size=(2, 3, 24)), jnp.float32)
    whole = merged({name: x[1] for name, x in layers.items()})
    for tpu in (False, True):
        form = RolloutModel(CONFIG, jnp.bfloat16, "tpu" if tpu else "cpu", ("weights",))
        boxed = jax.eval_shape(functools.partial(rollout_layer, form), layers, 1)
        found = slots.layer_weights(form, layers, 1)
        for name, x in found.items():
            assert isinstance(x, Quantized) == (name in MATRICES)
        o = found["o"] if tpu else turned(found["o"])  # now [inputs, outputs]
        flat = np.asarray(whole["o"]).reshape(32, 24)
        np.testing.assert_allclose(o.scale, np.abs(flat).max(0) / 127, rtol=1e-6)
        assert np.abs(o.numbers(0, jnp.float32) - flat).max() <= 0.501 * o.scale.max()
        assert boxed["q"].q.names == ("heads", "embed")
        assert boxed["q"].scale.names == ("heads",) and found["q"].scale.shape == (32,)
        assert boxed["down"].scale.names == ("embed",)


# --- a slow version: whole rows, NumPy, a quantization of its own


def rounded(x, axes):
    scale = np.abs(x).max(axes, keepdims=True).astype(np.float32) / np.float32(127)
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


def norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def rotated(x):
    """Rotary positions of x [T,heads,8]."""
    angles = np.arange(len(x))[:, None] * CONFIG.rope_theta ** -(np.arange(0, 8, 2) / 8)
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], -1)


def slow_logprobs(parts, tokens) -> np.ndarray:
    """Log-softmax float64[T,V] of the quantized model after each of `tokens`, by a full forward."""
    stacks = jax.tree.map(np.asarray, LM["layers"])
    x, seen = np.asarray(LM["embed"])[tokens], np.tril(np.ones((len(tokens), len(tokens)), bool))
    for i in range(CONFIG.num_layers):
        w = {name: x[i] for name, x in stacks.items()}
        if "weights" in parts:
            w |= {name: rounded(w[name], tuple(range(axes))) for name, axes in MATRICES.items()}
        y = norm(x, w["attention_norm"])
        q, k, v = (np.einsum("TD,DNH->TNH", y, w[name]) + w[f"{name}_bias"] for name in "qkv")
        q, k = rotated(q), rotated(k)
        if "cache" in parts:
            k, v = rounded(k, -1), rounded(v, -1)
        k, v = (np.repeat(z, 2, axis=1) for z in (k, v))
        scores = np.where(seen, np.einsum("TNH,SNH->NTS", q, k) / np.sqrt(8), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads = np.einsum("NTS,SNH->TNH", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("TNH,NHD->TD", heads, w["o"])
        y = norm(x, w["mlp_norm"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"])) @ w["down"]
    logits = norm(x, np.asarray(LM["final_norm"])) @ np.asarray(LM["lm_head"]["kernel"], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sampled(parts, tpu, monkeypatch):
    """Five prompts of which two share their tokens, on four slots: (prompt, completion) each."""
    monkeypatch.setattr(generate, "for_rollouts", rollouts_on("tpu" if tpu else "cpu"))
    engine = generate.Engine(MODEL, make_mesh(1, 1, 1), slots=4, pad_multiple=24, eos_id=-1, seed=0, int8=parts)
    rng, limits = np.random.default_rng(2), [40, 66, 30, 22, 71]
    rows = [rng.integers(0, 61, length).astype(np.int32) for length in (3, 60, 8, 1)]
    prompts = [Prompt(f"toy_{min(i, 3)}", i, rows[min(i, 3)]) for i in range(5)]
    found = dict(engine.generate(LM, prompts, max_len=limits, temperature=1.0))
    assert [len(p.tokens) + len(found[i].tokens) for i, p in enumerate(prompts)] == limits
    return [(prompt, found[i]) for i, prompt in enumerate(prompts)]


def differences(parts, rows) -> np.ndarray:
    """|log π of the rollout − log π of the slow version| of every token drawn."""
    found = []
    for prompt, completion in rows:
        tokens = np.concatenate([prompt.tokens, completion.tokens])
        at = np.arange(len(prompt.tokens), len(tokens))
        found.append(np.abs(slow_logprobs(parts, tokens)[at - 1, completion.tokens] - completion.logprobs))
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("parts", "tpu"), [(("weights",), False), (("cache",), True), (BOTH, False), (BOTH, True)], ids=str
)
def test_logprobs_are_those_of_the_quantized_models_own_full_forward(parts, tpu, monkeypatch):
    """Keys and values of both differ by rounding. Where such a number lies between two of int8, they take one each."""
    rows = sampled(parts, tpu, monkeypatch)
    apart = differences(parts, rows)
    assert np.quantile(apart, 0.9) < 1e-4 and apart.max() < (0.03 if "cache" in parts else 1e-4)
    assert differences((), rows).mean() > 20 * apart.mean()  # the unquantized model gives others


def test_an_int8_cache_is_refused_for_keys_with_biases():
    config = default_config()
    config.engine.weights = "int8"
    generate.check_cache(config, CONFIG)
    config.engine.cache = "int8"
    generate.check_cache(config, tiny_config())
    with pytest.raises(InputError, match=r'engine.cache="int8" loses too much with a llama model, .* leave it empty'):
        generate.check_cache(config, CONFIG)


def converted(parts, tpu) -> set[tuple[int, ...]]:
    """The sizes, sorted, of the int8 arrays that a decode step makes floating."""
    model = RolloutModel(CONFIG, jnp.bfloat16, "tpu" if tpu else "cpu", parts)
    sampling = {"eos_ids": (1,), "temperature": 1.0, "top_k": 0}
    weights = jax.eval_shape(lambda lm: slots.rollout_weights(model, lm), LM)
    state = jax.eval_shape(lambda: slots.empty_slots(model, 2, 64, 64))
    text = slots.decode.lower(model, weights, state, jax.random.key(0), 0, 1, 2, **sampling).as_text()
    shapes = re.findall(r"convert .*\(tensor<([\dx]+)xi8>\) -> tensor<\S+x(?:bf16|f32)>", text)
    return {tuple(sorted(map(int, shape.split("x")))) for shape in shapes}


def test_nothing_is_int8_unless_asked_for():
    matrices = {(16, 24), (24, 32), (24, 40)}
    for tpu in (False, True):
        assert converted((), tpu) == set() and converted(("weights",), tpu) == matrices
        cached = converted(("cache",), tpu)
        assert cached and not matrices & cached
