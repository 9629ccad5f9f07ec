"""Computes the numbers of the tables from graded answers alone: no model, no program runs, no accelerator."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reft_jax.evaluation.intervals import mcnemar, paired_bootstrap
from reft_jax.evaluation.records import GREEDY, GREEDY_KIND, RERANK, RERANK_KIND, read_records, regrade
from reft_jax.evaluation.subsets import rerank_at, sizes, upper_bound_at, voting_at
from reft_jax.evaluation.voting import deduplicate, rerank_choice, upper_bound
from reft_jax.store import short_hash
from reft_jax.tasks.answers import RunPrograms
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import InputError

COLUMNS = ("top1", "voting", "rerank", "upper_bound")


class Answers(NamedTuple):
    """The graded answers of one model, by item_id; a dict is empty if its file does not exist.

    greedy: question records with one prediction. samples: question records with n predictions. probabilities: what the
    model's reranker gives to the distinct samples of a question.
    """

    model: str
    greedy: dict[str, dict]
    samples: dict[str, dict]
    probabilities: dict[str, list[float]]


def read_answers(model: str, path: Path, task: Task = PAPER) -> Answers:
    """Reads the samples at `path` (NAME.jsonl) and, if they exist, the greedy and rerank files next to it.

    See evaluation/records.py for the names. Raises InputError, with file and item, if a record is malformed, or if
    those files are about other questions or completions than the samples.
    """
    samples, answers = by_item(read_records(path, task=task)), Answers(model, {}, {}, {})
    if (greedy_file := path.with_suffix(GREEDY)).exists():
        answers = answers._replace(greedy=by_item(read_records(greedy_file, GREEDY_KIND, task)))
        check_same(f"{greedy_file}", answers.greedy, f"{path}", samples, task)
    if (scores_file := path.with_suffix(RERANK)).exists():
        scores = by_item(read_records(scores_file, RERANK_KIND))
        answers = answers._replace(probabilities={item_id: one["probabilities"] for item_id, one in scores.items()})
        check_scores(scores_file, scores, samples)
    return answers._replace(samples=samples)


def check_scores(path: Path, scores: dict[str, dict], samples: dict[str, dict]) -> None:
    """Raises InputError unless each distinct completion of every question has a probability."""
    if scores.keys() != samples.keys():
        item = min(scores.keys() ^ samples.keys())
        problem = f"has no scores of {item}" if item in samples else f"has scores of {item}, which has no samples"
        raise InputError(f"{path}: {problem}; score again")
    for item_id, record in samples.items():
        distinct, score = deduplicate(record["predictions"]), scores[item_id]
        if len(distinct) != len(score["probabilities"]):
            have = f"{len(score['probabilities'])} probabilities, but there are {len(distinct)} distinct completions"
            raise InputError(f"{path}: {item_id}, field 'probabilities': {have}; score again")
        hashes = [short_hash(one["completion"]) for one in distinct] if "completions" in score else None
        if score.get("completions") != hashes:
            problem = f"{item_id}, field 'completions': these are not the samples' completions"
            raise InputError(f"{path}: {problem}; score again")


def by_item(records: Sequence[dict]) -> dict[str, dict]:
    """The records by item_id."""
    return {record["item_id"]: record for record in records}


def by_question(answers: Answers, column: str) -> np.ndarray | None:
    """Returns bool[Q]: whether the model answers each question correctly. Questions are in the order of their ids.

    column: "top1" (greedy decoding), "voting" or "rerank" (over all samples), "upper_bound" (any of the samples).
    Returns None if the model has no such answers.
    """
    records = answers.greedy if column == "top1" else answers.samples
    if not records or (column == "rerank" and not answers.probabilities):
        return None
    if column == "rerank":
        return np.array([_reranked(*pair) for pair in judged(answers)])
    if column == "upper_bound":
        return np.array([upper_bound(records[item_id]["predictions"]) for item_id in sorted(records)])
    return np.array([records[item_id]["is_correct"] for item_id in sorted(records)])


def judged(answers: Answers) -> Iterator[tuple[list[dict], list[float]]]:
    """Yields (predictions, probabilities of the distinct ones) of each question, in the order of their ids."""
    for item_id in sorted(answers.samples):
        yield answers.samples[item_id]["predictions"], answers.probabilities[item_id]


def _reranked(predictions: list[dict], probabilities: list[float]) -> bool:
    distinct = deduplicate(predictions)
    choice = rerank_choice(distinct, probabilities)
    return choice is not None and distinct[choice]["correctness"]


def shares(rows: list[dict]) -> dict[str, float]:
    """The rows of the table as numbers for trackers: {"ReFT/top1": 0.448, …}."""
    counts = {f"{row['model']}/{column}": row[column] for row in rows for column in COLUMNS}
    return {name: found["correct"] / found["total"] for name, found in counts.items() if found}


def count(flags) -> dict:
    """{"correct", "total"} of these flags."""
    flags = list(flags)
    return {"correct": int(sum(map(bool, flags))), "total": len(flags)}


def row(answers: Answers, seed: int) -> dict:
    """Computes a row of the table.

    It has n, the counts {"correct", "total"} of COLUMNS and of the reranker's judgements, the curve, the number of
    completions without an answer, and reranking compared with voting. The schema is in evaluation/report.py.
    """
    found = {"model": answers.model, "n": samples_each(answers)}
    flags = {column: by_question(answers, column) for column in COLUMNS}
    found |= {column: None if one is None else count(one) for column, one in flags.items()}
    kinds = {"greedy": answers.greedy, "samples": answers.samples}
    found["no_answer"] = {kind: without_answer(records) for kind, records in kinds.items() if records}
    if answers.probabilities:
        found["classification_accuracy"] = judgements(answers)
        found["rerank_minus_voting"] = compared(flags["rerank"], flags["voting"], seed)
    if answers.samples:
        found["curve"] = curve(answers, seed)
    return found


def without_answer(records: dict[str, dict]) -> dict:
    """{"none", "total"}: the number of completions without a readable answer, and of all completions."""
    values = [prediction["solving_res"] for record in records.values() for prediction in record["predictions"]]
    return {"none": sum(value is None for value in values), "total": len(values)}


def judgements(answers: Answers) -> dict:
    """{"correct", "total", "base_rate"}: how often the reranker's judgement of a distinct sample is correct.

    base_rate: the share of the more frequent class, which a constant judgement would reach.
    """
    pairs = [
        (prediction["correctness"], probability > 0.5)
        for predictions, row in judged(answers)
        for prediction, probability in zip(deduplicate(predictions), row, strict=True)
    ]
    share = sum(correct for correct, _ in pairs) / len(pairs)
    return count(correct == said for correct, said in pairs) | {"base_rate": max(share, 1 - share)}


def compared(a: np.ndarray, b: np.ndarray, seed: int) -> dict:
    """{"difference", "low", "high", "p"} of a minus b, both bool[Q].

    The difference is one of shares; its 95 % interval comes from a paired bootstrap over questions, and p from
    McNemar's test.
    """
    difference, low, high = paired_bootstrap(a, b, seed)
    return {"difference": difference, "low": low, "high": high, "p": mcnemar(a, b)}


def curve(answers: Answers, seed: int) -> list[dict]:
    """[{"k", "voting", "rerank", "upper_bound"}]: shares for k = 1, 2, 4, … and all samples (evaluation/subsets.py)."""
    predictions = [answers.samples[item_id]["predictions"] for item_id in sorted(answers.samples)]
    *smaller, n = sizes(len(predictions[0]))
    voted = np.mean([voting_at(p, smaller, [seed, q]) for q, p in enumerate(predictions)], 0)
    points = []
    for k, voting in zip(smaller, voted, strict=True):
        point = {"k": k, "voting": voting, "upper_bound": np.mean([upper_bound_at(p, k) for p in predictions])}
        if answers.probabilities:
            point["rerank"] = np.mean([rerank_at(*pair, k) for pair in judged(answers)])
        points.append(point)
    whole = {column: by_question(answers, column) for column in COLUMNS[1:]}
    points.append({"k": n} | {column: flags.mean() for column, flags in whole.items() if flags is not None})
    return [{key: value if key == "k" else float(value) for key, value in point.items()} for point in points]


def comparisons(models: list[Answers], seed: int) -> list[dict]:
    """Compares every pair of models, the later minus the earlier, in top-1, voting and rerank where both have them.

    Each entry has "a", "b", "column" and what `compared` returns. Intervals and p-values are not corrected for the
    number of pairs. Models with different numbers of samples are compared in top-1 only.
    """
    found = []
    for b, a in combinations(models, 2):
        for column in COLUMNS[:3]:
            pair = [by_question(one, column) for one in (a, b)]
            alike = column == "top1" or samples_each(a) == samples_each(b)
            if alike and all(flags is not None for flags in pair):
                found.append({"a": a.model, "b": b.model, "column": column} | compared(*pair, seed))
    return found


def samples_each(answers: Answers) -> int:
    """The number of samples per question; 0 without samples."""
    return next((len(record["predictions"]) for record in answers.samples.values()), 0)


def table(models: list[Answers], seed: int, task: Task = PAPER) -> dict:
    """{"test_questions", "n", "rows", "comparisons"} of models that answered the same questions.

    Raises InputError, with a model and an item, if a model answered other questions, or not all of them.
    """
    asked = models[0].greedy or models[0].samples
    for one in models:
        for answered in (one.greedy, one.samples):
            if answered:
                check_same(one.model, answered, models[0].model, asked, task)
        if one.probabilities and one.probabilities.keys() != one.samples.keys():
            have = f"{len(one.probabilities)} of {len(one.samples)} questions"
            raise InputError(f"{one.model}: the reranker has judged {have}; finish it first")
    rows = [row(one, seed) for one in models]
    n = max(map(samples_each, models), default=0)
    return {"test_questions": len(asked), "n": n, "rows": rows, "comparisons": comparisons(models, seed)}


def both_readings(models: list[Answers], seed: int, task: Task, other: Task, run_programs: RunPrograms) -> list[dict]:
    """Compares two readings of the same completions; they are never mixed in one number.

    Args:
        models: their answers, graded as `task` reads.
        task, other: the same task with its two readings. All programs run again for the second one.
        seed: of the intervals.

    Returns: for each model and column that it has, {"model", "column", "strict": {"correct", "total"}, "lenient": the
    same} and what `compared` returns for lenient minus strict.
    """
    found = []
    for one in models:
        again = {
            kind: by_item(regrade(list(records.values()), run_programs, other)[0]) if records else {}
            for kind, records in (("greedy", one.greedy), ("samples", one.samples))
        }
        read = {task.reading: one, other.reading: one._replace(**again)}
        for column in COLUMNS:
            flags = {reading: by_question(read[reading], column) for reading in ("strict", "lenient")}
            if flags["strict"] is not None:
                counts = {reading: count(right) for reading, right in flags.items()}
                difference = compared(flags["lenient"], flags["strict"], seed)
                found.append({"model": one.model, "column": column} | counts | difference)
    return found


def check_same(name: str, answered: dict[str, dict], other: str, asked: dict[str, dict], task: Task = PAPER) -> None:
    """Raises InputError, with an item, unless both answered the same questions with the same targets."""
    problem, remedy = f"{name} answered other questions than {other}", "compare answers to the same questions"
    if different := answered.keys() ^ asked.keys():
        item = min(different)
        lacks, has = (name, other) if item in asked else (other, name)
        raise InputError(f"{problem} ({lacks} has no answer to {item}, {has} has one); {remedy}")
    for item, record in answered.items():
        before = asked[item]
        if record is before or all(record[key] == before[key] for key in ("question", "answer_value")):
            continue
        targets = [task.of(item).target(one["answer_value"]) for one in (record, before)]
        if record["question"] != before["question"] or targets[0] != targets[1]:
            field = "question" if record["question"] != before["question"] else "answer_value"
            both = f"{record[field][:60]!r} and {before[field][:60]!r}"
            raise InputError(f"{problem} ({item}, field {field!r}: {both}); {remedy}")
