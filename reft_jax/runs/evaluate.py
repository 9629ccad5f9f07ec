"""The table: greedy top-1, voting, reranking and upper bound of the models in a work directory."""

import json
from collections.abc import Callable
from functools import partial

import numpy as np

from reft_jax.config import flatten
from reft_jax.parallel import hosts
from reft_jax.runs.curves import plot_curves
from reft_jax.runs.report import print_table, write_report
from reft_jax.runs.rerank import rerank_scores
from reft_jax.runs.rollout import greedy
from reft_jax.runs.sample import read_samples, samples_path
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import POLICIES, TITLES, finished, load_model, model_folder
from reft_jax.task.intervals import paired_bootstrap, slope_interval
from reft_jax.task.voting import deduplicate, rerank_choice, upper_bound


def kept(run: Run, name: str, make: Callable[[], list[dict]]) -> list[dict]:
    """The records of evaluations/NAME.jsonl, made now if they are not there."""
    path = run.workdir / "evaluations" / f"{name}.jsonl"
    if not hosts.from_first(f"is {path} there?", path.exists):
        records = make()
        if hosts.is_first():
            path.parent.mkdir(exist_ok=True)
            whole = path.with_suffix(".tmp")
            whole.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            whole.rename(path)
        hosts.gather(f"{path} is written", None)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy_records(run: Run, name: str) -> list[dict]:
    """Greedy answers of one model to the test questions."""
    graded = greedy(run, load_model(run, name)["lm"], run.data.test, f"{name} top-1 on test")
    return [
        {"item_id": e.item_id, "completion": text, "solving_res": verdict.value, "correctness": verdict.correct}
        for e, (_, text, verdict) in zip(run.data.test, graded, strict=True)
    ]


def rerank_records(run: Run, name: str, records: list[dict]) -> list[dict]:
    """The reranker's probabilities for the distinct completions of each question."""
    scores = rerank_scores(run, name, records)
    return [{"item_id": r["item_id"], "probabilities": row} for r, row in zip(records, scores, strict=True)]


def count(flags) -> dict:
    flags = list(flags)
    return {"correct": sum(map(bool, flags)), "total": len(flags)}


def sampled_columns(run: Run, name: str) -> dict:
    """Voting, rerank and upper bound from the stored samples of one model; a column without its inputs is left out."""
    records = read_samples(samples_path(run, name, "test"))
    if len(records) < len(run.data.test):
        return {}
    columns = {
        "voting": count(record["is_correct"] for record in records),
        "upper_bound": count(upper_bound(record["predictions"]) for record in records),
    }
    if model_folder(run, f"rerank_{name}").exists():
        distinct = [deduplicate(record["predictions"]) for record in records]
        scored = kept(run, f"rerank_{name}", lambda: rerank_records(run, name, records))
        probabilities = [record["probabilities"] for record in scored]
        chosen = zip(distinct, map(rerank_choice, distinct, probabilities), strict=True)
        columns["rerank"] = count(i is not None and predictions[i]["correctness"] for predictions, i in chosen)
        columns["classification_accuracy"] = count(
            (probability > 0.5) == prediction["correctness"]
            for predictions, row in zip(distinct, probabilities, strict=True)
            for prediction, probability in zip(predictions, row, strict=True)
        )
    return columns


def metrics_lines(run: Run, stage: str) -> list[dict]:
    path = run.workdir / stage / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_evaluate(run: Run) -> dict:
    """Evaluates every policy that is there, writes report.md, report.json and curves.png, prints the table."""
    names = [name for name in POLICIES if model_folder(run, name).exists()]
    answers = {name: kept(run, name, partial(greedy_records, run, name)) for name in names}
    rows = [
        {"model": TITLES[name], "top1": count(r["correctness"] for r in answers[name])} | sampled_columns(run, name)
        for name in names
    ]
    comparison = None
    if {"sft", "reft"} <= set(names):
        reft, sft = (np.array([r["correctness"] for r in answers[name]]) for name in ("reft", "sft"))
        difference, low, high = paired_bootstrap(reft, sft, run.config.seed)
        comparison = {"a": "ReFT", "b": "SFT", "difference": difference, "low": low, "high": high}
    stages = {stage: finished(run, stage) for stage in ("sft", "reft", "rerank_sft", "rerank_reft")}
    report = {
        "title": run.config.name,
        "n": run.config.sample.n,
        "test_questions": len(run.data.test),
        "chosen_on": run.data.chosen_on,
        "rows": rows,
        "comparison": comparison,
        "notes": notes(run, stages, rows),
        "settings": flatten(run.config),
        "seconds": {stage: result["seconds"] for stage, result in stages.items() if result},
        "stages": stages,
    }
    if hosts.is_first():
        write_report(run.workdir, report)
        lines = [metrics_lines(run, stage) for stage in ("sft", "reft")]
        if any(lines):
            plot_curves(run.workdir, *lines, run.workdir / "curves.png")
        print_table(report)
    return report


def notes(run: Run, stages: dict, rows: list[dict]) -> list[str]:
    """What a reader of the table must know."""
    lines = []
    if run.config.model.path == "toy":
        lines.append(
            "A toy: generated word problems and a tiny Llama trained from scratch, to show that the machinery works. "
            f"{run.config.toy.skipped_share:.0%} of the annotations skip steps and write a value down"
            f"{', and are left out' if run.config.toy.drop_skipped else ''}."
        )
    if sft := stages["sft"]:
        lines.append(f"SFT: best epoch {sft['best']} of {sft['epochs']}, warm-up epoch {run.config.sft.warmup_epoch}.")
    if reft := stages["reft"]:
        rewards = [line["reward"] for line in metrics_lines(run, "reft")]
        line = f"ReFT: best iteration {reft['best']} of {reft['iterations']}"
        if len(rewards) >= 3:
            slope, low, high = (10 * x for x in slope_interval(np.array(rewards), run.config.seed))
            line += f"; slope of the mean reward {slope:+.3f} per 10 iterations [{low:+.3f}, {high:+.3f}]"
        lines.append(line + ".")
    for name in ("sft", "reft"):
        row = next((row for row in rows if row["model"] == TITLES[name]), {})
        if judged := row.get("classification_accuracy"):
            result = stages[f"rerank_{name}"]
            lines.append(
                f"{TITLES[name]} reranker: trained on {result['rows']} distinct samples of the warm-up model, "
                f"{result['positive']:.0%} correct; judges {judged['correct'] / judged['total']:.1%} of the "
                f"{judged['total']} distinct test samples rightly."
            )
    return lines
