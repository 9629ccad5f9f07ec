"""Checkpoints are restored bit for bit, and a failed save is reported."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from reft_jax.parallel.mesh import by_row, make_mesh
from reft_jax.train.checkpoints import Checkpoints, load_params, save_params
from reft_jax.train.state import TrainState
from reft_jax.types import SaveError


def some_state(seed: int) -> TrainState:
    """Every bit pattern of float32 is allowed: NaNs and denormals too."""
    mesh, rng = make_mesh(1, 1, 1), np.random.default_rng(seed)
    bits = {name: rng.integers(0, 2**32, shape, np.uint32) for name, shape in (("w", (4, 3)), ("b", (3,)))}
    params = {name: jax.device_put(x.view(np.float32), by_row(mesh)) for name, x in bits.items()}
    moments = (
        {"mu": jax.device_put(rng.normal(size=(4, 3)).astype(np.float32), NamedSharding(mesh, PartitionSpec()))},
        None,
    )
    return TrainState(jnp.int32(seed), params, moments)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.sharding == b.sharding
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_parameters_come_back_and_newer_ones_replace_them(tmp_path):
    old, new = some_state(1).params, some_state(2).params
    for params in (old, new):
        save_params(tmp_path / "models" / "sft", params)
        assert_same_bits(load_params(tmp_path / "models" / "sft", abstract(old)), params)


def test_a_process_that_dies_while_saving_leaves_the_older_parameters(tmp_path):
    folder, old, new = tmp_path / "sft", some_state(1).params, some_state(2).params
    save_params(folder, old)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", DIES_WHILE_SAVING, folder], env=environment, check=False)
    assert done.returncode == 9
    assert_same_bits(load_params(folder, abstract(old)), old)
    save_params(folder, new)  # what the dead process left is no obstacle
    assert_same_bits(load_params(folder, abstract(new)), new)


DIES_WHILE_SAVING = """
import os, pathlib, sys
import orbax.checkpoint
import reft_jax.train.checkpoints, test_checkpoints

class Dies(orbax.checkpoint.StandardCheckpointer):
    def save(self, *args, **kwargs):
        super().save(*args, **kwargs)  # returns while files are still being written
        os._exit(9)

orbax.checkpoint.StandardCheckpointer = Dies
reft_jax.train.checkpoints.save_params(pathlib.Path(sys.argv[1]), test_checkpoints.some_state(2).params)
"""


def test_the_newest_state_comes_back_with_its_info(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, {"seed": 42})
    assert checkpoints.restore(abstract(some_state(0))) is None
    for step in (1, 2, 10):
        checkpoints.save(step, some_state(step), {"best_dev_top1": step / 4, "best_epoch": step})
    checkpoints.close()
    reopened = Checkpoints(tmp_path, 2, {})
    step, state, info, made_by = reopened.restore(abstract(some_state(0)))
    assert step == 10 and info == {"best_dev_top1": 2.5, "best_epoch": 10} and made_by == {"seed": 42}
    assert_same_bits(state, some_state(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]  # the last two
    assert [info["best_epoch"] for info in reopened.infos()] == [2, 10]
    reopened.close()


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_that_is_not_the_newest_is_not_saved(tmp_path, step):
    checkpoints = Checkpoints(tmp_path, 2, {})
    checkpoints.save(5, some_state(5), {})
    with pytest.raises(ValueError, match=f"step {step} was not saved; step 5 is there"):
        checkpoints.save(step, some_state(step), {})
    checkpoints.close()


def test_a_state_may_be_taken_over_while_it_is_written(tmp_path):
    """`save` returns before the files exist; later changes of the arrays do not affect them."""
    state, x = some_state(1), jax.device_put(np.arange(1 << 20, dtype=np.float32), by_row(make_mesh(1, 1, 1)))
    state = state._replace(params={"x": x})
    shapes = abstract(state)
    checkpoints = Checkpoints(tmp_path, 2, {})
    checkpoints.save(1, state, {})
    jax.block_until_ready(jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(x))
    checkpoints.wait()
    found = checkpoints.restore(shapes)
    checkpoints.close()
    np.testing.assert_array_equal(found.state.params["x"], np.arange(1 << 20))


def test_an_error_of_a_save_comes_up_at_the_next_step_and_older_steps_stay(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path, 2, {})
    checkpoints.save(1, some_state(1), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr("reft_jax.train.checkpoints.write_manifest", full)
        checkpoints.save(2, some_state(2), {})
        with pytest.raises(SaveError, match="2 could not be saved .*No space left.*step 1 is whole and will be used"):
            checkpoints.save(3, some_state(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.close()
