"""Eight devices compute the same as one. The suite sees one device; this file, run as a script, sees eight."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tiny import rollouts_on, tiny_policy, tiny_ppo, tiny_state

from reft_jax.engine import generate
from reft_jax.engine import slots as programs
from reft_jax.model.hf import load_hf
from reft_jax.model.hf_write import save_hf
from reft_jax.model.rollout_weights import for_rollouts
from reft_jax.parallel.mesh import make_mesh, on_mesh, put, put_rows
from reft_jax.train.packing import Packing
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import RerankBatch, make_step, rerank_loss, rl_loss, sft_loss
from reft_jax.types import InputError, PPOBatch, Prompt

MESHES = [(2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 1, 8)]  # data, fsdp, tensor
FEW = 2  # so many are tried without --long: together they cut every axis
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_heads": 16, "num_kv_heads": 8, "head_dim": 4}  # divide by 8
SHAPE |= {"model_type": "smollm3", "unrotated": (0,), "qkv_bias": True, "o_bias": True, "mlp_bias": True}
MODEL, PARAMS = tiny_policy(**SHAPE)
LOSSES = {"sft": sft_loss, "ppo": partial(rl_loss, tiny_ppo()), "rerank": rerank_loss}


def batch_of(kind: str) -> tuple[Packing, tuple]:
    """16 rows in lines, and what the update is told of their decisions."""
    rng = np.random.default_rng(0)
    prompt_lens, lengths = rng.integers(1, 6, 16), rng.integers(7, 17, 16)
    rows = [rng.integers(0, 64, length).tolist() for length in lengths]
    size = {"max_len": 16, "micro_batch": 8, "micro_batches": 2, "multiple": 8}
    if kind == "rerank":
        packing = Packing(rows, lengths - 1, np.ones_like(lengths), **size)
        return packing, RerankBatch(packing.spread(np.arange(16) % 2, np.int32), packing.spread(1 / 16))
    packing = Packing(rows, prompt_lens - 1, lengths - prompt_lens, **size)
    decisions = len(packing.at[0])
    if kind == "sft":
        return packing, packing.spread(1 / decisions)
    old = [rng.normal(size=decisions) for _ in range(3)]
    return packing, PPOBatch(*map(packing.spread, (1 / decisions, -4 + 0.1 * old[0], old[1], old[2], old[1] + old[2])))


def train(mesh, kind: str) -> dict:
    """Three updates: losses, gradient norms, weights, the step's constraints, the largest share of a matrix."""
    params = PARAMS if kind != "rerank" else tiny_policy("rerank_head", **SHAPE)[1]
    # Clipped to so little, a weight's gradient is about as large as AdamW's epsilon and its update grows with it. At
    # norm 1 the update is all but the gradient's sign, which rounding decides where the gradient is nearly 0.
    optimizer = make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.0, clip_norm=1e-6)
    state, where = tiny_state(MODEL, params, optimizer, mesh)
    step, (packing, told), seen = make_step(LOSSES[kind], MODEL, optimizer, shardings=where), batch_of(kind), []
    batch = put_rows(mesh, (packing.lines, told), axis=1)
    lowered = step.lower(state, batch, packing.count)
    step, constraints = lowered.compile(), lowered.as_text().count("sharding_constraint")
    for _ in range(3):
        state, metrics = step(state, batch, packing.count)
        seen.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    matrices = [x for x in jax.tree.leaves(state.params) if x.size > 1000]
    share = max(x.addressable_shards[0].data.size / x.size for x in matrices)
    losses, norms = zip(*seen, strict=True)
    weights = {
        jax.tree_util.keystr(path): np.asarray(x).tolist() for path, x in jax.tree.leaves_with_path(state.params)
    }
    found = {"losses": losses, "gradient norms": norms, "weights": weights}
    return found | {"constraints": constraints, "share": share}


def sample(mesh, tpu: bool = False, int8: tuple[str, ...] = ()) -> dict:
    """Drawn completions of ten prompts, three each, on 16 slots: prefills are shared, the last rows move together. Also
    how many constraints the first decode program has, and how much it gathers. `tpu`: with a TPU's form of the cache.
    """
    _, where = tiny_state(MODEL, PARAMS, optax.sgd(0.1), mesh)
    with mock.patch.object(generate, "for_rollouts", rollouts_on("tpu" if tpu else "cpu")):
        engine = generate.Engine(MODEL, mesh, slots=16, pad_multiple=16, eos_id=7, seed=0, int8=int8)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 64, 2 + i).astype(np.int32) for i in range(10)]
    prompts = [Prompt(f"toy_{i}", sample, row) for i, row in enumerate(rows) for sample in range(3)]
    decode, seen = programs.decode, {}

    def counted(model, weights, slots, *args, **settings):
        if not seen:
            lowered = decode.lower(model, weights, slots, *args, **settings)
            seen["decode"] = lowered.as_text().count("sharding_constraint")
            largest = max(gathered(lowered.compile().as_text()), default=0)
            seen["gathered"] = largest / math.prod(slots.cache[0].k.shape)
        return decode(model, weights, slots, *args, **settings)

    with mock.patch.object(programs, "decode", counted):
        lm = put(PARAMS["lm"], where.params["lm"])
        completions = dict(engine.generate(lm, prompts, max_len=32, temperature=1.0))
    assert engine.counts["prompts"] == 10
    return {"sampled": [completions[i].tokens.tolist() for i in range(30)]} | seen


def gathered(text: str) -> list[int]:
    """How many numbers each collective of a compiled program makes, sums aside."""
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)\(", text)
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


def rollout_share(mesh) -> float:
    """The largest share of a matrix of the rollouts' weights that a device holds."""
    _, where = tiny_state(MODEL, PARAMS, optax.sgd(0.1), mesh)
    weights = programs.rollout_weights(for_rollouts(MODEL, mesh), put(PARAMS["lm"], where.params["lm"]))
    return max(x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(weights) if x.size > 1000)


def comes_back(mesh) -> bool:
    """Whether weights that lie on the mesh, written to a folder and read from it onto the mesh, are what they were."""
    _, where = tiny_state(MODEL, PARAMS, optax.sgd(0.1), mesh)
    where = where.params["lm"]
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", MODEL, put(PARAMS["lm"], where), max_shard_bytes=30_000)
        _, lm = load_hf(Path(folder) / "model", shardings=where)
    same = jax.tree.map(lambda x, y, at: x.sharding == at and np.array_equal(x, y), lm, PARAMS["lm"], where)
    return all(jax.tree.leaves(same))


def results(shape: tuple[int, int, int]) -> dict:
    mesh = make_mesh(*shape)
    with on_mesh(mesh):
        trained = {kind: train(mesh, kind) for kind in LOSSES}
        if shape == (2, 2, 2):
            trained["sampled as a TPU"] = sample(mesh, tpu=True)["sampled"]
        if shape in ((1, 1, 1), (2, 2, 2)):
            trained["in int8"] = sample(mesh, int8=("weights", "cache"))
        return trained | sample(mesh) | {"comes back": comes_back(mesh), "rollout share": rollout_share(mesh)}


@pytest.fixture(scope="module")
def one_device() -> dict:
    return results((1, 1, 1))


@pytest.fixture(scope="module")
def eight_devices(request) -> list[dict]:
    """The results on each of the meshes, from a process with eight CPU devices."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(len(MESHES) if request.config.getoption("--long") else FEW)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


EACH_MESH = pytest.mark.parametrize(
    "i",
    [
        pytest.param(i, id="-".join(map(str, shape)), marks=[pytest.mark.long] if i >= FEW else [])
        for i, shape in enumerate(MESHES)
    ],
)


@pytest.mark.parametrize("kind", LOSSES)
@EACH_MESH
def test_eight_devices_train_as_one(i, kind, one_device, eight_devices):
    found, expected, (_, fsdp, tensor) = eight_devices[i][kind], one_device[kind], MESHES[i]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["gradient norms"], expected["gradient norms"], rtol=1e-5)
    assert len(set(found["losses"])) == 3
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weights in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weights, atol=1e-6, rtol=0, err_msg=name)
    assert found["share"] == 1 / (fsdp * tensor)  # no matrix is whole on a device


@EACH_MESH
def test_eight_devices_sample_as_one(i, one_device, eight_devices):
    assert eight_devices[i]["sampled"] == one_device["sampled"]
    assert eight_devices[i].get("sampled as a TPU") in (None, one_device["sampled"])
    assert eight_devices[i]["gathered"] < 1 / 4  # of a layer's keys: the cache stays where it is
    assert eight_devices[i]["rollout share"] == 1 / MESHES[i][2]  # each group of `tensor` devices has all weights


def test_eight_devices_sample_in_int8_as_one(one_device, eight_devices):
    found, expected = eight_devices[MESHES.index((2, 2, 2))]["in int8"], one_device["in int8"]
    assert found["sampled"] == expected["sampled"] and found["gathered"] < 1 / 4
    # Each layer's cache has two arrays of scales too: twelve constraints more before, in and after the loop.
    assert found["decode"] == expected["decode"] == one_device["decode"] + 12


def test_weights_come_back_from_a_folder_onto_every_mesh(one_device, eight_devices):
    assert [found["comes back"] for found in (one_device, *eight_devices)] == [True] * (1 + len(eight_devices))


def test_constraints_are_in_every_program_on_every_mesh(one_device, eight_devices):
    """Training: the embeddings' and five of the scanned layer, and each again for its gradient; where tokens are
    scored, the output matrix, gathered once. Decoding: the embeddings' and three of each of two layers, two for each
    layer's cache before the loop, in it and after it, and one for each of the other seven arrays of the slots.
    """
    for found in (one_device, *eight_devices):
        assert [found[kind]["constraints"] for kind in LOSSES] == [2 * (1 + 5) + 1] * 2 + [2 * (1 + 5)]
        assert found["decode"] == 1 + 2 * 3 + 2 * (2 + 2) + 2 * 2 + 7


@pytest.mark.parametrize("shape", [(2, 1, 1), (-1, 2, 1), (1, 1, 3)])
def test_a_mesh_of_another_size_is_an_input_error(shape):
    with pytest.raises(InputError, match="does not make 1 devices"):
        make_mesh(*shape)


def test_data_minus_one_takes_what_is_left():
    assert dict(make_mesh(-1, 1, 1).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_weights_and_their_moments_lie_on_the_axes_of_the_rules():
    optimizer = make_optimizer(optax.constant_schedule(1e-3), weight_decay=0.0, clip_norm=1.0)
    _, where = tiny_state(MODEL, PARAMS, optimizer)
    assert where.params["lm"]["layers"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert where.params["lm"]["embed"].spec == PartitionSpec("tensor", "fsdp")
    assert optax.tree.get(where.opt_state, "mu") == optax.tree.get(where.opt_state, "nu") == where.params


@pytest.mark.parametrize("bound", [True, False])
def test_the_models_constraints_reach_the_compiler_only_on_a_mesh(bound):
    mesh = make_mesh(1, 1, 1)
    with on_mesh(mesh) if bound else nullcontext():
        forward = jax.jit(lambda lm, tokens: MODEL.apply({"params": lm}, tokens))
        text = forward.lower(PARAMS["lm"], np.zeros((2, 3), np.int32)).as_text()
    assert ("sharding_constraint" in text and '"data", "fsdp"' in text) == bound
    # Positions are spread over the tensor axis after the embeddings and after both halves of a layer.
    assert text.count('[{"data", "fsdp"}, {"tensor"}, {}]') == (3 if bound else 0)


if __name__ == "__main__":
    print(json.dumps([results(shape) for shape in MESHES[: int(sys.argv[1])]]))
