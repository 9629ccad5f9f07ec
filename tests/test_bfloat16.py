"""Products of bfloat16 arrays: their gradients, and that every one is summed in float32."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_rows import MODEL, PARAMS, packed, prepared
from tiny import tiny_model

from reft_jax.engine import slots
from reft_jax.model.attention import attend_causally
from reft_jax.model.llama import logits_of, project
from reft_jax.model.rollout_weights import RolloutModel
from reft_jax.train.scoring import make_scorer
from reft_jax.types import PPOBatch

rng = np.random.default_rng(0)


def arrays(*shapes):
    """float32 arrays whose numbers bfloat16 holds exactly."""
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(jnp.float32) for shape in shapes]


def slow_attention(q, k, v):
    """q [B,T,N,H], k [B,K,H,T], v [B,K,T,H]: einsum over whole score matrices."""
    heads, length = q.shape[2] // k.shape[1], q.shape[1]
    k, v = (jnp.repeat(x, heads, axis=1) for x in (k, v))
    scores = jnp.einsum("BTNH,BNHS->BNTS", q, k) / np.sqrt(q.shape[-1])
    seen = np.tril(np.ones((length, length), bool))
    return jnp.einsum("BNTS,BNSH->BTNH", jax.nn.softmax(jnp.where(seen, scores, -1e30), -1), v)


def attention(q, k, v):
    return attend_causally(q, k, v, jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))[None])


CASES = {
    "project": (
        lambda x, *ws: jnp.concatenate(project(x, *ws), -1),
        lambda x, *ws: jnp.concatenate([x @ w for w in ws], -1),
        [(2, 6, 16), (16, 8), (16, 4)],
    ),
    "logits, tied": (lambda x, w: logits_of(x, w, "VD"), lambda x, w: x @ w.T, [(2, 6, 16), (40, 16)]),
    "logits, untied": (lambda x, w: logits_of(x, w, "DV"), lambda x, w: x @ w, [(2, 6, 16), (16, 40)]),
    "attention": (attention, slow_attention, [(2, 6, 4, 8), (2, 2, 8, 6), (2, 2, 6, 8)]),
    "attention, odd": (attention, slow_attention, [(2, 5, 3, 8), (2, 1, 8, 5), (2, 1, 5, 8)]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_float32_rounded(name):
    ours, plain, shapes = CASES[name]
    inputs = arrays(*shapes)
    half = [x.astype(jnp.bfloat16) for x in inputs]
    value, back = jax.vjp(ours, *half)
    exact, exact_back = jax.vjp(plain, *inputs)
    [cotangent] = arrays(exact.shape)
    found, wanted = back(cotangent.astype(value.dtype)), exact_back(cotangent)
    for one, other in zip((value, *found), (exact, *wanted), strict=True):
        error = np.abs(np.asarray(one, np.float32) - other).max() / np.abs(other).max()
        assert error < 0.02  # bfloat16 keeps 8 bits; a wrong axis or a missing factor gives 0.5 and more
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}


def products(lowered) -> set[str]:
    """The types of the matrix products in StableHLO: "operands -> result", element types only."""
    types = re.findall(r"stablehlo\.dot_general .*: \((.*), (.*)\) -> (.*)", lowered.as_text())
    return {" ".join(re.search(r"(bf16|f32)>", one)[1] for one in line) for line in types}


def test_every_product_is_summed_in_float32():
    """Else XLA's CPU backend does not use the machine's bfloat16 instructions: an update takes five times as long."""
    half, rows = MODEL.clone(dtype=jnp.bfloat16), packed()
    step, fresh = prepared("ppo", model=half)
    batch = PPOBatch(*[np.zeros(rows.lines.decisions.shape, np.float32)] * 5)
    update = step.lower(fresh(), (rows.lines, batch), rows.count)
    scoring = make_scorer(half, 1.0).lower(PARAMS, rows.lines, rows.count)
    model, lm = tiny_model()
    rollout = RolloutModel(model.config, jnp.bfloat16, "cpu")
    weights, state = slots.rollout_weights(rollout, lm), slots.empty_slots(rollout, 2, 64, 64)
    sampling = {"eos_ids": (1,), "temperature": 1.0, "top_k": 0}
    decoding = slots.decode.lower(rollout, weights, state, jax.random.key(0), 0, 1, 2, **sampling)
    for lowered in (update, scoring, decoding):
        found = products(lowered)
        assert "bf16 bf16 f32" in found
        assert found <= {"bf16 bf16 f32", "f32 f32 f32"}  # the value head computes in float32


@pytest.mark.parametrize(("platform", "asked"), [("cpu", "float32"), ("tpu", "bfloat16")])
def test_a_tpu_is_asked_for_bfloat16_products(platform, asked):
    """It sums in float32 all the same, and what goes over the tensor axis has half the bytes."""
    device = jax.sharding.AbstractDevice(platform, 1, platform)

    def products_and_gradients(x, *weights):
        found, back = jax.vjp(project, x, *weights)
        return back(found)

    half = [x.astype(jnp.bfloat16) for x in arrays((2, 6, 16), (16, 8), (16, 4))]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)):
        jaxpr = str(jax.make_jaxpr(products_and_gradients)(*half))
    assert re.findall(r"preferred_element_type=(\w+)", jaxpr) == [asked] * 6
