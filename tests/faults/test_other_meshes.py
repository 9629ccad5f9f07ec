"""A run resumes on another mesh than the one its step was saved on. Run as a script, this file sees eight devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import pytest
from tiny import tiny_policy, tiny_state

from reft_jax.model.heads import ValueHead
from reft_jax.parallel.mesh import abstract_arrays, make_mesh, on_mesh, put_rows
from reft_jax.train.checkpoints import Checkpoints
from reft_jax.train.checksums import array_checksums
from reft_jax.train.packing import Packing
from reft_jax.train.state import abstract_params, abstract_state, make_optimizer
from reft_jax.train.steps import make_step, sft_loss

SAVED_ON = (1, 4, 2)  # data, fsdp, tensor
RESUMED_ON = [(1, 2, 4), (1, 8, 1)]
MODEL, PARAMS = tiny_policy(vocab_size=64, num_kv_heads=4)  # every sharded dimension divides by what it is cut into
OPTIMIZER = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.1, clip_norm=1.0)


def trained(mesh, state, where, steps: int) -> tuple:
    """The state after so many more updates on the same rows, and their losses."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 64, length).tolist() for length in rng.integers(7, 17, 16)]
    lengths = np.array([len(row) for row in rows])
    packing = Packing(rows, 2 + 0 * lengths, lengths - 3, max_len=32, micro_batch=8, micro_batches=2, multiple=8)
    batch = put_rows(mesh, (packing.lines, packing.spread(1 / len(packing.at[0]))), axis=1)
    step, losses = make_step(sft_loss, MODEL, OPTIMIZER, where), []
    for _ in range(steps):
        state, numbers = step(state, batch, packing.count)
        losses.append(float(numbers["loss"]))
    return state, losses


def save(folder: Path) -> dict:
    """Two updates, a save, three more."""
    mesh = make_mesh(*SAVED_ON)
    with on_mesh(mesh):
        state, where = tiny_state(MODEL, PARAMS, OPTIMIZER, mesh)
        state, _ = trained(mesh, state, where, 2)
        checksums = array_checksums(state)
        checkpoints = Checkpoints(folder, 2, {})
        checkpoints.save(2, state, {})
        _, losses = trained(mesh, state, where, 3)  # takes the state over while it is being written
        checkpoints.close()
    return {"checksums": checksums, "losses": losses}


def resume(folder: Path, shape: tuple[int, int, int]) -> dict:
    """The checksums of what is restored on this mesh, and the losses of three updates."""
    mesh = make_mesh(*shape)
    with on_mesh(mesh):
        _, where = tiny_state(MODEL, PARAMS, OPTIMIZER, mesh)
        abstract = abstract_state(OPTIMIZER, abstract_params(MODEL, ValueHead(), "value_head"))
        checkpoints = Checkpoints(folder, 2, {})
        restored = checkpoints.restore(abstract_arrays(mesh, abstract))
        checkpoints.close()
        checksums = array_checksums(restored.state)
        return {"checksums": checksums, "losses": trained(mesh, restored.state, where, 3)[1]}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What was saved, and what it was on the other meshes; last on the one device of this process."""
    folder = tmp_path_factory.mktemp("meshes")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [*json.loads(done.stdout), resume(folder, (1, 1, 1))]


@pytest.mark.parametrize("i", range(1, 4), ids=["2x4", "8x1", "1"])
def test_resumed_on_another_mesh(found, i):
    assert found[i]["checksums"] == found[0]["checksums"]
    np.testing.assert_allclose(found[i]["losses"], found[0]["losses"], rtol=0, atol=1e-5)
    assert found[0]["losses"][2] < found[0]["losses"][0] - 0.01  # the updates do something


if __name__ == "__main__":
    place = Path(sys.argv[1])
    print(json.dumps([save(place), *(resume(place, shape) for shape in RESUMED_ON)]))
