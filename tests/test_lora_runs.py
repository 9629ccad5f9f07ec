"""Runs with LoRA: on other meshes, stopped and resumed, what is saved, and the export. As a script: eight devices."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import optax
import pytest
from faults.starts import VARYING
from safetensors.numpy import load_file
from test_pipeline import ROOT, command, metrics, run
from tiny import drawn, tiny_model

from reft_jax.engine import slots as rollouts
from reft_jax.model.lora import Lora, abstract_adapter, joined, trained
from reft_jax.model.rollout_weights import for_rollouts
from reft_jax.parallel.mesh import abstract_arrays, make_mesh, on_mesh, put, put_rows, shardings, unboxed
from reft_jax.train.checkpoints import Checkpoints
from reft_jax.train.checksums import array_checksums
from reft_jax.train.packing import Packing
from reft_jax.train.state import (
    abstract_params,
    abstract_state,
    init_adapter,
    make_optimizer,
    new_state,
    state_shardings,
)
from reft_jax.train.steps import make_step, sft_loss

LORA = Lora(2, 4.0, ("q", "k", "v", "o", "gate", "up", "down"))
MODEL, BASE = tiny_model(vocab_size=64, num_kv_heads=4)
SHAPES = abstract_params(MODEL)
OPTIMIZER = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0)


def on_a_mesh(folder: Path, shape: tuple[int, int, int], save: bool) -> dict:
    """The first adapter's checksums; the losses of two updates, a save or a restore, and two more; merged weights."""
    mesh, trains = make_mesh(*shape), trained(LORA, SHAPES)
    with on_mesh(mesh):
        base = put(BASE, shardings(mesh, SHAPES["lm"]))
        adapter = init_adapter(mesh, LORA, SHAPES["lm"], seed=0)
        first = array_checksums(adapter)
        where = state_shardings(mesh, OPTIMIZER, trains)
        state = new_state(mesh, OPTIMIZER, trains, {"lora": adapter})
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, 64, length).tolist() for length in rng.integers(7, 17, 16)]
        lengths = np.array([len(row) for row in rows])
        packing = Packing(rows, 2 + 0 * lengths, lengths - 3, max_len=32, micro_batch=8, micro_batches=2, multiple=8)
        batch = put_rows(mesh, (packing.lines, packing.spread(1 / len(packing.at[0]))), axis=1)
        step, losses = make_step(sft_loss, MODEL, OPTIMIZER, where, LORA), []
        checkpoints = Checkpoints(folder, 2, {})
        if save:
            for _ in range(2):
                state, numbers = step(state, batch, packing.count, base)
                losses.append(float(numbers["loss"]))
            checkpoints.save(2, state, {})
        else:
            state = checkpoints.restore(abstract_arrays(mesh, abstract_state(OPTIMIZER, trains))).state
        checkpoints.close()
        saved = array_checksums(state)
        for _ in range(2):
            state, numbers = step(state, batch, packing.count, base)
            losses.append(float(numbers["loss"]))
        known = drawn(unboxed(abstract_adapter(LORA, SHAPES["lm"])), 1)
        lm = joined(base, put(known, shardings(mesh, abstract_adapter(LORA, SHAPES["lm"]))), LORA)
        weights = rollouts.rollout_weights(for_rollouts(MODEL, mesh), lm)
    sums = {name: float(np.abs(x).sum()) for name, x in weights["layers_1"].items()}
    return {"first": first, "saved": saved, "losses": losses, "merged": sums}


def test_eight_devices_are_as_one_and_another_mesh_resumes():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr
    whole, other = json.loads(done.stdout.splitlines()[-1])
    assert whole["first"] == other["first"] and whole["saved"] == other["saved"]
    assert whole["losses"][2:] == pytest.approx(other["losses"], rel=1e-5) and whole["losses"][3] < whole["losses"][0]
    assert whole["merged"] == pytest.approx(other["merged"], rel=1e-5)
    assert set(whole["saved"]) == {
        name for name in whole["saved"] if "lora" in name or "count" in name or ".step" in name
    }


# --- processes

SETTINGS = (
    "lora.rank=4",
    "lora.targets=q,v,down",
    "rl.algorithm=grpo",
    "rl.samples=2",
    "rl.questions=8",
    "sft.learning_rate=0.01",
    "rl.learning_rate=0.01",
    "engine.weights=int8",
    "engine.cache=int8",
    "rl.sampler_correction=tis",
)


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory):
    """A work directory whose SFT is done, to be copied, and the settings of its runs."""
    folder = tmp_path_factory.mktemp("lora")
    settings = [f"--config.compiled={folder / 'compiled'}", *(f"--config.{one}" for one in SETTINGS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)  # it would come before the setting
        done = run("sft", folder / "sft", *settings)
        assert done.returncode == 0, done.stderr
        yield folder, settings


def kept(folder: Path) -> set[str]:
    """The compiled functions in the folder."""
    return {path.name for path in (folder / "compiled").glob("*-cache")}


@pytest.fixture(scope="module")
def whole(warmed_up):
    """The rest of the chain with both kinds of self-training, without a stop."""
    folder, settings = warmed_up
    shutil.copytree(folder / "sft", folder / "whole")
    done = run("pipeline", folder / "whole", *settings, "--baselines")
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_grpo_with_lora_and_int8_resumes_bit_for_bit_and_saves_adapters_only(warmed_up, whole):
    """SIGTERM after the first saved iteration; the same command ends with the uninterrupted run's adapter.

    The second work directory has the same folder of compiled functions: its run compiles none.
    """
    folder, settings = warmed_up
    stopped, compiled = folder / "stopped", kept(folder)
    shutil.copytree(folder / "sft", stopped)
    process = subprocess.Popen(
        command("reft", stopped, *settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline, saved = time.monotonic() + 300, []
    while not saved and process.poll() is None and time.monotonic() < deadline:
        saved = list((stopped / "reft" / "checkpoints").glob("*/manifest.json"))
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    assert compiled and kept(folder) == compiled and not (stopped / "compiled").exists()
    step = json.loads(sorted((stopped / "reft" / "checkpoints").glob("*/step.json"))[-1].read_text())
    assert {re.search(r"'(\w+)'", name)[1] for name in step["arrays"] if "'" in name} == {"lora"}
    assert step["made_by"]["reference"]["adapter"]["of"] == "warmup"
    done = run("reft", stopped, *settings)
    assert done.returncode == 0, done.stderr
    assert "reft: resuming after" in done.stdout
    results = [json.loads((workdir / "reft" / "done.json").read_text()) for workdir in (stopped, whole)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    ours, theirs = metrics(stopped, "reft"), metrics(whole, "reft")
    for mine, other in zip(ours, theirs, strict=True):
        same = [key for key in other if not key.startswith(VARYING)]
        assert [mine[key] for key in same] == [other[key] for key in same]
    assert theirs[0]["kl"] == pytest.approx(0, abs=1e-5) and theirs[1]["kl"] != 0  # to the base, the adapter off
    assert 1e-4 < theirs[0]["sampler_gap_mean"] < 0.05  # rollouts are in int8, scoring and updates in float32
    assert size(whole / "models" / "reft") < size(whole / "toy" / "model") / 2


def test_every_stage_trains_an_adapter_of_the_model_below(whole):
    """Self-training of both kinds and the rerankers too; every model is in the table."""
    of = {path.parent.name: json.loads(path.read_text())["of"] for path in whole.glob("models/*/adapter.json")}
    below = {"warmup": "", "sft": "", "self_train_offline": "", "self_train_online": "warmup", "reft": "warmup"}
    judged = below.keys() - {"warmup"}
    assert of == below | {f"rerank_{name}": name for name in judged}
    for name in ("self_train_online", "self_train_offline", "rerank_reft"):
        lines = metrics(whole, name)
        assert lines and all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines), name
    rows = json.loads((whole / "report.json").read_text())["rows"]
    assert len(rows) == len(below) and sum(bool(row["rerank"] and row["voting"]) for row in rows) == len(judged)


def test_solve_merges_the_adapters_of_the_chain(whole):
    solve = [sys.executable, "-m", "reft_jax", "solve", f"--model={whole / 'models' / 'reft'}", "2 and 3?"]
    solved = subprocess.run([*solve, "--max_len=64"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert solved.returncode == 0, solved.stderr
    assert solved.stdout.startswith('def solution():\n    """2 and 3?"""')


def test_exports_of_the_chain_agree(warmed_up):
    """The whole model, and its adapter relative to the base model, which has the ranks of SFT and of ReFT."""
    folder, settings = warmed_up
    for name, flags in (("whole", []), ("adapter", ["--adapter"])):
        done = run("export", folder / "sft", *settings, "--model=sft", f"--out_dir={folder / 'out' / name}", *flags)
        assert done.returncode == 0, done.stderr
    base, merged = (
        load_file(path / "model.safetensors") for path in (folder / "sft" / "toy" / "model", folder / "out" / "whole")
    )
    tensors = load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{end}.weight"] for end in "AB")
    assert np.abs(b).max() > 1e-4
    np.testing.assert_allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 32 / 4 * b @ a, atol=1e-5)
    name = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(merged[name], base[name])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = [
            on_a_mesh(Path(scratch) / "steps", shape, save) for shape, save in (((1, 4, 2), True), ((2, 1, 4), False))
        ]
    print(json.dumps(found))
