"""The embedded default over several seeds, with its controls: does ReFT beat the best SFT checkpoint, and when?

    python benchmarks/quickstart_seeds.py --workdir=runs/seeds [--seeds=1,2,3]

Three conditions a seed, the same questions in each: `mixed`, the default (30 % of the annotations skip steps), with the
whole pipeline; `clean`, no annotation skips steps, SFT and ReFT; `good only`, SFT on what the default's 70 % good
annotations leave. Checkpoints are chosen on the third split. Prints every run and writes the tables to
WORKDIR/seeds.md. What is done already in WORKDIR is not done again.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
from absl import app, flags

from reft_jax.task.intervals import paired_bootstrap

CONDITIONS = {
    "mixed": (["pipeline"], []),
    "clean": (["sft", "reft", "evaluate"], ["--config.toy.skipped_share=0.0"]),
    "good only": (["sft", "evaluate"], ["--config.toy.drop_skipped=true"]),
}
FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", "runs/seeds", "folder for all runs")
flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of data, weights, order and sampling")
flags.DEFINE_list("conditions", list(CONDITIONS), "which of them to run")


def run(condition: str, seed: str) -> dict | None:
    """The report of one run, or None if a command of it failed."""
    commands, settings = CONDITIONS[condition]
    folder = Path(FLAGS.workdir) / f"{condition.replace(' ', '_')}_{seed}"
    arguments = ["--config=configs/quickstart.py", f"--workdir={folder}", f"--config.seed={seed}", *settings]
    if not (folder / "report.json").exists():
        for command in commands:
            print(f"{condition}, seed {seed}: {command}", flush=True)
            if subprocess.run([sys.executable, "-m", "reft_jax", command, *arguments]).returncode:
                return None
    return json.loads((folder / "report.json").read_text())


def answers(condition: str, seed: str, name: str) -> np.ndarray:
    path = Path(FLAGS.workdir) / f"{condition.replace(' ', '_')}_{seed}" / "evaluations" / f"{name}.jsonl"
    return np.array([json.loads(line)["correctness"] for line in path.read_text().splitlines()])


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
        sft, reft, comparison = report["stages"]["sft"], report["stages"]["reft"], report["comparison"]
        reft_cell = f"{cells['ReFT']} ({reft['best_iteration']})" if reft else ""
        gap = f"{100 * comparison['difference']:+.1f}" if comparison else ""
        best = f"{cells['SFT']} ({sft['best_epoch']} of {sft['epochs']})"
        lines.append(f"| {condition} | {seed} | {cells['SFT warm-up']} | {best} | {reft_cell} | {gap} |")
    return lines


def pooled(reports: dict, condition: str, seeds: list[str]) -> str:
    done = [seed for seed in seeds if reports.get((condition, seed)) and reports[condition, seed]["comparison"]]
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


def main(argv: list[str]) -> None:
    reports = {(condition, seed): run(condition, seed) for condition in FLAGS.conditions for seed in FLAGS.seeds}
    lines = [f"`python {' '.join(argv)}` on {platform.machine()}, {platform.system()}", "", *top1_table(reports), ""]
    lines += [f"- {pooled(reports, c, FLAGS.seeds)}" for c in FLAGS.conditions if c != "good only"]
    lines += ["", *sampled_table(reports)]
    text = "\n".join(lines) + "\n"
    (Path(FLAGS.workdir) / "seeds.md").write_text(text)
    print("\n" + text)


if __name__ == "__main__":
    app.run(main)
