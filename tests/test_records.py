"""Sample files: graded again from their stored answers or by running the programs, and turned into a table."""

import json
import math
from pathlib import Path

import pytest

from reft_jax.executor import ExecResult
from reft_jax.runs.regrade import sample_files
from reft_jax.runs.results import Answers, by_item, comparisons, read_answers, table
from reft_jax.task.provenance import appending
from reft_jax.task.records import question_record, read_lines, read_records, regrade
from reft_jax.types import Example, InputError, Verdict


def record(item_id: str, answer_value: str, *predictions: tuple) -> dict:
    keys = ("completion", "solving_res", "correctness")
    return {
        "item_id": item_id,
        "question": "?",
        "answer_value": answer_value,
        "predictions": [dict(zip(keys, values, strict=True)) for values in predictions],
    }


# What the authors' code stores: NaN and infinity as answers, 'none' or a digit for a MathQA program without a letter.
THEIRS = [
    record("gsm8k_1", "1,080", ("a", 1080.0, True), ("b", math.nan, False), ("c", 7.0, False), ("d", math.nan, False)),
    record("mathqa_1", "c", ("a", "none", False), ("b", "7", False), ("c", "7", False), ("d", "c", True)),
    record("mathqa-numeric_1", "3", ("a", "3.001", False), ("b", None, False), ("c", math.inf, False), ("d", 4, True)),
]


def test_stored_answers_are_read_by_the_rules_of_their_dataset():
    graded, changed = regrade(THEIRS)
    values = [[p["solving_res"] for p in one["predictions"]] for one in graded]
    assert values == [[1080.0, None, 7.0, None], [None, None, None, "c"], [3.001, None, None, 4.0]]
    assert [[p["correctness"] for p in one["predictions"]] for one in graded] == [
        [True, False, False, False],
        [False, False, False, True],
        [True, False, False, False],
    ]
    # Two NaN; 'none' and two digits; "3.001" as a number and right, infinity, and a 4 that was called right.
    assert changed == 2 + 3 + 3
    # NaN does not win the vote any more; a letter is the only valid answer of MathQA; the first of equals wins.
    assert [one["most_voted_answer"] for one in graded] == [1080.0, "c", 3.001]
    assert [one["is_correct"] for one in graded] == [True, True, True]
    assert THEIRS[0]["predictions"][2]["solving_res"] == 7.0 and "is_correct" not in THEIRS[0]  # the input is kept
    assert regrade(graded)[1] == 0


def test_executing_runs_programs_once_and_reads_texts():
    program, ran = "def solution():\n    return 3", []

    def run_programs(programs, *, want):
        ran.append((want, list(programs)))
        return [ExecResult(3.0, "ok") if want == "number" else ExecResult(" 'C' ", "ok") for _ in programs]

    said = "So 4.\nTherefore, the answer is: 4"
    records = [
        record("svamp_1", "3", (program, 9.0, False), (said, 3.0, True), ("no answer", 3.0, True)),
        record(
            "mathqa_1", "c", (program, "a", False), (program, "c", True), ("Therefore, the answer is: b", "b", False)
        ),
    ]
    graded, changed = regrade(records, run_programs)
    assert ran == [("number", [program]), ("text", [program, program])]
    values = [[p["solving_res"] for p in one["predictions"]] for one in graded]
    assert values == [[3.0, 4.0, None], ["c", "c", "b"]]
    assert changed == 4


def test_a_record_has_the_authors_names():
    verdicts = [Verdict(3.0, True, 1.0, "ok"), Verdict(None, False, 0.0, "timeout")]
    made = question_record(Example("svamp_1", "1 + 2?", "3"), ["a", "b"], verdicts)
    assert made == record("svamp_1", "3", ("a", 3.0, True), ("b", None, False)) | {
        "question": "1 + 2?",
        "most_voted_answer": 3.0,
        "is_correct": True,
    }


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "deep" / "reft_test.jsonl"
    assert read_lines(path) == []
    with appending(path) as file:
        file.write('{"a": "\u2028"}\n{"b"')
    assert read_lines(path) == [{"a": "\u2028"}]
    with appending(path) as file:
        file.write('{"c": 2}\n')
    assert read_lines(path) == [{"a": "\u2028"}, {"c": 2}]


def test_files_of_both_kinds_are_read_and_what_is_none_is_named(tmp_path):
    records = [record(f"svamp_{i}", "3", ("a", 3.0, True)) for i in range(2)]
    lines, whole = tmp_path / "lines.jsonl", tmp_path / "whole.json"
    lines.write_text("".join(json.dumps(one) + "\n" for one in records))
    whole.write_text(json.dumps(records))
    assert read_records(lines) == read_records(whole) == records
    for spoilt, words in (
        ({"answer_value": "x"}, "record 1, field 'answer_value': 'x' is no answer of svamp"),
        ({"predictions": None}, "record 1, field 'predictions'"),
        ({"predictions": [{"completion": "a"}]}, "each needs completion and solving_res"),
        ({"predictions": records[0]["predictions"] * 2}, "different numbers of predictions"),
        ({"item_id": "aqua_1"}, "'aqua_1' names no known dataset"),
    ):
        whole.write_text(json.dumps([records[0], records[1] | spoilt]))
        with pytest.raises(InputError, match=words):
            read_records(whole)


def test_folders_give_their_sample_files_without_what_lies_beside_them(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a.greedy.jsonl", "a.rerank.jsonl", "sources.json"):
        (tmp_path / name).write_text("")
    assert sample_files([str(tmp_path), "x.json"]) == [
        tmp_path / "a.jsonl",
        tmp_path / "b.jsonl",
        Path("x.json"),
    ]


def test_models_that_answered_other_questions_are_not_compared():
    one, other = ([record(f"svamp_{i}", "3", ("a", 3.0, True))] for i in range(2))
    models = [Answers(name, {}, by_item(regrade(records)[0]), {}) for name, records in (("x", one), ("y", other))]
    with pytest.raises(InputError, match="y answered other questions than x"):
        table(models, seed=0)


def test_a_pair_is_compared_question_by_question():
    """8 questions: b has 0–5 right, a has 3–7 right."""
    right = {"a": range(3, 8), "b": range(6)}
    models = []
    for name in ("b", "a"):
        records = [record(f"svamp_{i}", "3", ("x", 3.0, True)) | {"is_correct": i in right[name]} for i in range(8)]
        models.append(Answers(name, by_item(records[:: 1 if name == "a" else -1]), {}, {}))  # in any order
    [found] = comparisons(models, seed=0)
    assert (found["a"], found["b"], found["column"]) == ("a", "b", "top1")
    assert found["difference"] == pytest.approx(-1 / 8)
    assert found["low"] < -1 / 8 < found["high"]
    assert found["p"] == pytest.approx(1.0)  # 2 against 3 of the 5 on which they differ


def test_a_table_from_files_equals_the_authors_evaluation(shared, tmp_path):
    """Their samples and their reranker's probabilities, as files of ours."""
    golden = json.loads((shared / "golden/rerank_0/rerank.json").read_text())
    scores: dict[str, list[float]] = {}
    for row in golden["rows"]:
        scores.setdefault(row["item_id"], []).append(1 / (1 + math.exp(row["logits"][0] - row["logits"][1])))
    samples = tmp_path / "theirs.jsonl"
    samples.write_text("".join(json.dumps(one) + "\n" for one in golden["samples"]))
    lines = [{"item_id": item_id, "probabilities": row} for item_id, row in scores.items()]
    (tmp_path / "theirs.rerank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(scores) == [one["item_id"] for one in golden["samples"]]

    graded, changed = regrade(read_records(samples))
    assert changed == 0
    assert [one["most_voted_answer"] for one in graded] == [one["most_voted_answer"] for one in golden["samples"]]
    report = table([read_answers("theirs", samples)._replace(samples=by_item(graded))], seed=0)
    [row] = report["rows"]
    share = {key: row[key]["correct"] / row[key]["total"] for key in ("voting", "rerank", "upper_bound")}
    expected = golden["expected"]
    assert share == {
        "voting": golden["voting_accuracy"],
        "rerank": expected["rerank_acc"],
        "upper_bound": expected["upper_bound"],
    }
    judged = row["classification_accuracy"]
    assert judged["correct"] / judged["total"] == expected["cls_acc"]
    assert row["curve"][-1] == {"k": report["n"]} | share
