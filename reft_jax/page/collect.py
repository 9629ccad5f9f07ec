"""Reads a work directory for the page: report, curves, the answers of every model, the rollouts of every iteration.

Nothing is sampled, graded or computed by a model, so a work directory can be read while a run writes to it.

The page's data are JSON values. `Chunk` lists below are compressed and opened one by one in the browser:

    answers   one question: {"item", "question", "answer", "models": [{"greedy", "samples"} or null, one per model]}.
              "greedy" and "samples" are {"prefix", "texts", "rows"}, or null. A text is prefix + texts[i]. A row is
              [i, value or null, correct, outcome, reward, parts or null, milliseconds, the reranker's probability];
              what is not known is null. Outcome, reward, parts and milliseconds come from the audit log.
    rollouts  one line of the audit log, without its purpose and iteration.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reft_jax.evaluation.curves import REFT_PANELS, SFT_PANELS, Panel, series
from reft_jax.evaluation.records import (
    GREEDY,
    GREEDY_KIND,
    RERANK,
    RERANK_KIND,
    SAMPLES_KIND,
    read_file,
)
from reft_jax.evaluation.voting import deduplicate
from reft_jax.run.executions import LOG_NAME, read_executions
from reft_jax.run.workdir import recorded
from reft_jax.store import read_text, short_hash
from reft_jax.tasks.registry import Task, load_task
from reft_jax.train.metrics import read_metrics
from reft_jax.types import InputError

GAP = Panel("sampler_gap", "ReFT: largest gap of sampler and trainer", "nats")
SPLITS = ("test", "train")
ORDER = ("warmup", "sft", "self_train_offline", "self_train_online", "reft")
EMPTY = (None, None, None, None)  # what the audit log does not know of a completion


class Answered(NamedTuple):
    """The answers to one set of questions: of a split, or of a data file of a sweep.

    files: {model: {kind: {item_id: record}}}.
    """

    name: str
    files: dict[str, dict[str, dict[str, dict]]]

    @property
    def items(self) -> list[str]:
        """The ids of the questions that a model has answered, ordered as numbers are."""
        found = {item for kinds in self.files.values() for records in kinds.values() for item in records}
        return sorted(found, key=lambda item: [(len(word), word) for word in item.split("_")])


class Log(NamedTuple):
    """The audit log, as the page needs it.

    endings: {(item_id, hash of the completion): (outcome, reward, parts, ms)}. rollouts: {(purpose, iteration): lines}.
    """

    endings: dict[tuple[str, str], tuple]
    rollouts: dict[tuple[str, int], list[dict]]


def read_log(workdir: Path) -> Log:
    """Reads the audit log; an iteration that was interrupted and repeated counts once, the last time."""
    log = Log({}, {})
    if not (workdir / LOG_NAME).exists():
        return log
    for line in read_executions(workdir / LOG_NAME):
        ending = line["outcome"], line["reward"], line.get("parts"), line["ms"]
        log.endings[line["item_id"], line["program"]] = ending
        if "iteration" in line:
            lines = log.rollouts.setdefault((line["purpose"], line["iteration"]), [])
            lines.append({key: value for key, value in line.items() if key not in ("purpose", "iteration", "program")})
    for lines in log.rollouts.values():
        starts = [i for i, line in enumerate(lines) if line["row"] == 0]
        del lines[: starts[-1] if starts else 0]
    return log


def read_answered(workdir: Path) -> list[Answered]:
    """The answers under `samples/`, test questions first. InputError as `read_file`, or if there is no work directory.

    Unlike `evaluate`, it takes files that are not finished, and an incomplete last line.
    """
    settings = recorded(workdir)
    if settings is None and not (workdir / "samples").is_dir():
        raise InputError(f"--workdir: {workdir} is not a work directory; name the folder that a run writes to")
    settings = settings or {}
    task = load_task(settings.get("task", ""), settings.get("data.reading", "strict"))
    sets: dict[str, dict[str, dict[str, dict[str, dict]]]] = {}
    for path in sorted((workdir / "samples").rglob("*.jsonl")):
        name, kind = _kind(path)
        model, _, split = name.rpartition("_")
        folder = path.parent.relative_to(workdir / "samples").as_posix()
        where = (split, model) if split in SPLITS and folder == "." else (folder if folder != "." else "answers", name)
        sets.setdefault(where[0], {}).setdefault(where[1], {})[kind] = _by_item(path, kind, task)
    ordered = {name: dict(sorted(models.items(), key=_place)) for name, models in sorted(sets.items())}
    return [Answered(name, models) for name, models in ordered.items()]


def _place(named: tuple[str, dict]) -> tuple[int, str]:
    """The models of a run in the order in which they are trained, then others by name."""
    return (ORDER.index(named[0]) if named[0] in ORDER else len(ORDER)), named[0]


def _kind(path: Path) -> tuple[str, str]:
    for suffix, kind in ((GREEDY, GREEDY_KIND), (RERANK, RERANK_KIND), (".jsonl", SAMPLES_KIND)):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix), kind
    raise AssertionError(path)


def _by_item(path: Path, kind: str, task: Task) -> dict[str, dict]:
    return {record["item_id"]: record for record in read_file(path, kind, task).records}


def question(answered: Answered, item: str, log: Log) -> dict[str, Any]:
    """The value of one question in the list `answers`."""
    kinds = list(answered.files.values())
    asked = next(one[kind][item] for one in kinds for kind in one if item in one[kind])
    return {
        "item": item,
        "question": asked.get("question", ""),
        "answer": asked.get("answer_value", ""),
        "models": [_of_model(one, item, log) for one in kinds],
    }


def _of_model(kinds: dict[str, dict[str, dict]], item: str, log: Log) -> dict | None:
    records = {kind: kinds.get(kind, {}).get(item) for kind in (GREEDY_KIND, SAMPLES_KIND, RERANK_KIND)}
    scores: dict[str, float] = {}
    if records[RERANK_KIND] and records[SAMPLES_KIND]:
        texts = [one["completion"] for one in deduplicate(records[SAMPLES_KIND]["predictions"])]
        given = records[RERANK_KIND]
        if given.get("completions") == list(map(short_hash, texts)):  # else it judges samples of another time
            scores = dict(zip(texts, given["probabilities"], strict=True))
    found = {
        "greedy": _answers(records[GREEDY_KIND], item, log, {}),
        "samples": _answers(records[SAMPLES_KIND], item, log, scores),
    }
    return found if any(found.values()) else None


def _answers(record: dict | None, item: str, log: Log, scores: dict[str, float]) -> dict | None:
    if record is None:
        return None
    places: dict[str, int] = {}
    endings: dict[str, tuple] = {}
    rows = []
    for one in record["predictions"]:
        text = one["completion"]
        place = places.setdefault(text, len(places))
        if text not in endings:
            endings[text] = log.endings.get((item, short_hash(text)), EMPTY)
        known = (place, shown(one["solving_res"]), one.get("correctness"), *endings[text], scores.get(text))
        rows.append([round(value, 4) if isinstance(value, float) else value for value in known])
    prefix = os.path.commonprefix(list(places))
    return {"prefix": prefix, "texts": [text[len(prefix) :] for text in places], "rows": rows}


def shown(value: float | str | None) -> str | None:
    """A value as text: JSON has neither NaN nor infinity, and a whole number reads better without `.0`."""
    if value is None or isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def summary(one: dict[str, Any]) -> list:
    """What filters need of a question: [item, question, models].

    models: one each, null or [greedy, right, none, n, timeouts, length].
    greedy: 1 right, 0 wrong, -1 without an answer, null if not asked. right, none, timeouts: numbers of samples; n: of
    all. length: of the longest completion, characters. Greedy answers count in timeouts and length.
    """
    return [one["item"], one["question"], [model and _counts(model) for model in one["models"]]]


def _counts(model: dict) -> list:
    greedy, samples = model["greedy"], (model["samples"] or {"rows": []})["rows"]
    first = greedy["rows"][0] if greedy else None
    verdict = None if first is None else -1 if first[1] is None else int(bool(first[2]))
    both = [one for one in (greedy, model["samples"]) if one]
    return [
        verdict,
        sum(bool(row[2]) for row in samples),
        sum(row[1] is None for row in samples),
        len(samples),
        sum(row[3] == "timeout" for one in both for row in one["rows"]),
        max(len(one["prefix"]) + max(map(len, one["texts"])) for one in both),
    ]


def of_iterations(log: Log) -> Iterator[tuple[dict[str, Any], list[dict]]]:
    """(summary, rollouts) of each iteration, in order."""
    for (purpose, number), lines in sorted(log.rollouts.items()):
        advantages = [line["advantage"] for line in lines if line.get("advantage") is not None]
        yield (
            {
                "purpose": purpose,
                "iteration": number,
                "rollouts": len(lines),
                "reward": sum(line["reward"] for line in lines) / len(lines),
                "positive": sum(advantage > 0 for advantage in advantages),
            },
            [line | {"value": shown(line["value"])} for line in lines],
        )


def read_reports(workdir: Path) -> list[dict]:
    """The report of a run, those of a sweep, or none yet."""
    for name in ("report.json", "sweep.json"):
        if (path := workdir / name).exists():
            try:
                found = json.loads(read_text(path))
            except ValueError as error:
                raise InputError(f"{path}: is not JSON ({error}); run `evaluate` again") from error
            return found if isinstance(found, list) else [found]
    return []


def curves(workdir: Path, reports: Iterable[dict]) -> list[dict]:
    """The charts: [{"title", "unit", "x": heading, "xs": [x], "lines": {name: [y or null]}}].

    Training curves as in curves.png; then voting, rerank and upper bound by k, one chart per model.
    """
    found = []
    for stage, x_key, x, panels in (
        ("sft", "epoch", "epoch", SFT_PANELS),
        ("reft", "step", "iteration", (*REFT_PANELS, GAP)),
    ):
        lines = read_metrics(workdir / stage)
        for panel in panels:
            xs, ys = series(lines, x_key, panel)
            if xs.size:
                numbers = [float(f"{y:.5g}") for y in ys]
                found.append(
                    {"title": panel.title, "unit": panel.unit, "x": x, "xs": xs.tolist(), "lines": {"": numbers}}
                )
    for report in reports:
        for row in report["rows"]:
            points = row.get("curve", [])
            lines = {
                name: [None if key not in point else 100 * point[key] for point in points]
                for name, key in (("voting", "voting"), ("rerank", "rerank"), ("upper bound", "upper_bound"))
                if any(key in point for point in points)
            }
            if points:
                title = f"{row['model']}: accuracy by samples per question"
                ks = [point["k"] for point in points]
                found.append(
                    {"title": title, "unit": "% of questions", "x": "samples per question, k", "xs": ks, "lines": lines}
                )
    return found
