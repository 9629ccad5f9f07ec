"""What the training stages share."""

from pathlib import Path

import jax
import numpy as np
from tiny import tiny_policy

from reft_jax import save_hf
from reft_jax.config import check_config, load_config
from reft_jax.parallel.mesh import make_mesh, on_mesh
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import base_policy

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


def test_a_run_goes_on_with_the_value_head_of_an_exported_folder(tmp_path, capsys):
    model, params = tiny_policy()
    config = check_config(load_config(str(CONFIG)))
    save_hf(tmp_path / "exported", model, params["lm"], value_head=params["value_head"])
    save_hf(tmp_path / "bare", model, params["lm"])
    mesh = make_mesh(1, 1, 1)
    with on_mesh(mesh):
        found = {
            name: base_policy(Run(config, tmp_path, tmp_path / name, None, None, mesh=mesh, model=model))
            for name in ("exported", "bare")
        }
    jax.tree.map(np.testing.assert_array_equal, found["exported"], params)
    assert "the value head is that of" in capsys.readouterr().out
    assert not np.any(found["bare"]["value_head"]["weight"])  # the quickstart's value_init is 0
