"""The numbers of a table from graded answers alone: no model, no program, no accelerator."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reft_jax.evaluation.intervals import mcnemar, paired_bootstrap
from reft_jax.evaluation.records import GREEDY, GREEDY_KIND, RERANK, RERANK_KIND, read_records, text_hash
from reft_jax.evaluation.subsets import rerank_at, sizes, upper_bound_at, voting_at
from reft_jax.evaluation.voting import deduplicate, rerank_choice, upper_bound
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import InputError

COLUMNS = ("top1", "voting", "rerank", "upper_bound")


class Answers(NamedTuple):
    """One model's graded answers by item_id; empty where there are none.

    greedy, samples: question records with one and with n predictions. probabilities: of the distinct samples of a
    question, by the model's reranker.
    """

    model: str
    greedy: dict[str, dict]
    samples: dict[str, dict]
    probabilities: dict[str, list[float]]


def read_answers(model: str, path: Path, task: Task = PAPER) -> Answers:
    """What lies at `path` (NAME.jsonl) and beside it (see evaluation/records.py), as far as it is there.

    Raises InputError, naming file and item, where something is malformed, or where what lies beside the samples is
    about other questions or other completions.
    """
    samples, answers = by_item(read_records(path, task=task)), Answers(model, {}, {}, {})
    if (beside := path.with_suffix(GREEDY)).exists():
        answers = answers._replace(greedy=by_item(read_records(beside, GREEDY_KIND, task)))
        check_same(f"{beside}", answers.greedy, f"{path}", samples, task)
    if (beside := path.with_suffix(RERANK)).exists():
        scores = by_item(read_records(beside, RERANK_KIND))
        answers = answers._replace(probabilities={item_id: one["probabilities"] for item_id, one in scores.items()})
        check_scores(beside, scores, samples)
    return answers._replace(samples=samples)


def check_scores(path: Path, scores: dict[str, dict], samples: dict[str, dict]) -> None:
    """InputError unless every question's distinct completions have a probability each."""
    if scores.keys() != samples.keys():
        item = min(scores.keys() ^ samples.keys())
        problem = f"has no scores of {item}" if item in samples else f"has scores of {item}, which has no samples"
        raise InputError(f"{path}: {problem}; score again")
    for item_id, record in samples.items():
        distinct, score = deduplicate(record["predictions"]), scores[item_id]
        if len(distinct) != len(score["probabilities"]):
            have = f"{len(score['probabilities'])} probabilities, but there are {len(distinct)} distinct completions"
            raise InputError(f"{path}: {item_id}, field 'probabilities': {have}; score again")
        hashes = [text_hash(one["completion"]) for one in distinct] if "completions" in score else None
        if score.get("completions") != hashes:
            raise InputError(
                f"{path}: {item_id}, field 'completions': these are not the samples' completions; score again"
            )


def by_item(records: Sequence[dict]) -> dict[str, dict]:
    return {record["item_id"]: record for record in records}


def by_question(answers: Answers, column: str) -> np.ndarray | None:
    """bool[Q], questions in the order of their ids: whether the model has each right by greedy decoding ("top1"), by
    all its samples ("voting", "rerank"), or by any of them ("upper_bound"); None where there are no such answers."""
    records = answers.greedy if column == "top1" else answers.samples
    if not records or (column == "rerank" and not answers.probabilities):
        return None
    if column == "rerank":
        return np.array([_reranked(*pair) for pair in judged(answers)])
    if column == "upper_bound":
        return np.array([upper_bound(records[item_id]["predictions"]) for item_id in sorted(records)])
    return np.array([records[item_id]["is_correct"] for item_id in sorted(records)])


def judged(answers: Answers) -> Iterator[tuple[list[dict], list[float]]]:
    """(predictions, probabilities of the distinct ones) of each question, in the order of their ids."""
    for item_id in sorted(answers.samples):
        yield answers.samples[item_id]["predictions"], answers.probabilities[item_id]


def _reranked(predictions: list[dict], probabilities: list[float]) -> bool:
    distinct = deduplicate(predictions)
    choice = rerank_choice(distinct, probabilities)
    return choice is not None and distinct[choice]["correctness"]


def count(flags) -> dict:
    flags = list(flags)
    return {"correct": int(sum(map(bool, flags))), "total": len(flags)}


def row(answers: Answers, seed: int) -> dict:
    """A row of the table: n, counts {"correct", "total"} of COLUMNS and of the reranker's judgements, the curve, how
    many completions have no answer, and reranking compared with voting."""
    found = {"model": answers.model, "n": samples_each(answers)}
    flags = {column: by_question(answers, column) for column in COLUMNS}
    found |= {column: None if one is None else count(one) for column, one in flags.items()}
    found["no_answer"] = {
        kind: without_answer(records)
        for kind, records in (("greedy", answers.greedy), ("samples", answers.samples))
        if records
    }
    if answers.probabilities:
        found["classification_accuracy"] = judgements(answers)
        found["rerank_minus_voting"] = compared(flags["rerank"], flags["voting"], seed)
    if answers.samples:
        found["curve"] = curve(answers, seed)
    return found


def without_answer(records: dict[str, dict]) -> dict:
    """{"none", "total"}: completions of which no answer could be read, and all."""
    values = [prediction["solving_res"] for record in records.values() for prediction in record["predictions"]]
    return {"none": sum(value is None for value in values), "total": len(values)}


def judgements(answers: Answers) -> dict:
    """{"correct", "total", "base_rate"}: how often the reranker tells right from wrong among the distinct samples, and
    the share of whichever is more frequent: what always saying the same would reach."""
    pairs = [
        (prediction["correctness"], probability > 0.5)
        for predictions, row in judged(answers)
        for prediction, probability in zip(deduplicate(predictions), row, strict=True)
    ]
    share = sum(correct for correct, _ in pairs) / len(pairs)
    return count(correct == said for correct, said in pairs) | {"base_rate": max(share, 1 - share)}


def compared(a: np.ndarray, b: np.ndarray, seed: int) -> dict:
    """{"difference", "low", "high", "p"} of bool[Q] a minus b: shares, their 95 % interval by a paired bootstrap over
    questions, and McNemar's p-value."""
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
    """Every pair, the later one first, in top-1, voting and rerank where both have them, question by question.

    {"a", "b", "column"} and what `compared` gives. The intervals and p-values are those of each pair alone. Models with
    different numbers of samples are compared in top-1 only.
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
    """n; 0 without samples."""
    return next((len(record["predictions"]) for record in answers.samples.values()), 0)


def table(models: list[Answers], seed: int, task: Task = PAPER) -> dict:
    """{"test_questions", "n", "rows", "comparisons"} of models that answered the same questions.

    Raises InputError, naming a model and an item, where the answers of one are to other questions, or not to all.
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


def check_same(name: str, answered: dict[str, dict], other: str, asked: dict[str, dict], task: Task = PAPER) -> None:
    """InputError, naming an item, unless both are answers to the same questions with the same targets."""
    if different := answered.keys() ^ asked.keys():
        item = min(different)
        lacks, has = (name, other) if item in asked else (other, name)
        raise InputError(
            f"{name} answered other questions than {other} ({lacks} has no answer to {item}, {has} has one); compare "
            "what is alike"
        )
    for item, record in answered.items():
        before = asked[item]
        if record is before or all(record[key] == before[key] for key in ("question", "answer_value")):
            continue
        targets = [task.of(item).target(one["answer_value"]) for one in (record, before)]
        if record["question"] != before["question"] or targets[0] != targets[1]:
            field = "question" if record["question"] != before["question"] else "answer_value"
            raise InputError(
                f"{name} answered other questions than {other} ({item}, field {field!r}: {record[field][:60]!r} and "
                f"{before[field][:60]!r}); compare what is alike"
            )
