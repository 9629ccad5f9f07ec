"""Reads a work directory for the page: report, curves, the answers of every model, the rollouts of every iteration.

Nothing is sampled, graded or computed by a model, so a work directory can be read while a run writes to it.

The page's data are JSON values. `Chunk` lists below are compressed and opened one by one in the browser:

    answers   one question: {"item", "question", "answer", "models": [{"greedy", "samples"} or null, one per model]}.
              "greedy" and "samples" are {"prefix", "texts", "rows"}, or null. A text is prefix + texts[i]. A row is
              [i, value or null, correct, outcome, reward, parts or null, milliseconds, the reranker's probability];
              what is not known is null. Outcome, reward, parts and milliseconds come from the audit log.
    rollouts  one line of the audit log (page/log.py).
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from reft_jax.evaluation.curves import REFT_PANELS, SFT_PANELS, Panel, series
from reft_jax.evaluation.provenance import ASIDE
from reft_jax.evaluation.records import (
    GREEDY,
    GREEDY_KIND,
    RERANK,
    RERANK_KIND,
    SAMPLES_KIND,
    read_file,
)
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

    def programs(self, item: str = "") -> Iterator[tuple[str, str]]:
        """(item_id, hash of the completion) of every answer; with `item`, of the answers to this question."""
        for kinds in self.files.values():
            for kind in (GREEDY_KIND, SAMPLES_KIND):
                for one, record in kinds.get(kind, {}).items():
                    if item in ("", one):
                        yield from ((one, short_hash(text["completion"])) for text in record["predictions"])


def read_answered(workdir: Path) -> list[Answered]:
    """The answers under `samples/`, test questions first. InputError as `read_file`, or if there is no work directory.

    Leaves out what was moved aside. Unlike `evaluate`, it takes files that are not finished, and an incomplete last
    line.
    """
    settings = recorded(workdir)
    if settings is None and not (workdir / "samples").is_dir():
        raise InputError(f"--workdir: {workdir} is not a work directory; name the folder that a run writes to")
    settings = settings or {}
    task = load_task(settings.get("task", ""), settings.get("data.reading", "strict"))
    sets: dict[str, dict[str, dict[str, dict[str, dict]]]] = {}
    paths = (workdir / "samples").rglob("*.jsonl")
    for path in sorted(path for path in paths if path.parent.name != ASIDE):
        name, kind = _kind(path)
        model, _, split = name.rpartition("_")
        folder = path.parent.relative_to(workdir / "samples").as_posix()
        where = (split, model) if split in SPLITS and folder == "." else (folder if folder != "." else "answers", name)
        sets.setdefault(where[0], {}).setdefault(where[1], {})[kind] = _by_item(path, kind, task)
    in_order = sorted(sets, key=lambda name: _place(name, SPLITS))
    return [Answered(one, {name: sets[one][name] for name in sorted(sets[one], key=_place)}) for one in in_order]


def _place(name: str, order: tuple[str, ...] = ORDER) -> tuple[int, str]:
    """Names in this order come first, the models of a run as they are trained; then others by name."""
    return (order.index(name) if name in order else len(order)), name


def _kind(path: Path) -> tuple[str, str]:
    for suffix, kind in ((GREEDY, GREEDY_KIND), (RERANK, RERANK_KIND), (".jsonl", SAMPLES_KIND)):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix), kind
    raise AssertionError(path)


def _by_item(path: Path, kind: str, task: Task) -> dict[str, dict]:
    return {record["item_id"]: record for record in read_file(path, kind, task).records}


def question(answered: Answered, item: str, endings: dict) -> dict[str, Any]:
    """The value of one question in the list `answers`; endings as in `Log`."""
    kinds = list(answered.files.values())
    asked = next(one[kind][item] for one in kinds for kind in one if item in one[kind])
    return {
        "item": item,
        "question": asked.get("question", ""),
        "answer": asked.get("answer_value", ""),
        "models": [_of_model(one, item, endings) for one in kinds],
    }


def _of_model(kinds: dict[str, dict[str, dict]], item: str, endings: dict) -> dict | None:
    records = {kind: kinds.get(kind, {}).get(item) for kind in (GREEDY_KIND, SAMPLES_KIND, RERANK_KIND)}
    judged = records[RERANK_KIND] or {}
    scores = dict(zip(judged.get("completions") or (), judged.get("probabilities", ()), strict=False))  # by hash
    found = {
        "greedy": _answers(records[GREEDY_KIND], item, endings, {}),
        "samples": _answers(records[SAMPLES_KIND], item, endings, scores),
    }
    return found if any(found.values()) else None


def _answers(record: dict | None, item: str, endings: dict, scores: dict[str, float]) -> dict | None:
    if record is None:
        return None
    places: dict[str, int] = {}
    told: list[tuple] = []  # of each place: its ending and its score
    rows = []
    for one in record["predictions"]:
        place = places.setdefault(one["completion"], len(places))
        if place == len(told):
            program = short_hash(one["completion"])
            told.append((*endings.get((item, program), EMPTY), scores.get(program)))
        known = (place, shown(one["solving_res"]), one.get("correctness"), *told[place])
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
