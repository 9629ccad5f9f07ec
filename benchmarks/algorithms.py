"""Which algorithm learns the toy best from the same number of generated tokens? Several seeds, every run listed.

    python benchmarks/algorithms.py --workdir=runs/algorithms [--tokens=120000] [--seeds=1,2,3] [--jobs=2]

The config is the quickstart's. A seed's algorithms start from one warm-up model. Each iteration trains on 128 sampled
solutions: ppo has 128 questions with one each, the others 16 questions with 8 each. dapo replaces questions whose
solutions all have the same score, at most twice. All else is the same. A run ends with the iteration that reaches
`--tokens` generated tokens (`rl.tokens`); those of replaced questions count. Checkpoints are chosen on the third split,
among the iterations of the run. Prints every run and writes the tables to WORKDIR/algorithms.md. Stop it at any time:
the same command resumes. Each job has one core and one device.
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
from reft_jax.evaluation.results import Answers, by_item, by_question
from reft_jax.train.metrics import read_metrics

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/algorithms", "folder for all runs")
flags.DEFINE_integer("tokens", 120_000, "generated tokens per run", lower_bound=1)
flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of data, weights, order and sampling")
flags.DEFINE_list("algorithms", ["ppo", "grpo", "rloo", "dapo"], "names of rl.algorithm")
flags.DEFINE_integer("jobs", 2, "runs at once, one core each", lower_bound=1)
GROUPS = {"rl.questions": 16, "rl.samples": 8}
OTHERS = {"ppo": {}, "dapo": GROUPS | {"rl.redraws": 2}}  # than GROUPS
SAME = {"rl.iterations": 100_000, "rl.eval_every": 5, "sft.stop_epoch": 10}  # the tokens end a run; 10: the warm-up's
WARMUP = ("toy", "sft", "models", "config.json", "versions.json")  # of its work directory, for each algorithm's
LAST = 0.25  # of the tokens: the share whose mean reward is shown


def folder(name: str, seed: str) -> Path:
    return Path(FLAGS.workdir) / f"{name}_{seed}"


def run(commands: list[str], name: str, seed: str, settings: dict, cores: Queue) -> bool:
    """Runs the commands in WORKDIR/NAME_SEED; output goes to WORKDIR/NAME_SEED.log. Whether all succeeded."""
    workdir, core = folder(name, seed), cores.get()
    given = SAME | settings | {"rl.tokens": FLAGS.tokens, "seed": seed, "mesh.cpu_devices": 1}
    given["compiled"] = Path(FLAGS.workdir).absolute() / "compiled"
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
    settings = {"rl.algorithm": name} | OTHERS.get(name, GROUPS)
    if not (workdir / "report.json").exists() and not run(["reft", "evaluate"], name, seed, settings, cores):
        return None
    lines, done = read_metrics(workdir / "reft"), json.loads((workdir / "reft/done.json").read_text())
    row = next(row for row in json.loads((workdir / "report.json").read_text())["rows"] if row["model"] == "ReFT")
    tokens = np.cumsum([line["tokens"] for line in lines])
    late = [line["reward"] for line, so_far in zip(lines, tokens, strict=True) if so_far > (1 - LAST) * tokens[-1]]
    return {
        "reward": np.mean(late),
        "dev": (done["start_dev_top1"], done["best_dev_top1"], done["best"]),
        "test": (row["top1"]["correct"], row["top1"]["total"]),
        "iterations": len(lines),
        "tokens": int(tokens[-1]),
        "seconds": sum(line["seconds"] for line in lines),
    }


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def table(found: dict) -> list[str]:
    """Every run."""
    lines = [
        "| algorithm | seed | tokens | iterations | s | reward, at the end | warm-up, dev | best, dev (iteration) "
        "| test, 95 % |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, seed), one in found.items():
        if one is None:
            lines.append(f"| {name} | {seed} | failed | | | | | | |")
            continue
        (start, best, at), (correct, total) = one["dev"], one["test"]
        cells = [f"{one['tokens']:,}", str(one["iterations"]), f"{one['seconds']:.0f}", f"{one['reward']:.3f}"]
        cells += [percent(start), f"{percent(best)} ({at})", share(correct, total)]
        lines.append(f"| {name} | {seed} | {' | '.join(cells)} |")
    return lines


def share(correct: int, total: int) -> str:
    low, high = wilson(correct, total)
    return f"{percent(correct / total)} [{percent(low)}, {percent(high)}]"


def pooled(found: dict) -> list[str]:
    """Every algorithm over its seeds, against ppo on the seeds that both have."""
    lines = [
        "| algorithm | seeds | tokens | s | reward, at the end | test, 95 % | minus ppo, 95 % | minus ppo, per seed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in FLAGS.algorithms:
        runs = {seed: one for (its, seed), one in found.items() if its == name and one}
        if not runs:
            continue
        tokens, seconds, reward = (
            np.mean([one[key] for one in runs.values()]) for key in ("tokens", "seconds", "reward")
        )
        correct, total = (sum(one["test"][i] for one in runs.values()) for i in (0, 1))
        cells = [str(len(runs)), f"{tokens:,.0f}", f"{seconds:.0f}", f"{reward:.3f}", share(correct, total)]
        lines.append(f"| {name} | {' | '.join(cells + against_ppo(found, name))} |")
    return lines


def answers(name: str, seed: str) -> np.ndarray:
    records = read_records(folder(name, seed) / "samples" / f"reft_test{GREEDY}", GREEDY_KIND)
    return by_question(Answers(name, by_item(records), {}, {}), "top1")


def against_ppo(found: dict, name: str) -> list[str]:
    """The difference in points with its interval, and that of each seed."""
    seeds = [seed for seed in FLAGS.seeds if found.get((name, seed)) and found.get(("ppo", seed))]
    if name == "ppo" or not seeds:
        return ["–", "–"]
    pairs = [(answers(name, seed), answers("ppo", seed)) for seed in seeds]
    difference, low, high = (100 * x for x in paired_bootstrap(*map(np.concatenate, zip(*pairs, strict=True)), seed=0))
    each = ", ".join(f"{100 * (ours.mean() - ppo.mean()):+.1f}" for ours, ppo in pairs)
    return [f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]", each]


def check_budget() -> None:
    for path in sorted(Path(FLAGS.workdir).glob("*/config.json")):
        if (before := json.loads(path.read_text())["rl.tokens"]) != FLAGS.tokens:
            sys.exit(f"{path}: was run with --tokens={before}; use that, or choose another --workdir")


def main(_: list[str]) -> None:
    Path(FLAGS.workdir).mkdir(parents=True, exist_ok=True)
    check_budget()
    cores, runs = Queue(), [(name, seed) for seed in FLAGS.seeds for name in FLAGS.algorithms]
    for core in range(FLAGS.jobs):
        cores.put(core)
    with ThreadPoolExecutor(FLAGS.jobs) as pool:
        warm = {seed: pool.submit(warm_up, seed, cores) for seed in FLAGS.seeds}
        trained = pool.map(lambda one: train(*one, cores) if warm[one[1]].result() else None, runs)
        found = dict(sorted(zip(runs, trained, strict=True), key=lambda one: FLAGS.algorithms.index(one[0][0])))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    lines = [f"`python {' '.join(sys.argv)}` on {machine}", "", *pooled(found), "", *table(found), ""]
    lines += [
        "- Tokens: all that were sampled for training; s: seconds of the iterations, on one core. Above means per run.",
        f"- Reward at the end: mean over the iterations in the last {LAST:.0%} of the tokens.",
        "- Dev and test: correct greedy answers in %. Intervals are over questions, with the seeds pooled.",
    ]
    text = "\n".join(lines) + "\n"
    (Path(FLAGS.workdir) / "algorithms.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    app.run(main)
