"""The table of a work directory: greedy top-1, voting, reranking and upper bound of the models in it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain

import numpy as np

from reft_jax import executor
from reft_jax.config import flatten
from reft_jax.evaluation import results
from reft_jax.evaluation.curves import plot_curves
from reft_jax.evaluation.intervals import slope_interval
from reft_jax.evaluation.provenance import stored
from reft_jax.evaluation.records import first_samples
from reft_jax.evaluation.report import print_report, write_report
from reft_jax.evaluation.results import Answers, by_item, table
from reft_jax.page.build import try_page
from reft_jax.parallel import hosts
from reft_jax.run.about import made, versions
from reft_jax.run.open import Run
from reft_jax.run.watch import Collapse
from reft_jax.run.workdir import POLICIES, STAGES, TITLES
from reft_jax.stages import models
from reft_jax.stages.models import checksum, done
from reft_jax.stages.rerank import rerank_scores
from reft_jax.stages.rollout import program_limits
from reft_jax.stages.sample import greedy_answers, made_by
from reft_jax.store import published
from reft_jax.tasks.answerable import wrong_anyway
from reft_jax.tasks.registry import Task, load_task
from reft_jax.train.metrics import read_metrics
from reft_jax.train.trackers import Results


def answers_of(run: Run, name: str) -> tuple[Answers, list[str]]:
    """The answers of one model to the test questions, and notes for the reader.

    Makes greedy answers and reranker scores that are missing. Uses the samples that `sample` has made with this model,
    these settings and these questions: the first n of each question, n being what all of them have. If a question has
    none, all samples are left out.
    """
    path, title = run.workdir.samples(name, "test"), TITLES[name]
    test, wanted = run.inputs.data.test, run.config.sample.n
    weights = models.policy(run, name)
    greedy = by_item(greedy_answers(run, path, test, weights, f"{name} top-1 on test"))
    found = stored(path, made_by(run, weights, test, wanted), test)
    records, again = found.records, f"`sample --model={name}` makes the rest"
    if len(records) < len(test):
        why = found.refused or (f"{len(found.changed)} have another question or answer" if found.changed else "")
        why = f" ({path.name}: {why})" if why else ""
        note = f"{title}: {len(records)} of {len(test)} test questions are sampled{why}; {again}."
        return Answers(title, greedy, {}, {}), [note] if path.exists() or expected(run, name) else []
    n = min(wanted, *(len(record["predictions"]) for record in records.values()))
    notes = [f"{title}: {n} of {wanted} samples are drawn of every question; {again}."] if n < wanted else []
    samples = [first_samples(records[example.item_id], n) for example in test]
    scores, judge = {}, f"rerank_{name}"
    if published(run.workdir.model(judge)):
        scores = rerank_scores(run, path, samples, models.reranker(run, judge), f"{judge} on test")
    return Answers(title, greedy, by_item(samples), scores), notes


def expected(run: Run, name: str) -> bool:
    """Whether samples of this model are expected: others have theirs. The warm-up model's are optional."""
    return name != "warmup" and any(run.workdir.samples(other, "test").exists() for other in POLICIES)


def metrics_lines(run: Run, stage: str, result: dict) -> list[dict]:
    """The metrics of a stage. Adds a line for iteration 0, the start model, if `result` has its accuracy."""
    start = result.get("start_dev_top1")
    first = [] if start is None else [{"step": 0, "dev_top1": start}]
    return first + read_metrics(run.workdir.path / stage)


def run_evaluate(run: Run, both_readings: bool = False) -> dict:
    """Evaluates every policy that is there, writes report.md, .json and .html and curves.png, prints the table.

    both_readings: also read all answers in the way that `data.reading` is not.
    """
    # Before the first answer: a task without the other reading and a damaged done.json end the command here.
    readings = tasks(run) if both_readings else None
    stages = {stage: result for stage in STAGES if (result := done(run, stage))}
    lines = [metrics_lines(run, stage, stages.get(stage, {})) for stage in ("sft", "reft")]
    tracked = Results(run.workdir.path, run.config, versions())
    names = [name for name in POLICIES if published(run.workdir.model(name))]
    answers, remarks = zip(*(answers_of(run, name) for name in names), strict=True)
    found = table(answers, run.config.seed, run.inputs.task)
    report = {
        "title": run.config.name,
        "about": about(run),
        "chosen_on": run.inputs.data.chosen_on,
        "notes": [*chain(*remarks), *others(run, stages), *notes(run, stages, found["rows"])],
        "settings": flatten(run.config),
        "checksums": {name: made for one in names for name in (one, f"rerank_{one}") if (made := checksum(run, name))},
        "seconds": {stage: result["seconds"] for stage, result in stages.items()},
        "stages": stages,
    } | found
    if hosts.is_first():
        if readings:
            run_programs = partial(executor.run_programs, **program_limits(run.config))
            report["readings"] = results.both_readings(list(answers), run.config.seed, *readings, run_programs)
        write_report(run.workdir.path, report)
        if any(lines):
            plot_curves(run.workdir.path, *lines, run.workdir.path / "curves.png")
        print_report(report)
        files = ["report.md", "report.json", *["curves.png"] * any(lines)]
        tracked.close(results.shares(report["rows"]), [run.workdir.path / name for name in files])
        files += ["report.html"] * try_page(run.workdir.path)
        print(f"\n{', '.join(files)}: {run.workdir.path}")
    return report


def tasks(run: Run) -> tuple[Task, Task]:
    """The run's task, and the same task with the other reading."""
    other = {"strict": "lenient", "lenient": "strict"}[run.config.data.reading]
    return run.inputs.task, load_task(run.config.task, other)


def about(run: Run) -> dict[str, str]:
    """The report's first lines."""
    config, data = run.config, run.inputs.data
    model = f"toy, made from seed {config.seed}" if config.model.path == "toy" else config.model.path
    dev = config.data.dev or data.chosen_on
    files = (("train", config.data.train, data.train), ("dev", dev, data.dev), ("test", config.data.test, data.test))
    told = ", ".join(f"{split} {source} ({len(examples)} rows)" for split, source, examples in files)
    system = f", system prompt {config.data.system!r}" if config.data.system else ""
    prompt = {"prompt": f"in the model's chat template{system}"} if config.data.template == "chat" else {}
    return made() | {"model": model, "data": told} | prompt | {"curves": "curves.png"}


def others(run: Run, stages: dict) -> list[str]:
    """Lines about stages that were trained on data or from models that have changed since."""
    lines = []
    for stage, result in stages.items():
        if changed := models.changed_data(run, result):
            lines.append(f"{stage}: was trained with other {' and '.join(changed)} questions than there are now.")
        if told := models.other_sources(run, result):
            lines.append(f"{stage}: was trained from another model than there is now ({told}).")
    return lines


def notes(run: Run, stages: dict, rows: list[dict]) -> list[str]:
    """Notes that a reader of the table needs."""
    lines = []
    if wrong := wrong_anyway(run.inputs.prompter, run.inputs.data.test, run.config.sample.max_len, "test"):
        lines.append(f"{wrong}.")
    if run.config.model.path == "toy":
        lines.append(
            "A toy: generated word problems and a tiny Llama trained from scratch, to show that the machinery works. "
            f"{run.config.toy.skipped_share:.0%} of the annotations skip steps and write a value down"
            f"{', and are left out' if run.config.toy.drop_skipped else ''}."
        )
    if sft := stages.get("sft"):
        lines.append(f"SFT: best epoch {sft['best']} of {sft['epochs']}, warm-up epoch {run.config.sft.warmup_epoch}.")
    if offline := stages.get("self_train_offline"):
        best = f"best epoch {offline['best']} of {offline['epochs']}"
        lines.append(f"{TITLES['self_train_offline']}: {best}, {offline['rows']} rows.")
    for stage in ("self_train_online", "reft"):
        if result := stages.get(stage):
            lines += course(run, stage, result)
    for name in POLICIES:
        row = next((row for row in rows if row["model"] == TITLES[name]), {})
        judged, result = row.get("classification_accuracy"), stages.get(f"rerank_{name}")
        if judged and result:
            lines.append(
                f"{TITLES[name]} reranker: trained on {result['rows']} distinct samples of the warm-up model, "
                f"{result['positive']:.0%} correct; judges {judged['correct'] / judged['total']:.1%} of the "
                f"{judged['total']} distinct test samples correctly (always saying the more frequent of right and "
                f"wrong: {judged['base_rate']:.1%})."
            )
    return lines


def course(run: Run, stage: str, result: dict) -> Iterator[str]:
    """Notes on a stage of iterations: the best one, the slope of the reward, and whether the policy collapsed."""
    title, lines, collapse = TITLES[stage], metrics_lines(run, stage, result), Collapse(run.config.rl.questions)
    told = f"{title}: best iteration {result['best']} of {result['iterations']}"
    if not result["best"]:
        told += ", the warm-up model itself: no iteration was better on dev"
    rewards = [line["reward"] for line in lines if "reward" in line]
    if len(rewards) >= 3:
        slope, low, high = (10 * x for x in slope_interval(np.array(rewards), run.config.seed))
        told += f"; slope of the mean reward {slope:+.3f} per 10 iterations [{low:+.3f}, {high:+.3f}]"
    yield f"{told}."
    for line in lines:
        if ruin := collapse.add(line):
            yield f"{title}: from iteration {line['step']:.0f} on it is ruined: {ruin}."
