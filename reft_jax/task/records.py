"""Files of graded answers: one question record a line (see task/voting.py), read, checked and graded again.

Beside `NAME.jsonl` with n samples a question may lie `NAME.greedy.jsonl`, the same with one greedy answer, and
`NAME.rerank.jsonl`, `{"item_id", "probabilities"}`: the reranker's, of the distinct completions in order.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from reft_jax.store import writing
from reft_jax.task import answers
from reft_jax.task.prompts import PROGRAM_HEAD
from reft_jax.task.voting import vote, voted_correct
from reft_jax.types import Example, InputError, Verdict

GREEDY, RERANK = ".greedy.jsonl", ".rerank.jsonl"


def question_record(example: Example, texts: Sequence[str], verdicts: Sequence[Verdict]) -> dict:
    """What became of the completions of one question."""
    predictions = [
        {"completion": text, "solving_res": verdict.value, "correctness": verdict.correct}
        for text, verdict in zip(texts, verdicts, strict=True)
    ]
    return {
        "item_id": example.item_id,
        "question": example.question,
        "answer_value": example.answer_value,
        "predictions": predictions,
    } | votes(predictions)


def votes(predictions: list[dict]) -> dict:
    return {
        "most_voted_answer": vote([prediction["solving_res"] for prediction in predictions]),
        "is_correct": voted_correct(predictions),
    }


def read_lines(path: Path) -> list[dict]:
    """The records of a file that this program appends to; none if there is no file. A last line torn by a crash is left
    out; InputError if any other is not JSON."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); remove it, and it is made again") from error
    return records


@contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """The file, open at the end of its last whole line. It is written by the line: a crash loses none. SaveError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        with path.open("a", encoding="utf-8", buffering=1) as file:
            yield file


def read_records(path: Path) -> list[dict]:
    """Question records from anywhere: one a line, or the authors' JSON list; votes are counted when they are graded.

    Raises InputError, naming file, record (from 0) and field, unless every record has what grading needs.
    """
    try:
        text = path.read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip().startswith("[") else read_lines(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it from a copy") from error
    if not records:
        raise InputError(f"{path}: holds no records; sample first")
    for index, record in enumerate(records):
        where = f"{path}: record {index}"
        if not isinstance(record, dict):
            raise InputError(f"{where} is no object; this is no file of samples")
        for field, kind in (("item_id", str), ("answer_value", str), ("predictions", list)):
            if not isinstance(record.get(field), kind):
                raise InputError(f"{where}, field {field!r}: must be a {kind.__name__}; this is no file of samples")
        for prediction in record["predictions"]:
            if not isinstance(prediction, dict) or not {"completion", "solving_res"} <= prediction.keys():
                raise InputError(f"{where}, field 'predictions': each needs completion and solving_res; sample again")
        dataset = answers.dataset_of(record["item_id"])
        if answers.read_target(dataset, record["answer_value"]) is None:
            raise InputError(f"{where}, field 'answer_value': {record['answer_value']!r} is no answer of {dataset}")
    if len({len(record["predictions"]) for record in records}) > 1:
        raise InputError(f"{path}: the questions have different numbers of predictions; finish sampling first")
    return records


def regrade(records: list[dict], run_programs: answers.RunPrograms | None = None) -> tuple[list[dict], int]:
    """The records graded again, and how many predictions got another value or another verdict than they had.

    Without `run_programs` the stored values are read again as answers, and nothing is executed; with it every program
    runs again and every text is read again (a completion with `def solution():` in it is a program).
    """
    again, changed = [], 0
    verdicts = _executed(records, run_programs) if run_programs else map(_stored, _flat(records))
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


def _stored(pair: tuple[Example, dict]) -> Verdict:
    example, prediction = pair
    value = answers.read_answer(answers.dataset_of(example.item_id), prediction["solving_res"])
    return answers.judge(value, "stored", example)


def _executed(records: list[dict], run_programs: answers.RunPrograms) -> Iterator[Verdict]:
    """All programs in one call: equal ones run once."""
    flat = [(example, prediction["completion"]) for example, prediction in _flat(records)]
    is_program = [PROGRAM_HEAD.strip() in text for _, text in flat]
    graded = {}
    for engine in ("python", "nl"):
        chosen = [i for i, program in enumerate(is_program) if program == (engine == "python")]
        examples, texts = [flat[i][0] for i in chosen], [flat[i][1] for i in chosen]
        graded |= zip(chosen, answers.grade(texts, examples, engine, run_programs=run_programs), strict=True)
    return (graded[i] for i in range(len(flat)))
