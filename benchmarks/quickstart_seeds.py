"""Does ReFT beat the best SFT checkpoint, and when? Runs the embedded default and its controls over several seeds.

    python benchmarks/quickstart_seeds.py --workdir=runs/seeds [--seeds=1,2,3] [--jobs=2]

Each seed has three conditions with the same questions:
    mixed       the default, 30 % of the annotations skip steps; the whole pipeline
    clean       no annotation skips steps; SFT and ReFT
    good only   only the default's 70 % good annotations; SFT
Checkpoints are chosen on the third split. Prints every run and writes the tables to WORKDIR/seeds.md. What is finished
in WORKDIR is not run again. Each job has one core and one device, which is faster in total than two virtual devices
per run.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
from absl import app, flags

from reft_jax.evaluation.intervals import paired_bootstrap
from reft_jax.evaluation.records import GREEDY, GREEDY_KIND, read_records
from reft_jax.evaluation.results import Answers, by_item, by_question

CONDITIONS = {
    "mixed": (["pipeline"], []),
    "clean": (["sft", "reft", "evaluate"], ["--config.toy.skipped_share=0.0"]),
    "good only": (["sft", "evaluate"], ["--config.toy.drop_skipped=true"]),
}
FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/seeds", "folder for all runs")
flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of data, weights, order and sampling")
flags.DEFINE_integer("jobs", 2, "runs at once, one core each", lower_bound=1)
flags.DEFINE_list("conditions", list(CONDITIONS), "which conditions to run")


def folder(condition: str, seed: str) -> Path:
    return Path(FLAGS.workdir) / f"{condition.replace(' ', '_')}_{seed}"


def run(condition: str, seed: str, cores: Queue) -> dict | None:
    """The report of one run, or None if one of its commands failed. Output goes to WORKDIR/CONDITION_SEED.log."""
    commands, settings = CONDITIONS[condition]
    workdir = folder(condition, seed)
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}", f"--config.seed={seed}", *settings]
    core = cores.get()
    try:
        with open(f"{workdir}.log", "a") as log:
            for command in commands if not (workdir / "report.json").exists() else []:
                print(f"{condition}, seed {seed}: {command}", flush=True)
                line = ["taskset", "-c", str(core), sys.executable, "-m", "reft_jax", command, *arguments]
                if subprocess.run([*line, "--config.mesh.cpu_devices=1"], stdout=log, stderr=log).returncode:
                    print(f"{condition}, seed {seed}: {command} FAILED, see {log.name}", flush=True)
                    break
    finally:
        cores.put(core)
    report = workdir / "report.json"
    return json.loads(report.read_text()) if report.exists() else None


def answers(condition: str, seed: str, name: str) -> np.ndarray:
    records = read_records(folder(condition, seed) / "samples" / f"{name}_test{GREEDY}", GREEDY_KIND)
    return by_question(Answers(name, by_item(records), {}, {}), "top1")


def gap_of(report: dict) -> dict | None:
    """The report's comparison of ReFT with SFT in top-1."""
    pairs = {(found["a"], found["b"], found["column"]): found for found in report["comparisons"]}
    return pairs.get(("ReFT", "SFT", "top1"))


def percent(cell: dict | None) -> str:
    return f"{100 * cell['correct'] / cell['total']:.1f}" if cell else ""


def top1_table(reports: dict) -> list[str]:
    lines = [
        "| annotations | seed | SFT warm-up | best SFT (epoch of all) | ReFT (iteration) | ReFT − SFT, points |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (condition, seed), report in reports.items():
        if report is None:
            lines.append(f"| {condition} | {seed} | failed | | | |")
            continue
        cells = {row["model"]: percent(row["top1"]) for row in report["rows"]}
        sft, reft, comparison = report["stages"]["sft"], report["stages"].get("reft"), gap_of(report)
        reft_cell = f"{cells['ReFT']} ({reft['best']})" if reft else ""
        gap = f"{100 * comparison['difference']:+.1f}" if comparison else ""
        best = f"{cells['SFT']} ({sft['best']} of {sft['epochs']})"
        lines.append(f"| {condition} | {seed} | {cells['SFT warm-up']} | {best} | {reft_cell} | {gap} |")
    return lines


def pooled(reports: dict, condition: str, seeds: list[str]) -> str:
    done = [seed for seed in seeds if reports.get((condition, seed)) and gap_of(reports[condition, seed])]
    if not done:
        return f"{condition}: no finished run"
    reft, sft = (np.concatenate([answers(condition, seed, name) for seed in done]) for name in ("reft", "sft"))
    difference, low, high = (100 * x for x in paired_bootstrap(reft, sft, seed=0))
    return (
        f"{condition}, {len(done)} seeds pooled, {len(reft)} questions: SFT {100 * sft.mean():.1f} %, "
        f"ReFT {100 * reft.mean():.1f} %, difference {difference:+.1f} points, 95 % [{low:+.1f}, {high:+.1f}] "
        "(paired bootstrap)"
    )


def sampled_table(reports: dict) -> list[str]:
    lines = ["| seed | model | top-1 | voting | rerank | upper bound |", "| --- | --- | --- | --- | --- | --- |"]
    for (condition, seed), report in reports.items():
        for row in report["rows"] if report and condition == "mixed" else []:
            cells = [percent(row.get(key)) for key in ("top1", "voting", "rerank", "upper_bound")]
            if cells[1]:
                lines.append(f"| {seed} | {row['model']} | {' | '.join(cells)} |")
    return lines


def main(_: list[str]) -> None:
    Path(FLAGS.workdir).mkdir(parents=True, exist_ok=True)
    cores, runs = Queue(), [(condition, seed) for condition in FLAGS.conditions for seed in FLAGS.seeds]
    for core in range(FLAGS.jobs):
        cores.put(core)
    with ThreadPoolExecutor(FLAGS.jobs) as pool:
        reports = dict(zip(runs, pool.map(lambda one: run(*one, cores), runs), strict=True))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    lines = [f"`python {' '.join(sys.argv)}` on {machine}", "", *top1_table(reports), ""]
    lines += [f"- {pooled(reports, c, FLAGS.seeds)}" for c in FLAGS.conditions if c != "good only"]
    lines += ["", *sampled_table(reports)]
    text = "\n".join(lines) + "\n"
    (Path(FLAGS.workdir) / "seeds.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    app.run(main)
