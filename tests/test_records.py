"""Sample files: regraded from their stored answers or by running the programs, and turned into a table."""

import json
import math
from pathlib import Path

import pytest

from reft_jax.commands.regrade import labels, run_regrade, sample_files
from reft_jax.evaluation.provenance import appending
from reft_jax.evaluation.records import _lines, answered, prediction, read_records, regrade
from reft_jax.evaluation.results import Answers, by_item, comparisons, read_answers, table
from reft_jax.executor import ExecResult
from reft_jax.store import read_text
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
    made = answered(Example("svamp_1", "1 + 2?", "3"), list(map(prediction, "ab", verdicts)))
    assert made == record("svamp_1", "3", ("a", 3.0, True), ("b", None, False)) | {
        "question": "1 + 2?",
        "most_voted_answer": 3.0,
        "is_correct": True,
    }


def read_lines(path) -> list:
    return _lines(path, read_text(path))[0]


def test_a_torn_last_line_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "deep" / "reft_test.jsonl"
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
        ({"answer_value": "x"}, "record 1, field 'answer_value': 'x' is not an answer of svamp"),
        ({"predictions": None}, "record 1, field 'predictions'"),
        ({"predictions": [{"completion": "a"}]}, "each needs completion and solving_res"),
        ({"predictions": records[0]["predictions"] * 2}, "different numbers of predictions"),
        ({"item_id": "aqua_1"}, "'aqua_1' names no known dataset"),
    ):
        whole.write_text(json.dumps([records[0], records[1] | spoilt]))
        with pytest.raises(InputError, match=words):
            read_records(whole)


def test_a_last_line_without_a_newline_counts(tmp_path, capsys):
    """5 of 10 right; the last one is."""
    lines = [json.dumps(record(f"svamp_{i}", "3", ("a", float(3 * (i % 2)), bool(i % 2)))) for i in range(10)]
    path = tmp_path / "m.jsonl"
    for text in (
        "\n".join(lines),
        "\n".join(lines) + "\n",
        "\n\n".join(lines),
        "\r\n".join(lines),
        "\ufeff" + "\n".join(lines),
    ):
        path.write_bytes(text.encode())
        assert len(read_records(path)) == 10
        run_regrade([str(path)], execute=False, out_dir=None, seed=0, allow_unsandboxed=False)
        assert "50.0 % (5/10)" in capsys.readouterr().out
    path.write_text("\n".join(lines)[:-5])
    with pytest.raises(InputError, match="m.jsonl: the last line is cut off; finish sampling"):
        read_records(path)
    path.write_text(lines[0][:-5] + "\n" + lines[1])
    with pytest.raises(InputError, match="m.jsonl: line 1 is not JSON"):
        read_records(path)


GOOD = record("svamp_0", "3", ("a", 3.0, True), ("b", 4.0, False))
BAD = {
    "a list as a value": ({"predictions": [{"completion": "a", "solving_res": [18.0]}]}, "solving_res that is a list"),
    "an object as a value": (
        {"predictions": [{"completion": "a", "solving_res": {}}]},
        "solving_res that is an object",
    ),
    "true as a value": (
        {"predictions": [{"completion": "a", "solving_res": True}]},
        "solving_res that is true or false",
    ),
    "400 digits": ({"predictions": [{"completion": "a", "solving_res": 10**400}]}, "too large for an answer"),
    "no completion": ({"predictions": [{"solving_res": 1.0}]}, "has no completion"),
    "a number as completion": ({"predictions": [{"completion": 5, "solving_res": 1.0}]}, "has no completion"),
    "no value": ({"predictions": [{"completion": "a"}]}, "has no solving_res"),
    "a word as correctness": (
        {"predictions": [{"completion": "a", "solving_res": 1.0, "correctness": "yes"}]},
        "correctness that is a string",
    ),
    "a string as prediction": ({"predictions": ["a"]}, "number 0 is a string, not an object"),
    "no predictions": ({"predictions": []}, "field 'predictions': is empty"),
    "predictions missing": ({"predictions": None}, "field 'predictions': is missing or null"),
    "a number as id": ({"item_id": 1}, "field 'item_id': is a number, not a string"),
    "an unknown dataset": ({"item_id": "foo_1"}, "names no known dataset"),
    "a number as answer": ({"answer_value": 18}, "field 'answer_value': is a number, not a string"),
    "no question": ({"question": None}, "field 'question': is missing or null"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_malformed_field_is_one_line_with_file_record_and_remedy(tmp_path, name):
    spoilt, words = BAD[name]
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"item_id": "svamp_1"} | spoilt) + "\n")
    with pytest.raises(InputError) as raised:
        read_records(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: record 1, field ") and words in said and ";" in said and "\n" not in said


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"item_id": "svamp_0"}', "field 'question'"),
        (b"[1, 2]", "record 0 is a number, not an object"),
        (b"[]", "holds no records"),
        (b"", "holds no records"),
        (b'[{"item_id": "svamp', "is not JSON"),
        (b"\xff\xfe{}", "byte 0 is not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"1" * 5_000 + b"}\n{}\n", "line 1 is not JSON"),
        (b'{"schema": 99, "kind": "samples"}\n', "schema 99, but this version reads 1"),
        (b'{"schema": 1, "kind": "samples"}\n', "the header's field 'made_by' is missing"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, data, words):
    path = tmp_path / "m.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError) as raised:
        read_records(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: ") and words in said and ";" in said and "\n" not in said


def test_an_id_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    for second in (GOOD, record("svamp_0", "3", ("a", 3.0, True), ("b", 4.0, False), ("c", 5.0, False))):
        path.write_text("".join(json.dumps(one) + "\n" for one in (GOOD, second)))
        with pytest.raises(InputError, match="record 1, field 'item_id': 'svamp_0' is already in record 0"):
            read_records(path)


def write_rerank(folder: Path, scores: list, **more) -> Path:
    """m.jsonl with two questions of two distinct samples each, and their scores in a second file."""
    records = [GOOD, GOOD | {"item_id": "svamp_1"}]
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    lines = [{"item_id": f"svamp_{i}", "probabilities": row} | more for i, row in enumerate(scores)]
    path.with_suffix(".rerank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("scores", "more", "words"),
    [
        ([[0.1, 0.2], [0.1]], {}, "svamp_1, field 'probabilities': 1 probabilities, but there are 2 distinct"),
        ([[0.1, 0.2]], {}, "has no scores of svamp_1"),
        ([[0.1, 0.2]] * 3, {}, "has scores of svamp_2, which has no samples"),
        ([[0.1, 0.2], [7, 0.2]], {}, "record 1, field 'probabilities': number 0 is 7, not a number from 0 to 1"),
        ([[math.nan, 0.2]] * 2, {}, "record 0, field 'probabilities': number 0 is nan"),
        ([["a", "b"]] * 2, {}, "number 0 is a string"),
        ([None, None], {}, "field 'probabilities': is missing or null"),
        ([[0.1, 0.2]] * 2, {"completions": ["x", "y"]}, "svamp_0, field 'completions': these are not the samples'"),
        ([[0.1, 0.2]] * 2, {"completions": ["x"]}, "record 0, field 'completions': is not one string"),
    ],
)
def test_scores_that_do_not_fit_their_samples_are_one_line(tmp_path, scores, more, words):
    path = write_rerank(tmp_path, scores, **more)
    with pytest.raises(InputError) as raised:
        read_answers("m", path)
    assert str(raised.value).startswith(str(path.with_suffix(".rerank.jsonl"))) and words in str(raised.value)


def test_scores_that_fit_are_read(tmp_path):
    assert read_answers("m", write_rerank(tmp_path, [[0, 0.2], [0.3, 1]])).probabilities == {
        "svamp_0": [0, 0.2],
        "svamp_1": [0.3, 1],
    }


def test_a_greedy_file_that_lacks_an_answer_is_named_with_the_item(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(GOOD | {"item_id": f"svamp_{i}"}) + "\n" for i in range(2)))
    path.with_suffix(".greedy.jsonl").write_text(json.dumps(record("svamp_0", "3", ("a", 3.0, True))) + "\n")
    with pytest.raises(InputError, match=r"m.greedy.jsonl has no answer to svamp_1, .*m.jsonl has one"):
        read_answers("m", path)
    path.with_suffix(".greedy.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(InputError, match="has 2; one greedy answer is expected"):
        read_answers("m", path)


def several(folder: Path, **files: list[dict]) -> list[str]:
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return [str(folder)]


def test_files_with_other_questions_under_the_same_ids_are_refused(tmp_path):
    theirs = [GOOD | {"answer_value": "99"}]
    for other, field in ((theirs, "answer_value"), ([GOOD | {"question": "Another?"}], "question")):
        with pytest.raises(InputError, match=rf"n answered other questions than m \(svamp_0, field '{field}'"):
            run_regrade(
                several(tmp_path, m=[GOOD], n=other), execute=False, out_dir=None, seed=0, allow_unsandboxed=False
            )
    same = [GOOD | {"answer_value": "3.0"}]  # the same target, written otherwise
    run_regrade(several(tmp_path, m=[GOOD], n=same), execute=False, out_dir=None, seed=0, allow_unsandboxed=False)


def test_models_with_different_numbers_of_samples_have_their_own_n(tmp_path, capsys):
    records = {n: [record(f"svamp_{i}", "3", *[("a", 3.0, True)] * n) for i in range(4)] for n in (4, 8)}
    sources = several(tmp_path, m=records[4], n=records[8])
    run_regrade(sources, execute=False, out_dir=tmp_path / "out", seed=0, allow_unsandboxed=False)
    said = capsys.readouterr().out
    assert "voting@n" in said and "m (n=4)" in said and "n (n=8)" in said and "4 or 8 samples each" in said
    tables = (tmp_path / "out" / "sweep.md").read_text().split("\n\n")
    curve = next(part for part in tables if part.startswith("| voting@k"))
    cells = [line.count("|") for line in curve.splitlines()]
    assert len(set(cells)) == 1 and "| 1 | 2 | 4 | 8 |" in curve and curve.splitlines()[2].endswith("| – |")
    [report] = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["n"] for row in report["rows"]] == [4, 8]
    assert not report["comparisons"]  # voting@4 is not compared with voting@8


def test_folders_give_their_sample_files_without_what_lies_beside_them(tmp_path):
    for name in (
        "b.jsonl",
        "a.jsonl",
        "a.greedy.jsonl",
        "a.rerank.jsonl",
        "sources.json",
        "data/a.jsonl",
        "aside/a.1.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    files = sample_files([str(tmp_path), "x.json", "x.json"])
    assert files == [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "data" / "a.jsonl", Path("x.json")]
    assert list(labels(files).values()) == [str(tmp_path / "a"), "b", str(tmp_path / "data" / "a"), "x"]


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
