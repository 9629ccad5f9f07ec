"""Runs that are killed and started again end like an undisturbed run, bit for bit."""

import json
import random
import signal
from pathlib import Path

import pytest
import starts

# Where the short form kills: PPO within a rollout, an update and a save, every other stage once.
KILLS = [
    ("sft update", 3),
    ("chunk", 40),
    ("update", 9),
    ("manifest", 1),
    ("record", 3),
    ("rerank update", 3),
]


# The tiny model solves nothing, so all scores are 0: here a shorter response earns more.
SHORTER = """
from reft_jax.algo.algorithms import GRPO


class Shorter(GRPO):
    def rewards(self, scored):
        return super().rewards(scored) - 0.01 * scored.mask.sum(1)
"""


def assert_same_stage(stage: str, workdir: Path, reference: Path) -> None:
    assert starts.lines(workdir, stage) == starts.lines(reference, stage)
    assert starts.result(workdir, stage) == starts.result(reference, stage)
    for model in ("warmup", "sft") if stage == "sft" else (stage,):
        assert starts.arrays(workdir, model) == starts.arrays(reference, model)


def test_a_pipeline_killed_in_every_stage(reference, cache, tmp_path):
    done = starts.run("pipeline", tmp_path, cache, at=("sft update", 2, "SIGTERM"))  # within an epoch: saves there
    assert done.returncode == 75, done.stderr
    said = ""
    for point, number in KILLS:
        done = starts.run("pipeline", tmp_path, cache, at=(point, number, "SIGKILL"))
        assert done.returncode == -signal.SIGKILL and "hit at" in done.stderr, (point, done.stderr)
        said += done.stdout
        if point == "record":
            with (tmp_path / "samples" / "warmup_train.jsonl").open("a") as file:
                file.write('{"item_id": "toy_')  # a line that the kill cut short
    assert "sft: resuming after 2\n" in said and "reft: resuming after" in said
    done = starts.run("pipeline", tmp_path, cache)
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "reft", "rerank_sft", "rerank_reft"):
        assert_same_stage(stage, tmp_path, reference)
    for name in ("warmup_train", "sft_test", "reft_test"):
        assert starts.samples(tmp_path, name) == starts.samples(reference, name)
    ours, theirs = (starts.constant(json.loads((d / "report.json").read_text())) for d in (tmp_path, reference))
    assert ours == theirs
    assert [line["step"] for line in starts.lines(tmp_path, "reft")] == list(range(1, 13))


def test_grpo_killed_in_an_update_after_a_warm_up_with_a_value_head(reference, cache, tmp_path):
    """The warm-up model's value head is left out: nothing of it is in the steps and in the model that GRPO saves."""
    (tmp_path / "shorter.py").write_text(SHORTER)
    changed = {
        "rl.algorithm": f"{tmp_path / 'shorter.py'}:Shorter",
        "rl.questions": 4,
        "rl.samples": 4,
        "rl.iterations": 4,
        "rl.save_every": 1,
    }
    changed |= {"rl.sampler_correction": "mis", "rl.max_gap": 0.5}
    arguments = [f"--config.{key}={value}" for key, value in changed.items()]
    arguments.append(f"--allow_config_change={','.join(changed)}")
    workdirs = [tmp_path / "whole", tmp_path / "killed"]
    for workdir in workdirs:
        starts.before_ppo(reference, workdir)
    done = starts.run("reft", workdirs[0], cache, *arguments)
    assert done.returncode == 0, done.stderr
    done = starts.run("reft", workdirs[1], cache, *arguments, at=("update", 6, "SIGKILL"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = starts.run("reft", workdirs[1], cache, *arguments)
    assert done.returncode == 0 and "reft: resuming after" in done.stdout, done.stderr
    assert_same_stage("reft", *workdirs)
    assert all(
        "value_head" in name
        for name in starts.arrays(workdirs[0], "warmup").keys() - starts.arrays(workdirs[0], "reft")
    )
    lines = starts.lines(workdirs[0], "reft")
    assert all(line["grad_norm"] > 0 for line in lines) and not any("value" in name for name in lines[0])


@pytest.mark.long
def test_ppo_killed_ten_times_at_random_moments(reference, cache, tmp_path):
    """Half of the moments are times, wherever the process then is; half are places within an iteration."""
    rng, kills = random.Random(7), 0
    starts.before_ppo(reference, tmp_path)
    arguments = ["--config.rl.save_every=1", "--allow_config_change=rl.save_every"]
    while kills < 10:
        places = [("chunk", rng.randint(1, 12)), ("update", rng.randint(1, 2)), ("saving", 1), ("manifest", 1)]
        at = rng.choice(places) if kills % 2 else ("time", rng.randint(0, 2000))
        done = starts.run("reft", tmp_path, cache, *arguments, at=(*at, "SIGKILL"))
        assert done.returncode == -signal.SIGKILL, (at, kills, done.stderr)
        kills += 1
    done = starts.run("reft", tmp_path, cache, *arguments)
    assert done.returncode == 0, done.stderr
    assert_same_stage("reft", tmp_path, reference)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sft", "sample", "rerank"])
def test_other_stages_killed_three_times(reference, cache, tmp_path, name):
    points = {"sft": "sft update", "sample": "record", "rerank": "rerank update"}
    arguments = [] if name == "sft" else ["--model=sft"]
    if name != "sft":
        starts.before_ppo(reference, tmp_path)
    for number in (2, 3, 2):
        done = starts.run(name, tmp_path, cache, *arguments, at=(points[name], number, "SIGKILL"))
        assert done.returncode == -signal.SIGKILL, (number, done.stderr)
    done = starts.run(name, tmp_path, cache, *arguments)
    assert done.returncode == 0, done.stderr
    if name == "sample":
        assert starts.samples(tmp_path, "sft_test") == starts.samples(reference, "sft_test")
    else:
        assert_same_stage({"sft": "sft", "rerank": "rerank_sft"}[name], tmp_path, reference)
