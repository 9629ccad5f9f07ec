"""Several devices compute what one does. The suite sees one; this file, run as a program, is told of four."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tiny import tiny_policy, tiny_state

from reft_jax.engine.generate import Engine
from reft_jax.engine.slots import rollout_weights
from reft_jax.parallel.mesh import make_mesh, on_mesh, put_rows
from reft_jax.train.packing import Packing
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import make_sft_step
from reft_jax.types import InputError, Prompt

MESHES = [(2, 1, 2), (1, 4, 1)]  # data, fsdp, tensor
MODEL, PARAMS = tiny_policy(vocab_size=64)  # every sharded dimension divides by 4


def sft_rows():
    rng = np.random.default_rng(0)
    prompt_lens, lengths = rng.integers(1, 6, 8), rng.integers(7, 17, 8)
    rows = [rng.integers(0, 64, length).tolist() for length in lengths]
    size = {"max_len": 32, "micro_batch": 4, "micro_batches": 2, "multiple": 8}
    return Packing(rows, prompt_lens - 1, lengths - prompt_lens, **size)


def train(mesh, packing: Packing) -> dict:
    """Two SFT steps: their losses and gradient norms, and the largest share of a matrix that a device holds."""
    optimizer = optax.sgd(0.1)
    state, where = tiny_state(MODEL, PARAMS, optimizer, mesh)
    step, losses, norms = make_sft_step(MODEL, optimizer, where), [], []
    batch = put_rows(mesh, (packing.lines, packing.spread(1 / len(packing.at[0]))), axis=1)
    for _ in range(2):
        state, metrics = step(state, batch, packing.count)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    matrices = [x for x in jax.tree.leaves(state.params) if x.size > 1000]
    shares = [x.addressable_shards[0].data.size / x.size for x in matrices]
    return {"losses": losses, "norms": norms, "share": max(shares)}


def sample(mesh) -> list[list[int]]:
    """Drawn completions of ten prompts, three each, on 16 slots: prefills are shared, the last rows move together."""
    _, where = tiny_state(MODEL, PARAMS, optax.sgd(0.1), mesh)
    lm = jax.device_put(PARAMS["lm"], where.params["lm"])
    engine = Engine(MODEL, mesh, slots=16, pad_multiple=8, eos_id=7, seed=0)
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, 64, 2 + i).astype(np.int32) for i in range(10)]
    prompts = [Prompt(f"toy_{i}", sample, row) for i, row in enumerate(rows) for sample in range(3)]
    completions = dict(engine.generate(lm, prompts, max_len=40, temperature=1.0))
    assert engine.counts["prompts"] == 10
    return [completions[i].tokens.tolist() for i in range(30)]


def rollout_share(mesh) -> float:
    """The largest share of a matrix of the rollouts' weights that a device holds."""
    _, where = tiny_state(MODEL, PARAMS, optax.sgd(0.1), mesh)
    lm = jax.device_put(PARAMS["lm"], where.params["lm"])
    weights = rollout_weights(MODEL.clone(unrolled=True), lm)
    return max(x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(weights) if x.size > 1000)


def results(shape: tuple[int, int, int]) -> dict:
    mesh = make_mesh(*shape)
    with on_mesh(mesh):
        return train(mesh, sft_rows()) | {"sampled": sample(mesh), "rollout_share": rollout_share(mesh)}


@pytest.fixture(scope="module")
def one_device() -> dict:
    return results((1, 1, 1))


@pytest.fixture(scope="module")
def four_devices() -> list[dict]:
    """The results on each of MESHES, from a process with four CPU devices."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # in compiling, for code that runs once
    environment = os.environ | quick | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("i", range(len(MESHES)), ids=["data2-tensor2", "fsdp4"])
def test_four_devices_train_and_sample_as_one(i, one_device, four_devices):
    found, (_, fsdp, tensor) = four_devices[i], MESHES[i]
    np.testing.assert_allclose(found["losses"], one_device["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["norms"], one_device["norms"], rtol=1e-4)
    assert found["losses"][1] < found["losses"][0] - 0.01
    assert found["share"] == 1 / (fsdp * tensor)  # no matrix is whole on a device
    assert found["rollout_share"] == 1 / tensor  # every fsdp group has all of them
    assert found["sampled"] == one_device["sampled"]


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


if __name__ == "__main__":
    print(json.dumps([results(shape) for shape in MESHES]))
