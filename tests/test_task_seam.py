"""A task from a file outside the package: its prompt, grading and reward hold wherever a run uses them."""

import json
from types import SimpleNamespace

import pytest
from test_matrix import LENGTH, SETTINGS
from tiny import tiny_model

from reft_jax import executor
from reft_jax.commands.pipeline import run_pipeline
from reft_jax.commands.regrade import run_regrade
from reft_jax.config import check_config, default_config
from reft_jax.evaluation.records import answered, prediction, read_records, regrade
from reft_jax.evaluation.report import markdown_table
from reft_jax.evaluation.results import Answers, by_item, read_answers, table
from reft_jax.model.hf_write import save_hf
from reft_jax.run.executions import LOG_NAME, ExecutionLog, execution, read_executions, replay
from reft_jax.run.guards import Guards
from reft_jax.run.open import open_run
from reft_jax.stages.rollout import Grading
from reft_jax.tasks.answers import grade
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.prompts import PROGRAM_HEAD, completion_text, prompt_text, rollout_prompt, sft_target
from reft_jax.tasks.registry import PAPER, TASKS, load_task
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.types import Example, InputError, Verdict

SOURCE = '''"""Answers that are sets of whole numbers, with partial credit."""

import re
from dataclasses import dataclass

from reft_jax.tasks.registry import Task


@dataclass(frozen=True)
class Sets(Task):
    before: str = "Find all: "
    after: str = "\\nThese are:\\n"
    phrase: str = "All of them: "
    want: str = "text"
    allowed: str = "whole numbers in braces"
    other: str = "not_a_set"

    def plain(self, answer_value):
        return answer_value.strip()

    def read(self, raw):
        """Any brackets and any order; the canonical form is sorted."""
        match = re.fullmatch(r"\\s*[\\[({](\\s*\\d+(\\s*,\\s*\\d+)*)[\\])}]\\.?\\s*", str(raw))
        return "{" + ", ".join(map(str, sorted({int(n) for n in match[1].split(",")}))) + "}" if match else None

    def reward(self, value, correct, example):
        """The share of numbers that are right."""
        if value is None:
            return -1.0
        ours, theirs = (set(re.findall(r"\\d+", text)) for text in (value, self.target(example.answer_value)))
        return len(ours & theirs) / len(ours | theirs)


SETS = Sets("sets")
NUMBER = 3
BLANK = Sets("sets", after=" ")
'''


@pytest.fixture
def named(tmp_path) -> str:
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path}/mine.py:SETS"


def example(number: int, answer_value: str, returned: str = "", answer_format: str = "python") -> Example:
    question = f"Number {number}?"
    program = f'{PROGRAM_HEAD}    """{question}"""\n    return {returned}'
    return Example(f"primes-{number}", question, answer_value, program if answer_format == "python" else "Look.")


def test_the_setting_names_a_task(named, tmp_path):
    assert load_task("") is PAPER and load_task("mathqa") is TASKS["mathqa"] and load_task(named).name == "sets"
    with pytest.raises(InputError, match="task='mathqua' is not known; did you mean 'mathqa'"):
        load_task("mathqua")
    with pytest.raises(InputError, match="NUMBER' is not a Task"):
        load_task(f"{tmp_path}/mine.py:NUMBER")
    with pytest.raises(InputError, match="`after` may not be blank"):
        load_task(f"{tmp_path}/mine.py:BLANK")


def test_questions_prompts_and_targets_are_those_of_the_task(named, tmp_path):
    task, rows = load_task(named), [example(1, "{3, 5}", "{3, 5}"), example(2, "[7]", "[7]")]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([row._asdict() for row in rows]))
    assert load_examples(file, task, need_cot=True) == rows
    with pytest.raises(InputError, match="'primes-1' names no known dataset"):
        load_examples(file, need_cot=True)
    file.write_text(json.dumps([rows[0]._replace(answer_value="3 and 5")._asdict()]))
    with pytest.raises(InputError, match="'3 and 5' is not whole numbers in braces, as sets answers are"):
        load_examples(file, task, need_cot=True)

    assert prompt_text("Which? ", task) == "Find all: Which?\nThese are:\n"
    assert rollout_prompt("Which?", "python", task).endswith('\nThese are:\ndef solution():\n    """Which?"""\n')
    assert sft_target(example(1, "{1,200}", answer_format="nl"), "nl", task) == "Look.\nAll of them: {1,200}"
    assert completion_text(prompt_text("Which?\nAnswer reasoning:\nx", task) + " {1} ", task.after) == "{1}"


PROGRAMS = ("return [5, 3, 3]", "return (2, 3)", "return 'none'", "return 1 / 0", "return {9}")
VERDICTS = [
    Verdict("{3, 5}", True, 1.0, "ok"),
    Verdict("{2, 3}", False, 1 / 3, "ok"),
    Verdict(None, False, -1.0, "not_a_set"),
    Verdict(None, False, -1.0, "exception"),
    Verdict("{9}", False, 0.0, "ok"),
]
TEXTS = [f"def solution():\n    {line}" for line in PROGRAMS]
ASKED = Example("primes-1", "Which?", "{3, 5}")


def test_completions_are_graded_voted_on_logged_and_graded_again(named, tmp_path, capsys):
    task = load_task(named)
    config = default_config()
    config.task = named
    try:
        assert grade(TEXTS, [ASKED] * 5, "python", task, run_programs=executor.run_programs) == VERDICTS
        with Grading(SimpleNamespace(config=config, guards=Guards())) as grading:  # as a rollout grades
            for number, text in enumerate(TEXTS):
                grading.submit(number, ASKED, text)
            assert dict(grading.collect(wait=True)) == dict(enumerate(VERDICTS))
        said = grade(["Let us see. All of them: [5,3]."], [ASKED], "nl", task, run_programs=None)
        assert said == [Verdict("{3, 5}", True, 1.0, "ok")]

        # A sample file: written, read, graded again from its values and by running its programs.
        record = answered(ASKED, [prediction(text, one) for text, one in zip(TEXTS, VERDICTS, strict=True)])
        assert record["most_voted_answer"] == "{3, 5}" and record["is_correct"]
        path = tmp_path / "samples.jsonl"
        path.write_text(json.dumps(record) + "\n")
        with pytest.raises(InputError, match="record 0, field 'item_id': .*names no known dataset"):
            read_records(path)
        assert read_records(path, task=task) == [record]
        assert regrade([record], None, task) == ([record], 0)
        assert regrade([record], executor.run_programs, task) == ([record], 0)
        spoiled = record | {"predictions": [one | {"solving_res": "{5,3}"} for one in record["predictions"]]}
        assert regrade([spoiled], None, task)[1] == 5
        report = table([read_answers("mine", path, task)], 0, task)
        assert report["rows"][0]["voting"]["correct"] == 1 and "mine" in markdown_table(report)
        others = Answers("again", {}, by_item([record | {"answer_value": "[5, 3]"}]), {})  # the same set
        assert len(table([read_answers("mine", path, task), others], 0, task)["rows"]) == 2
        run_regrade([str(path)], execute=False, out_dir=None, seed=0, allow_unsandboxed=False, task=named)
        assert "0 differ from what the file says" in capsys.readouterr().out
    finally:
        executor.shutdown()

    # The audit log of a work directory that was made with this task.
    (tmp_path / "config.json").write_text(json.dumps({"task": named}))
    ExecutionLog(tmp_path).append(execution("x", ASKED, *pair, 1.0) for pair in zip(TEXTS, VERDICTS, strict=True))
    assert replay(tmp_path)
    ExecutionLog(tmp_path).append([execution("x", ASKED, "p", VERDICTS[1]._replace(reward=0.1), 1.0)])
    assert not replay(tmp_path)
    assert "primes-1 (x): logged reward 0.1, graded 0.33" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("answer_format", ["python", "nl"])
def test_every_stage(named, tmp_path, answer_format, monkeypatch):
    """The whole method on a tiny model that learns twelve questions by heart."""
    monkeypatch.chdir(tmp_path)
    task = load_task(named)
    values = [f"{{{i % 3 + 1}, {i % 3 + 2}}}" for i in range(12)]
    rows = [example(i, value, value, answer_format) for i, value in enumerate(values)]
    tokenizer = train_bpe([prompt_text(e.question, task) + sft_target(e, answer_format, task) for e in rows], 340)
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, num_layers=1, hidden_size=32)
    save_hf(tmp_path / "model", *tiny_model(**shape), tokenizer=tokenizer)
    for name, fields in (("train", rows), ("test", [row._replace(answer_cot=None) for row in rows[:8]])):
        (tmp_path / f"{name}.json").write_text(json.dumps([row._asdict() for row in fields]))
    config = default_config()
    config.update_from_flattened_dict(SETTINGS)
    config.model.path, config.data.format, config.task = str(tmp_path / "model"), answer_format, "mine.py:SETS"
    config.data.train, config.data.test = str(tmp_path / "train.json"), str(tmp_path / "test.json")
    workdir = tmp_path / "run"
    with open_run(check_config(config), workdir, []) as run:
        report = run_pipeline(run)
    rows = {row["model"]: row for row in report["rows"]}
    assert rows["SFT"]["top1"]["correct"] > 0 and rows["ReFT"]["voting"]["total"] == 8
    with pytest.raises(InputError, match="names no known dataset"):
        read_records(workdir / "samples/sft_test.jsonl")
    samples = read_records(workdir / "samples/sft_test.jsonl", task=task)
    found = {p["solving_res"] for record in samples for p in record["predictions"]} - {None}
    assert found and found <= {task.read(value) for value in found}
    assert {p["completion"].startswith(PROGRAM_HEAD) for r in samples for p in r["predictions"]} == {
        answer_format == "python"
    }
    assert json.loads((workdir / "samples/sft_test.jsonl").read_text().split("\n")[0])["made_by"]["task"] == "sets"
    rewards = {line["reward"] for line in read_executions(workdir / LOG_NAME)}
    assert {1.0, -1.0} <= rewards
    monkeypatch.chdir("/")
    assert replay(workdir)  # config.json has the absolute path of the task's file
