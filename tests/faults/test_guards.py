"""What a run does about NaN and infinite numbers, steps that never end, and changed settings or data."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import starts

from reft_jax.run.guards import Guards, check_finite
from reft_jax.types import NotFiniteError, Stopped


def test_a_loss_that_is_no_number_stops_the_run_with_its_inputs(cache, tmp_path):
    done = starts.run("sft", tmp_path, cache, "--config.sft.learning_rate=1e30")
    assert done.returncode == 3, done.stderr
    error = done.stderr.splitlines()[-1]
    step = int(error.removeprefix("error: sft ").partition(":")[0])
    about = json.loads((tmp_path / "sft" / f"not_finite_{step}.json").read_text())
    inputs = np.load(tmp_path / "sft" / f"not_finite_{step}.npz")
    assert about["step"] == step and {"nan", "inf"} & set(about["numbers"].values())
    assert len(about["item_ids"]) == 16 and about["item_ids"][0] in error
    rows = json.loads((tmp_path / "toy" / "train.json").read_text())
    assert set(about["item_ids"]) <= {row["item_id"] for row in rows}
    assert inputs["tokens"].shape == inputs["segments"].shape and inputs["weight"].sum() == pytest.approx(1)
    assert starts.saved_steps(tmp_path, "sft") == ([3] if step > 3 else [])


def test_only_numbers_that_are_none_are_reported(tmp_path):
    check_finite(tmp_path, 7, {"loss": 1.0}, ["gsm8k_1"], {})
    with pytest.raises(NotFiniteError, match="7: kl is nan; items gsm8k_1; its inputs are in"):
        check_finite(tmp_path, 7, {"loss": 1.0, "kl": float("nan")}, ["gsm8k_1"], {"tokens": np.arange(3)})
    assert np.load(tmp_path / "not_finite_7.npz")["tokens"].tolist() == [0, 1, 2]


HANGS = """
import threading, time
from reft_jax.run.guards import Guards

def never_ends():
    threading.Event().wait()

with Guards(watchdog_minutes=2 / 60) as guards:
    for _ in range(6):
        time.sleep(0.5)
        guards.step()
    print("steps ended for 3 s", flush=True)
    never_ends()
"""


def test_the_watchdog_ends_a_process_whose_steps_do_not_end():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], env=starts.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == "steps ended for 3 s\n"
    assert "Timeout" in done.stderr and "in never_ends" in done.stderr


def test_a_signal_is_seen_at_the_next_safe_point_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Guards() as guards:
        guards.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            guards.check()
        with pytest.raises(Stopped):
            guards.step()
    assert signal.getsignal(signal.SIGTERM) is before
    Guards().check()
