"""Both readings of the same answers: side by side, never mixed, and each from the completions."""

import json
from types import SimpleNamespace

import pytest

from reft_jax.commands.evaluate import run_evaluate
from reft_jax.commands.regrade import run_regrade
from reft_jax.evaluation.provenance import MadeBy
from reft_jax.evaluation.records import SAMPLES_KIND, answered, prediction, read_records
from reft_jax.evaluation.report import markdown
from reft_jax.evaluation.results import Answers, both_readings, by_item
from reft_jax.tasks.answers import grade
from reft_jax.tasks.registry import load_task
from reft_jax.types import Example, InputError

STRICT, LENIENT = load_task(""), load_task("", "lenient")
TEXTS = ["18", "$18", "18 apples", "17 or 18", "17"]
ASKED = [Example(f"gsm8k_{i}", f"Question {i}?", "18") for i in range(4)]


def records(task, form="So.\nTherefore, the answer is: {}", answer_format="nl", run_programs=None) -> list[dict]:
    """Each question with one text in strict form and the text number i + 1."""
    found = []
    for i, example in enumerate(ASKED):
        texts = [form.format(TEXTS[0] if i < 2 else TEXTS[4]), form.format(TEXTS[i + 1])]
        verdicts = grade(texts, [example] * 2, answer_format, task, run_programs=run_programs)
        found.append(answered(example, [prediction(*pair) for pair in zip(texts, verdicts, strict=True)]))
    return found


def written(path, found, reading="strict"):
    identity = {"format": "nl"} | ({} if reading == "strict" else {"reading": reading})
    lines = [MadeBy(SAMPLES_KIND, identity, {}).header(), *found]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def regraded(path, capsys, tmp_path, **more) -> tuple[str, dict]:
    given = {"execute": False, "out_dir": tmp_path / "out", "seed": 0, "allow_unsandboxed": False}
    run_regrade([str(path)], **given, **more)
    [report] = json.loads((tmp_path / "out" / "sweep.json").read_text())
    return capsys.readouterr().out, report


def none_runs(programs, want):
    assert programs == [], "texts are read without a program"
    return []


def test_a_file_keeps_its_reading_and_the_other_one_is_made_from_its_texts(tmp_path, capsys):
    strict, lenient = records(STRICT), records(LENIENT)
    assert [one["solving_res"] for r in strict for one in r["predictions"]][1::2] == [None, None, None, 17.0]
    assert [one["solving_res"] for r in lenient for one in r["predictions"]][1::2] == [18.0, 18.0, None, 17.0]
    one, other = written(tmp_path / "one.jsonl", strict), written(tmp_path / "other.jsonl", lenient, "lenient")
    for path, own in ((one, "strict"), (other, "lenient")):
        for reading in ("strict", "lenient"):
            said, report = regraded(path, capsys, tmp_path, reading=reading)
            how = "graded from its stored value; 0 differ" if reading == own else "read again; 2 differ"
            assert f"{path}: each of 8 answers {how}" in said and "readings" not in report
            none = report["rows"][0]["no_answer"]["samples"]["none"]
            assert none == {"strict": 3, "lenient": 1}[reading]
    assert read_records(one) == strict


def test_both_are_shown_side_by_side(tmp_path, capsys):
    rows = records(STRICT)
    for row in rows:
        row["predictions"].reverse()  # so that one sample tells the readings apart
    first = [answered(e, row["predictions"][:1]) for e, row in zip(ASKED, rows, strict=True)]
    found = both_readings([Answers("m", by_item(first), by_item(rows), {})], 0, STRICT, LENIENT, none_runs)
    assert [(one["column"], one["strict"]["correct"], one["lenient"]["correct"]) for one in found] == [
        ("top1", 0, 2),
        ("voting", 2, 2),
        ("upper_bound", 2, 2),
    ]
    assert found[0]["difference"] == 0.5 and found[1]["difference"] == 0
    lenient = [answered(e, row["predictions"][-1:]) for e, row in zip(ASKED, records(LENIENT), strict=True)]
    assert both_readings([Answers("m", by_item(lenient), {}, {})], 0, LENIENT, STRICT, none_runs) == found[:1]

    path = written(tmp_path / "m.jsonl", rows)
    for reading in ("strict", "lenient"):
        said, report = regraded(path, capsys, tmp_path, reading=reading, both_readings=True)
        [voting, upper] = report["readings"]
        assert (voting["strict"], voting["lenient"]) == ({"correct": 2, "total": 4}, {"correct": 2, "total": 4})
        assert "| the same completions | read strictly | read leniently | points |" in said
        assert "| m, voting@2 | 50.0 % (2/4) [15.0, 85.0] | 50.0 % (2/4) [15.0, 85.0] | +0.0" in markdown(report)


def test_programs_must_run_for_another_reading(tmp_path, capsys, fresh):
    from reft_jax import executor

    form = "def solution():\n    return '{}'"
    found = records(STRICT, form, "python", executor.run_programs)
    path = written(tmp_path / "p.jsonl", found)
    for asked in ({"reading": "lenient"}, {"both_readings": True}):
        with pytest.raises(InputError, match="p.*: its values were read in another way.* add --execute"):
            run_regrade([str(path)], execute=False, out_dir=None, seed=0, allow_unsandboxed=False, **asked)
    run_regrade([str(path)], execute=True, out_dir=tmp_path / "out", seed=0, allow_unsandboxed=True, both_readings=True)
    [report] = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert report["rows"][0]["no_answer"]["samples"]["none"] == 3  # '18' is a number for `float`, '$18' is none
    assert [one["strict"]["correct"] for one in report["readings"]] == [2, 2]


def test_evaluate_refuses_a_task_without_the_other_reading_before_it_looks_at_a_model(tmp_path):
    (tmp_path / "own.py").write_text(
        "from reft_jax.tasks.registry import Task\nclass Own(Task):\n"
        "    def read(self, raw):\n        return None\nOWN = Own('own')\n"
    )
    config = SimpleNamespace(task=f"{tmp_path}/own.py:OWN", data=SimpleNamespace(reading="strict"))
    with pytest.raises(InputError, match="has no lenient one"):
        run_evaluate(SimpleNamespace(config=config, inputs=SimpleNamespace(task=None)), both_readings=True)
