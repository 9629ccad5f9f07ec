"""Reads, checks and regrades sample files, which hold one question record per line (see evaluation/voting.py).

`NAME.jsonl` holds n samples per question. Two more files may be next to it: `NAME.greedy.jsonl` with one greedy answer
per question, and `NAME.rerank.jsonl` with the reranker's probabilities of the distinct completions, in order.
docs/sample_files.md describes the schema. evaluation/provenance.py decides what of a file may be used again.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reft_jax.evaluation.voting import deduplicate, vote, voted_correct
from reft_jax.store import read_text, short_hash
from reft_jax.tasks.answers import RunPrograms, grade
from reft_jax.tasks.prompts import PROGRAM_HEAD
from reft_jax.tasks.registry import PAPER, Task
from reft_jax.types import Example, InputError, Verdict

SCHEMA = 1
GREEDY, RERANK = ".greedy.jsonl", ".rerank.jsonl"
SAMPLES_KIND, GREEDY_KIND, RERANK_KIND = "samples", "greedy", "rerank"
LARGEST = int(sys.float_info.max)
AGAIN = "correct the file or sample again"


class SampleFile(NamedTuple):
    """The content of a sample file.

    headers: what made the file (none in older files and in the authors'). records: in the order of the file.
    torn: whether the last line is incomplete, as after a crash or while it is written. repeats: whether a question
    came twice, the second time with more samples.
    """

    headers: list[dict]
    records: list[dict]
    torn: bool
    repeats: bool


def prediction(text: str, verdict: Verdict) -> dict:
    """The prediction (evaluation/voting.py) of one completion."""
    return {"completion": text, "solving_res": verdict.value, "correctness": verdict.correct}


def answered(example: Example, predictions: list[dict]) -> dict:
    """The record of a question with these predictions."""
    return {
        "item_id": example.item_id,
        "question": example.question,
        "answer_value": example.answer_value,
        "predictions": predictions,
    } | votes(predictions)


def votes(predictions: list[dict]) -> dict:
    """The voted answer of these predictions, and whether it is correct."""
    return {
        "most_voted_answer": vote([prediction["solving_res"] for prediction in predictions]),
        "is_correct": voted_correct(predictions),
    }


def first_samples(record: dict, n: int) -> dict:
    """The record as if only n samples had been drawn: a sample depends on its number, not on the number of samples."""
    if len(record["predictions"]) == n:
        return record
    return record | {"predictions": record["predictions"][:n]} | votes(record["predictions"][:n])


def scored(record: dict, probabilities: Sequence[float]) -> dict:
    """The reranker's record of a question: its probabilities of the distinct completions, in order."""
    completions = [short_hash(one["completion"]) for one in deduplicate(record["predictions"])]
    about = {key: record[key] for key in ("item_id", "question", "answer_value")}
    return about | {"completions": completions, "probabilities": list(probabilities)}


# --- reading


def read_file(path: Path, kind: str, task: Task = PAPER) -> SampleFile:
    """Reads a sample file of this kind (SAMPLES_KIND, …), ours or the authors' JSON list, and checks every field.

    Raises InputError, with file, record (from 0) and field, for anything that the schema does not allow.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        values, torn = _parsed(text, f"{path}: is not JSON", "restore it from a copy"), False
    else:
        values, torn = _lines(path, text)
    headers = [value for value in values if _is_header(value)]
    for header in headers:
        _check_header(header, path)
    records: dict[str, dict] = {}
    rows = [value for value in values if not _is_header(value)]
    for index, record in enumerate(rows):
        where = f"{path}: record {index}"
        _check_record(record, where, kind, task)
        item_id = record["item_id"]
        before = records.get(item_id)
        if before and not (headers and _extends(record, before)):
            first = next(i for i, one in enumerate(rows) if one["item_id"] == item_id)
            raise InputError(f"{where}, field 'item_id': {item_id!r} is already in record {first}; remove one of them")
        records[item_id] = record
    return SampleFile(headers, list(records.values()), torn, len(rows) > len(records))


def read_records(path: Path, kind: str = SAMPLES_KIND, task: Task = PAPER) -> list[dict]:
    """Reads the records of a finished file, ours or the authors'. `regrade` counts their votes.

    Raises InputError as `read_file` does, and also if the file has no records, a line is cut off, or questions have
    different numbers of predictions.
    """
    file = read_file(path, kind, task)
    if file.torn:
        raise InputError(f"{path}: the last line is cut off; finish sampling, or remove that line")
    if not file.records:
        raise InputError(f"{path}: it holds no records; sample first")
    if kind != RERANK_KIND:
        n = 1 if kind == GREEDY_KIND else len(file.records[0]["predictions"])
        for index, record in enumerate(file.records):
            if (found := len(record["predictions"])) != n:
                expected = "one greedy answer is expected" if kind == GREEDY_KIND else f"record 0 has {n}"
                told = f"record {index}, {record['item_id']!r}, has {found}; {expected}"
                problem = f"{path}: the questions have different numbers of predictions ({told})"
                raise InputError(f"{problem}; finish sampling first")
    return file.records


def _lines(path: Path, text: str) -> tuple[list, bool]:
    """Returns the values of the lines that are not blank, and whether the last line was torn and left out."""
    lines = text.split("\n")  # not splitlines(): a JSON string may hold U+2028 and similar characters
    last, values = len(lines), []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(_parsed(line, f"{path}: line {number} is not JSON", "remove it; it will be made again"))
        except InputError:
            if number < last:
                raise
            return values, True
    return values, False


def _parsed(text: str, problem: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{problem} (brackets are nested too deep); {remedy}") from None
    except ValueError as error:
        raise InputError(f"{problem} ({error}); {remedy}") from error


def _is_header(value: Any) -> bool:
    return isinstance(value, dict) and "schema" in value and "item_id" not in value


def _check_header(header: dict, path: Path) -> None:
    if header["schema"] != SCHEMA:
        raise InputError(
            f"{path}: schema {header['schema']!r}, but this version reads {SCHEMA}; use the version that wrote it"
        )
    for field, kind in (("kind", str), ("made_by", dict), ("recorded", dict)):
        if not isinstance(header.get(field), kind):
            raise InputError(f"{path}: the header's field {field!r} is {_kind(header.get(field))}; {AGAIN}")


def _extends(record: dict, before: dict) -> bool:
    """Whether a later line is the same question with more samples, as a run with a larger n writes it."""
    same = all(record[key] == before[key] for key in ("question", "answer_value"))
    there, longer = before.get("predictions", ()), record.get("predictions", ())
    return same and 0 < len(there) < len(longer) and longer[: len(there)] == there


def _check_record(record: Any, where: str, kind: str, task: Task) -> None:
    if not isinstance(record, dict):
        raise InputError(f"{where} is {_kind(record)}, not an object; this is not a file of samples")
    scores = kind == RERANK_KIND
    needed = ("item_id",) if scores else ("item_id", "question", "answer_value")
    for field in needed:
        if type(record.get(field)) is not str:
            raise InputError(f"{where}, field {field!r}: is {_kind(record.get(field))}, not a string; {AGAIN}")
    field = "probabilities" if scores else "predictions"
    if not isinstance(record.get(field), list) or not record[field]:
        problem = "is empty" if record.get(field) == [] else f"is {_kind(record.get(field))}, not a list"
        raise InputError(f"{where}, field {field!r}: {problem}; {'score again' if scores else AGAIN}")
    if scores:
        _check_scores(record, where)
        return
    try:
        task = task.of(record["item_id"])
    except InputError as error:
        raise InputError(f"{where}, field 'item_id': {error}") from error
    if task.target(record["answer_value"]) is None:
        problem = f"{record['answer_value']!r} is not an answer of {task.name}"
        raise InputError(f"{where}, field 'answer_value': {problem}; correct the file")
    for number, one in enumerate(record["predictions"]):
        if problem := _problem(one):
            raise InputError(f"{where}, field 'predictions': number {number} {problem}; {AGAIN}")


def _problem(one: Any) -> str:
    """What is wrong with a prediction; '' if nothing is."""
    if type(one) is not dict:
        return f"is {_kind(one)}, not an object: each needs completion and solving_res"
    if type(one.get("completion")) is not str or "solving_res" not in one:
        absent = "completion" if type(one.get("completion")) is not str else "solving_res"
        return f"has no {absent} of the right kind: each needs completion and solving_res"
    value = one["solving_res"]
    if not (value is None or type(value) in (float, str)):
        if type(value) is not int:
            return f"has a solving_res that is {_kind(value)}, not a number, a string or null"
        if not -LARGEST <= value <= LARGEST:
            return "has an integer as solving_res that is too large for an answer"
    if type(one.get("correctness", False)) is not bool:
        return f"has a correctness that is {_kind(one['correctness'])}, not true or false"
    return ""


def _check_scores(record: dict, where: str) -> None:
    for number, probability in enumerate(record["probabilities"]):
        if type(probability) not in (int, float) or not 0 <= probability <= 1:  # NaN is not
            said = probability if type(probability) in (int, float) else _kind(probability)
            raise InputError(
                f"{where}, field 'probabilities': number {number} is {said}, not a number from 0 to 1; score again"
            )
    hashes = record.get("completions")
    kinds = list(map(type, hashes)) if type(hashes) is list else []
    if hashes is not None and kinds != [str] * len(record["probabilities"]):
        raise InputError(f"{where}, field 'completions': is not one string for each probability; score again")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "missing or null"}
    return names.get(type(value), "a number")


# --- grading again


def regrade(records: list[dict], run_programs: RunPrograms | None = None, task: Task = PAPER) -> tuple[list[dict], int]:
    """Grade the records again: (records, number of predictions whose value or verdict changed).

    Without `run_programs` the stored values are read again as answers, and no program runs. With it every program runs
    again and every text is read again; a completion that contains `def solution():` is a program.
    """
    again, changed = [], 0
    verdicts = _executed(records, run_programs, task) if run_programs else _stored(records, task)
    for record in records:
        predictions = []
        for old in record["predictions"]:
            verdict = next(verdicts)
            new = old | {"solving_res": verdict.value, "correctness": verdict.correct}
            changed += any(new[key] != old.get(key) for key in ("solving_res", "correctness"))
            predictions.append(new)
        again.append(record | {"predictions": predictions} | votes(predictions))
    return again, changed


def _flat(records: list[dict]) -> Iterator[tuple[Example, dict]]:
    for record in records:
        example = Example(record["item_id"], "", record["answer_value"])
        yield from ((example, prediction) for prediction in record["predictions"])


def _stored(records: list[dict], task: Task) -> Iterator[Verdict]:
    for example, prediction in _flat(records):
        one, raw = task.of(example.item_id), prediction["solving_res"]
        yield one.judge(None if raw is None else one.read(raw), "stored", example)


def _executed(records: list[dict], run_programs: RunPrograms, task: Task) -> Iterator[Verdict]:
    """Runs all programs in one call, so that equal ones run once."""
    flat = [(example, prediction["completion"]) for example, prediction in _flat(records)]
    is_program = [PROGRAM_HEAD.strip() in text or task.want == "tests" for _, text in flat]
    graded = {}
    for answer_format in ("python", "nl"):
        chosen = [i for i, program in enumerate(is_program) if program == (answer_format == "python")]
        examples, texts = [flat[i][0] for i in chosen], [flat[i][1] for i in chosen]
        graded |= zip(chosen, grade(texts, examples, answer_format, task, run_programs=run_programs), strict=True)
    return (graded[i] for i in range(len(flat)))
