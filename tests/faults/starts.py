"""Small runs, started as a user starts them, and comparisons of their results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
toy.train_rows=48 toy.dev_rows=6 toy.test_rows=7 toy.vocab_size=400 toy.layers=1 toy.hidden_size=16 toy.mlp_size=32
toy.heads=2 sft.epochs=2 sft.warmup_epoch=1 sft.eval_every=1 rl.iterations=12 rl.questions=16 rl.micro_batch=8
rl.minibatches=1 rl.value_init=1.0 rl.save_every=3 rl.eval_every=4 rl.max_prompt=192 rl.max_len=224
sft.max_len=224 sample.max_len=224 sample.n=2 sample.train_n=2 sample.train_limit=8 engine.slots=16 rerank.epochs=2
rerank.batch_size=8 rerank.micro_batch=8 rerank.max_len=448 data.pad_multiple=224 mesh.cpu_devices=1
""".split()
# What two runs of one command need not share: times, and what depends on when a process was started.
VARYING = ("seconds", "compiles", "executor_retries", "made")
LIMIT_S = 300.0


def command(name: str, workdir: Path, cache: Path, *arguments: str, at: tuple = ("none", 0, "SIGKILL")) -> list[str]:
    """The command line of `python -m reft_jax NAME`, hit at (point, number, signal); see driver.py."""
    driver = [sys.executable, str(ROOT / "tests" / "faults" / "driver.py"), *map(str, at)]
    settings = [f"--config.{setting}" for setting in [*CONFIG, f"compiled={cache}"]]
    return [*driver, name, f"--config={ROOT / 'configs/quickstart.py'}", f"--workdir={workdir}", *settings, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT_S
    )


def lines(workdir: Path, stage: str) -> list[dict]:
    """The metrics of a stage without what varies."""
    found = [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(VARYING)} for line in found]


def constant(value):
    """A JSON value without what varies."""
    if isinstance(value, dict):
        return {key: constant(entry) for key, entry in value.items() if not key.startswith(VARYING)}
    return [constant(entry) for entry in value] if isinstance(value, list) else value


def result(workdir: Path, stage: str) -> dict:
    """done.json of a stage, with the checksum of its last state, without what varies."""
    return constant(json.loads((workdir / stage / "done.json").read_text()))


def arrays(workdir: Path, model: str) -> dict[str, str]:
    """The checksums of a saved model's arrays."""
    return json.loads((workdir / "models" / model / "arrays.json").read_text())


def samples(workdir: Path, name: str) -> list[dict]:
    """The questions of a sweep in one order; each stands there once."""
    lines = (workdir / "samples" / f"{name}.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "item_id" in record]  # the header says when and where
    assert len({record["item_id"] for record in records}) == len(records)
    return sorted(records, key=lambda record: record["item_id"])


def before_ppo(reference: Path, workdir: Path) -> None:
    """A work directory as it is when SFT has ended."""
    for name in ("toy", "sft", "models/warmup", "models/sft"):
        shutil.copytree(reference / name, workdir / name)
    for name in ("config.json", "versions.json"):
        shutil.copy(reference / name, workdir / name)


def saved_steps(workdir: Path, stage: str) -> list[int]:
    """Those that a restart can use."""
    folders = (workdir / stage / "checkpoints").glob("[0-9]*")
    return sorted(int(folder.name) for folder in folders if (folder / "manifest.json").exists())
