"""LoRA: adapters against a slow version, what is trained and saved, merged rollouts, every stage, PEFT."""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_rows import LENGTH, MASK, packed
from test_groups import noisy, of_two
from tiny import drawn, tiny_model

from reft_jax import save_hf
from reft_jax.config import check_config, default_config, load_config
from reft_jax.model.llama import LORA_B
from reft_jax.model.lora import (
    Lora,
    abstract_adapter,
    has_adapter,
    joined,
    make_lora,
    merged_model,
    trained,
)
from reft_jax.model.rollout_weights import RolloutModel, rollout_layer
from reft_jax.parallel.mesh import make_mesh, on_mesh, unboxed
from reft_jax.plan.functions import RunFunctions
from reft_jax.stages.models import checksum, load_model, new_adapter
from reft_jax.train.checkpoints import save_params
from reft_jax.train.iteration import Iteration
from reft_jax.train.scoring import decision_loss, hidden_states
from reft_jax.train.state import abstract_params, init_adapter, make_optimizer, new_state, state_shardings
from reft_jax.train.steps import make_step, sft_loss
from reft_jax.types import InputError

ALL = ("q", "k", "v", "o", "gate", "up", "down")
LORA = Lora(3, 6.0, ALL)
MODEL, BASE = tiny_model(tie_embeddings=True)
SHAPES = abstract_params(MODEL)
ADAPTER = drawn(unboxed(abstract_adapter(LORA, SHAPES["lm"])), seed=1)
TOKENS = np.arange(14).reshape(2, 7) * 3 % 61


@functools.cache
def logits():
    return jax.jit(lambda lm: MODEL.apply({"params": lm}, TOKENS))


def test_an_adapter_with_b_zero_is_the_base_bit_for_bit():
    fresh = init_adapter(make_mesh(1, 1, 1), LORA, SHAPES["lm"], seed=0)
    for name, x in fresh.items():
        if name.endswith(LORA_B):
            assert not x.any()
        else:  # as PEFT draws it: kaiming_uniform with a = √5, of the inputs of the matrix
            bound = np.prod(x.shape[1:-1]) ** -0.5
            assert 0.8 * bound < np.abs(x).max() <= bound and np.abs(x.mean()) < 0.2 * bound
    np.testing.assert_array_equal(logits()(joined(BASE, fresh, LORA)), logits()(BASE))
    merged = merged_model(jax.tree.map(jnp.array, joined(BASE, fresh, LORA)))
    jax.tree.map(np.testing.assert_array_equal, merged, BASE)


def slow(adapter, lora=LORA):
    """The base plus A B · alpha / rank, by NumPy's rules and with no name of model/lora.py."""
    layers = dict(BASE["layers"])
    for name in lora.targets:
        a, b = adapter[f"{name}_lora_a"], adapter[f"{name}_lora_b"]
        two = a.reshape(a.shape[0], -1, lora.rank) @ b.reshape(*b.shape[:2], -1) * (lora.alpha / lora.rank)
        layers[name] = layers[name] + two.reshape(layers[name].shape)
    return BASE | {"layers": layers}


def test_merged_unmerged_and_a_slow_version_agree():
    on, expected = logits()(joined(BASE, ADAPTER, LORA)), logits()(slow(ADAPTER))
    np.testing.assert_allclose(on, expected, atol=1e-5)
    assert np.abs(on - logits()(BASE)).max() > 0.1
    merged = merged_model(jax.tree.map(jnp.array, joined(BASE, ADAPTER, LORA)))
    np.testing.assert_allclose(logits()(merged), expected, atol=1e-5)
    assert not has_adapter(merged) and has_adapter(joined(BASE, ADAPTER, LORA))


@pytest.mark.parametrize("tpu", [False, True])
def test_rollout_weights_have_the_adapter_in_them(tpu):
    form = RolloutModel(MODEL.config, jnp.float32, "tpu" if tpu else "cpu")
    of = functools.partial(rollout_layer, form)
    found, expected = (of(lm["layers"], 1) for lm in (joined(BASE, ADAPTER, LORA), slow(ADAPTER)))
    assert found.keys() == expected.keys()
    for name, box in expected.items():
        assert found[name].names == box.names
        np.testing.assert_allclose(found[name].value, box.value, atol=1e-6)


def test_gradients_are_those_of_a_slow_version_and_of_the_adapter_only():
    """Also of the head: of a loss through `decision_loss`, which makes the output matrix's gradient itself."""
    rows = packed()
    lines = jax.tree.map(lambda x: x[0], rows.lines)
    weight = rows.spread(MASK / 8)[0].astype(np.float32)

    def loss(make):
        def of(adapter):
            lm = make(adapter)
            hidden = hidden_states(MODEL, lm, lines)
            return decision_loss(lambda logprob, w: (-(logprob * w).sum(), {}), MODEL, lm, hidden, lines, weight)[0]

        return of

    both = jax.jit(lambda a: [jax.grad(loss(make))(a) for make in (lambda a: joined(BASE, a, LORA), slow)])
    found, expected = both(ADAPTER)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4 * np.abs(expected[name]).max())
        assert np.abs(expected[name]).max() > 1e-3


def test_a_frozen_output_matrix_has_no_gradient():
    """No array of an update is as large as the output matrix, in the loop over decisions or after it."""
    lines = jax.tree.map(lambda x: x[0], packed().lines)
    about = np.ones(lines.decisions.shape, np.float32)

    def loss(hidden, lm):
        return decision_loss(lambda x, w: (-(x * w).sum(), {}), MODEL, lm, hidden, lines, about)[0]

    hidden = np.ones((*lines.decisions.shape, 24), np.float32)
    made = {}
    for name, lm in {"frozen": joined(BASE, ADAPTER, LORA), "trained": BASE}.items():
        text = str(jax.make_jaxpr(jax.grad(loss))(hidden, lm))
        made[name] = len(re.findall(r"f32\[[\d,]*61,24\] = (?:add|mul)", text))  # sums of the gradient [V,D]
    assert made["frozen"] == 0 < made["trained"]


def test_the_reference_is_scored_with_the_adapter_off():
    algorithm = of_two("grpo")
    optimizer, mesh = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0), make_mesh(1, 1, 1)
    one = Iteration(MODEL, mesh, optimizer, algorithm, None, LORA, micro_batch=8, max_len=LENGTH, multiple=8)
    rollout = noisy()[0]
    found, _ = one.score({"lm": joined(BASE, ADAPTER, LORA)}, BASE, rollout)
    expected, _ = one.score({"lm": BASE}, BASE, rollout)
    np.testing.assert_array_equal(found.ref_logprob, expected.logprob)
    assert np.abs(found.logprob - found.ref_logprob).max() > 0.1


def test_an_update_changes_the_adapter_and_nothing_else():
    """The state has adapters only; only the targets are there; a step never makes an array as large as the base's."""
    lora = Lora(2, 4.0, ("q", "down"))
    trains = trained(lora, SHAPES)
    optimizer, mesh = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0), make_mesh(1, 1, 1)
    where = state_shardings(mesh, optimizer, trains)
    adapter = init_adapter(mesh, lora, SHAPES["lm"], seed=0)
    assert sorted(adapter) == ["down_lora_a", "down_lora_b", "q_lora_a", "q_lora_b"]
    state = new_state(mesh, optimizer, trains, {"lora": jax.tree.map(jnp.copy, adapter)})
    base, rows = jax.tree.map(np.array, BASE), packed()
    step = make_step(sft_loss, MODEL, optimizer, where, lora)
    batch = (rows.lines, rows.spread(MASK / MASK.sum()).astype(np.float32))
    state, first = step(state, batch, rows.count, BASE)
    state, second = step(state, batch, rows.count, BASE)
    assert second["loss"] < first["loss"]
    jax.tree.map(np.testing.assert_array_equal, BASE, base)
    changed = {name: np.abs(x - adapter[name]).max() for name, x in state.params["lora"].items()}
    assert state.params.keys() == {"lora"} and min(changed.values()) > 1e-4
    held = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert held == 3 * sum(x.size for x in adapter.values())  # weights and two moments


def test_settings_make_an_adapter_and_wrong_targets_are_refused():
    config = default_config()
    config.update_from_flattened_dict({"model.path": "m", "data.train": "a", "data.test": "b"})
    assert make_lora(check_config(config)) is None
    config.lora.update(rank=8, alpha=16.0, targets="q, v")
    assert make_lora(check_config(config)) == Lora(8, 16.0, ("q", "v")) and make_lora(config).scale == 2
    for wrong in ("q,w", "", "q,q"):
        config.lora.targets = wrong
        with pytest.raises(InputError, match="lora.targets=.*must be some of q,k,v,o,gate,up,down"):
            check_config(config)


def test_a_plan_holds_the_base_once_and_moments_of_adapters_only():
    """`base` is the reference too, in bfloat16; updates lower; the same functions as of a run without LoRA."""
    config = load_config(str(Path(__file__).parent.parent / "configs" / "quickstart.py"))
    config.model.dtype, config.rl.algorithm = "bfloat16", "grpo"
    config.lora.update(rank=2, targets="q,v")
    model = MODEL.clone(dtype=jnp.dtype("bfloat16"))
    functions = RunFunctions(check_config(config), model, make_mesh(1, 1, 1))
    adapter = 4 * 2 * 2 * (24 + 32 + 24 + 16)  # bytes × layers × rank × (inputs and outputs of q, of v)
    held = functions.residents
    assert held["policy and moments"] == 3 * adapter + 4 * 3 and held["moments"] == 2 * adapter + 4 * 3
    assert held["base"] == 2 * sum(x.size for x in jax.tree.leaves(BASE)) and "reference" not in held
    beside = {one.name: one.beside for one in functions.all}
    assert "base" in beside["decode, PPO"] and "base" not in beside["PPO update"] + beside["score, reference"]
    with on_mesh(functions.mesh):
        for one in functions.all:
            if one.name in ("PPO update", "rollout weights"):
                one.lower()


def test_a_saved_chain_of_adapters_is_merged_and_a_changed_base_is_refused(tmp_path):
    """models/reft is an adapter of models/warmup, and that one of the base: what training had, by the names of both."""
    mesh, models = make_mesh(1, 1, 1), tmp_path / "models"
    save_hf(tmp_path / "base", MODEL, BASE)
    run = SimpleNamespace(inputs=SimpleNamespace(base=tmp_path / "base"), config=default_config())
    run.workdir = SimpleNamespace(path=tmp_path, model=lambda name: models / name)
    run.machine = SimpleNamespace(mesh=mesh, model=MODEL)
    run.config.lora.update(rank=LORA.rank, alpha=LORA.alpha)
    models.mkdir()
    with on_mesh(mesh):
        for name, of in (("warmup", ""), ("reft", "warmup")):
            save_params(models / name, {"lora": ADAPTER}, new_adapter(run, of).as_json())
        found = load_model(run, "reft")
        once = slow(ADAPTER)["layers"]
        assert found.keys() == {"lm"} and found["lm"].keys() == BASE.keys()
        for name, x in found["lm"]["layers"].items():  # both add the same
            np.testing.assert_allclose(x, 2 * once[name] - BASE["layers"][name], atol=1e-5)
        before = checksum(run, "reft")
        save_params(models / "warmup", {"lora": jax.tree.map(lambda x: 2 * x, ADAPTER)}, new_adapter(run, "").as_json())
        with pytest.raises(InputError, match="is an adapter of .*warmup, which has changed since"):
            load_model(run, "reft")
    assert checksum(run, "reft") == before != checksum(run, "warmup")
