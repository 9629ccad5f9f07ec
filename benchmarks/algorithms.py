"""Which algorithm learns the toy best from the same number of sampled solutions? Several seeds, every run listed.

    python benchmarks/algorithms.py --workdir=runs/algorithms [--seeds=1,2,3] [--algorithms=ppo,dapo] [--jobs=2]

The config is the quickstart's. A seed's algorithms start from one warm-up model. Each iteration has 128 sampled
solutions: ppo has 128 questions with one each, the others 16 questions with 8 each; all else is the same. Checkpoints
are chosen on the third split. Prints every run and writes the tables to WORKDIR/algorithms.md. What is finished in
WORKDIR is not run again. Each job has one core and one device.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
from absl import app, flags

from reft_jax.evaluation.intervals import paired_bootstrap, wilson
from reft_jax.evaluation.records import GREEDY, GREEDY_KIND, read_records
from reft_jax.train.metrics import read_metrics

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/algorithms", "folder for all runs")
flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of data, weights, order and sampling")
flags.DEFINE_list("algorithms", ["ppo", "grpo", "rloo", "dapo"], "names of rl.algorithm")
flags.DEFINE_integer("jobs", 2, "runs at once, one core each", lower_bound=1)
GROUPS = {"rl.questions": 16, "rl.samples": 8}
WARMUP = ("toy", "sft", "models", "config.json", "versions.json")  # of its work directory, for each algorithm's
LAST = 10  # iterations whose mean reward is shown


def folder(name: str, seed: str) -> Path:
    return Path(FLAGS.workdir) / f"{name}_{seed}"


def run(commands: list[str], name: str, seed: str, settings: dict, cores: Queue) -> bool:
    """Runs the commands in WORKDIR/NAME_SEED; output goes to WORKDIR/NAME_SEED.log. Whether all succeeded."""
    workdir, core = folder(name, seed), cores.get()
    given = settings | {"seed": seed, "mesh.cpu_devices": 1, "compiled": Path(FLAGS.workdir).absolute() / "compiled"}
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}"]
    arguments += [f"--config.{key}={value}" for key, value in given.items()]
    arguments += [f"--allow_config_change={','.join(settings)}"] if settings else []
    try:
        with open(f"{workdir}.log", "a") as log:
            for command in commands:
                print(f"{name}, seed {seed}: {command}", flush=True)
                line = ["taskset", "-c", str(core), sys.executable, "-m", "reft_jax", command, *arguments]
                if subprocess.run(line, stdout=log, stderr=log).returncode:
                    print(f"{name}, seed {seed}: {command} FAILED, see {log.name}", flush=True)
                    return False
    finally:
        cores.put(core)
    return True


def warm_up(seed: str, cores: Queue) -> bool:
    return (folder("warmup", seed) / "sft/done.json").exists() or run(["sft"], "warmup", seed, {}, cores)


def train(name: str, seed: str, cores: Queue) -> dict | None:
    """What `table` shows of one run; None if one of its commands failed."""
    workdir = folder(name, seed)
    if not (workdir / "versions.json").exists():  # the last that is copied
        for part in WARMUP:
            source = folder("warmup", seed) / part
            if source.is_dir():
                shutil.copytree(source, workdir / part, dirs_exist_ok=True)
            else:
                workdir.mkdir(exist_ok=True)
                shutil.copy(source, workdir / part)
    settings = {"rl.algorithm": name} | (GROUPS if name != "ppo" else {})
    if not (workdir / "report.json").exists() and not run(["reft", "evaluate"], name, seed, settings, cores):
        return None
    lines, done = read_metrics(workdir / "reft"), json.loads((workdir / "reft/done.json").read_text())
    row = next(row for row in json.loads((workdir / "report.json").read_text())["rows"] if row["model"] == "ReFT")
    return {
        "reward": np.mean([line["reward"] for line in lines[-LAST:]]),
        "dev": (done["start_dev_top1"], done["best_dev_top1"], done["best"]),
        "test": (row["top1"]["correct"], row["top1"]["total"]),
        "tokens": sum(line["tokens"] for line in lines),
        "seconds": sum(line["seconds"] for line in lines),
    }


def percent(*shares: float) -> str:
    return " to ".join(f"{100 * share:.1f}" for share in shares)


def table(found: dict) -> list[str]:
    lines = [
        f"| algorithm | seed | reward, last {LAST} | dev, warm-up | dev, best (iteration) | test, 95 % | tokens | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, seed), one in found.items():
        if one is None:
            lines.append(f"| {name} | {seed} | failed | | | | | |")
            continue
        (start, best, at), (correct, total) = one["dev"], one["test"]
        test = f"{percent(correct / total)} ({percent(*wilson(correct, total))})"
        cells = [f"{one['reward']:.3f}", percent(start), f"{percent(best)} ({at})", test, str(one["tokens"])]
        lines.append(f"| {name} | {seed} | {' | '.join(cells)} | {one['seconds']:.0f} |")
    return lines


def answers(name: str, seed: str) -> np.ndarray:
    records = read_records(folder(name, seed) / "samples" / f"reft_test{GREEDY}", GREEDY_KIND)
    return np.array([record["is_correct"] for record in records])


def against_ppo(found: dict, name: str) -> str:
    seeds = [seed for seed in FLAGS.seeds if found.get((name, seed)) and found.get(("ppo", seed))]
    if not seeds:
        return f"{name}: no seed that ppo has too"
    ours, ppo = (np.concatenate([answers(one, seed) for seed in seeds]) for one in (name, "ppo"))
    difference, low, high = (100 * x for x in paired_bootstrap(ours, ppo, seed=0))
    return (
        f"{name} − ppo, {len(seeds)} seeds pooled, {len(ours)} test questions: {difference:+.1f} points, 95 % "
        f"[{low:+.1f}, {high:+.1f}] (paired bootstrap)"
    )


def main(_: list[str]) -> None:
    Path(FLAGS.workdir).mkdir(parents=True, exist_ok=True)
    cores, runs = Queue(), [(name, seed) for seed in FLAGS.seeds for name in FLAGS.algorithms]
    for core in range(FLAGS.jobs):
        cores.put(core)
    with ThreadPoolExecutor(FLAGS.jobs) as pool:
        warm = dict(zip(FLAGS.seeds, pool.map(lambda seed: warm_up(seed, cores), FLAGS.seeds), strict=True))
        trained = pool.map(lambda one: train(*one, cores) if warm[one[1]] else None, runs)
        found = dict(sorted(zip(runs, trained, strict=True), key=lambda one: FLAGS.algorithms.index(one[0][0])))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    lines = [f"`python {' '.join(sys.argv)}` on {machine}", "", *table(found), ""]
    lines += [f"- {against_ppo(found, name)}" for name in FLAGS.algorithms if name != "ppo"]
    text = "\n".join(lines) + "\n"
    (Path(FLAGS.workdir) / "algorithms.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    app.run(main)
