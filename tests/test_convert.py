"""The command `convert`: the files that it writes, the rows that it rejects, its messages, and the input it refuses."""

import json
import sys
import time
from pathlib import Path

import pytest

from reft_jax import __main__, executor
from reft_jax.config import load_config
from reft_jax.gsm8k_programs.program_rules import broken_rules
from reft_jax.tasks.answers import grade
from reft_jax.tasks.datasets import load_examples

REPO = Path(__file__).resolve().parents[1]
ROWS = [
    {
        "question": "Ann has 5 red pens and 7 blue pens. How many pens does she have?",
        "answer": "Ann has 5 + 7 = <<5+7=12>>12 pens.\n#### 12",
    },
    {"question": "Kim has 3 cats. How many legs?", "answer": "They have 7 + 5 = <<7+5=12>>12 legs.\n#### 12"},
    {"question": "Ben buys 4 books for $1,000 each. What is the total cost?", "answer": "4*1000=$4,000\n#### 4,000"},
    {"question": "How many?", "answer": "#### 3"},
]
SVAMP = [
    {
        "item_id": "svamp_1",
        "question": " 1 + 1? ",
        "answer_value": "2.0",
        "answer_cot": "def solution():\n    return 1 + 1",
    },
    {
        "item_id": "svamp_2",
        "question": "1 + 2?",
        "answer_value": "1,003",
        "answer_cot": "def solution():\n    return 1003",
    },
    {"item_id": "svamp_3", "question": "1 + 3?", "answer_value": "4", "answer_cot": "def solution():\n    return 5"},
    {"item_id": "svamp_4", "question": "1 + 4?", "answer_value": "5", "answer_cot": "def solution():\n    return x"},
    {
        "item_id": "svamp_5",
        "question": "1 + 5?",
        "answer_value": "6",
        "answer_cot": "It is 6.\n\nTherefore, the answer is <6>.",
    },
    {
        "item_id": "svamp_6",
        "question": "1 + 6?",
        "answer_value": "7",
        "answer_cot": "It is 8.\n\nTherefore, the answer is <8>.",
    },
    {"item_id": "svamp_7", "question": "1 + 7?", "answer_value": "8"},
]


@pytest.fixture
def convert(monkeypatch, capsys):
    """Runs the command in this process: exit code, stdout, stderr."""

    def convert(*args: object) -> tuple[int, str, str]:
        monkeypatch.setenv("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # main sets it: undone with the test
        monkeypatch.setattr(sys, "argv", ["reft", "convert", *map(str, args)])
        code = 0
        try:
            __main__.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return convert


@pytest.fixture
def train(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k(convert, train, tmp_path):
    out = tmp_path / "new" / "folder"
    code, stdout, _ = convert("gsm8k", "--in", train, "--out_dir", out, "--show=1")
    assert code == 0
    programs = load_examples(out / "gsm8k_python_sdp.json", need_cot=True)
    assert [example.item_id for example in programs] == ["gsm8k_0", "gsm8k_2"]
    assert programs[0].answer_cot == (
        f'def solution():\n    """{ROWS[0]["question"]}"""\n    red_pens = 5\n    blue_pens = 7\n'
        "    pens = red_pens + blue_pens\n    result = pens\n    return result"
    )
    texts = load_examples(out / "gsm8k_nl.json", need_cot=True)
    assert [(text.item_id, text.answer_value) for text in texts] == [
        ("gsm8k_0", "12"),
        ("gsm8k_1", "12"),
        ("gsm8k_2", "4000"),
    ]
    assert texts[0].answer_cot == "Ann has 5 + 7 = 12 pens."
    questions = json.loads((out / "gsm8k_questions.json").read_text())
    assert [row["item_id"] for row in questions] == [f"gsm8k_{index}" for index in range(4)]
    assert all(row.keys() == {"item_id", "question", "answer_value"} for row in questions)
    assert [(row["item_id"], row["format"], row["reason"]) for row in lines(out / "rejected.jsonl")] == [
        ("gsm8k_1", "python", "a number from nowhere"),
        ("gsm8k_3", "python", "no equation in the solution"),
        ("gsm8k_3", "nl", "no solution before '####'"),
    ]
    assert "4 rows, 2 verified python (50.00%), 3 verified nl (75.00%)" in stdout
    assert "1 python rejected: a number from nowhere" in stdout
    assert "def solution():" in stdout
    assert {path.name for path in out.iterdir()} == {
        "gsm8k_python_sdp.json",
        "gsm8k_nl.json",
        "gsm8k_questions.json",
        "rejected.jsonl",
    }


def test_the_config_for_real_data_expects_these_files(convert, train, tmp_path, monkeypatch):
    config = load_config(f"{REPO}/configs/real.py:gsm8k,0.5b")
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        assert convert("gsm8k", "--in", train, f"--out_dir=data/{part}")[0] == 0
    assert load_examples(config.data.train, need_cot=True) and load_examples(config.data.test, need_cot=False)


def test_a_program_that_returns_another_answer_is_rejected(convert, train, tmp_path, monkeypatch):
    from reft_jax.gsm8k_programs import conversion

    wrong = conversion.Conversion("def solution():\n    return 5", "")
    monkeypatch.setattr(conversion, "convert_row", lambda row: wrong)
    convert("gsm8k", f"--in={train}", f"--out_dir={tmp_path}/out")
    assert json.loads((tmp_path / "out" / "gsm8k_python_sdp.json").read_text()) == []
    reasons = [row["reason"] for row in lines(tmp_path / "out" / "rejected.jsonl") if row["format"] == "python"]
    assert reasons == ["the program returns another answer (ok)"] * 4


def test_the_hub(convert, tmp_path, monkeypatch):
    import datasets

    asked = []

    class Loaded:
        def to_list(self):
            return ROWS

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Loaded()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for args in ([], ["--in=openai/gsm8k"], ["--in=hub:openai/gsm8k/main:test"]):
        assert convert("gsm8k", *args, f"--out_dir={tmp_path}/out")[0] == 0
    assert asked == [("openai/gsm8k", "main", split) for split in ("train", "train", "test")]
    assert len(load_examples(tmp_path / "out" / "gsm8k_questions.json", need_cot=False)) == 4


def test_an_unreachable_hub_is_one_line(convert, tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nwith a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    code, _, stderr = convert("gsm8k", f"--out_dir={tmp_path}/out")
    assert code == 2
    assert stderr.count("\n") == 1 and "check the name and the network" in stderr
    assert not (tmp_path / "out").exists()


def test_the_authors_files_are_verified(convert, tmp_path):
    (tmp_path / "svamp.json").write_text(json.dumps(SVAMP))
    code, stdout, _ = convert("svamp", f"--in={tmp_path}/svamp.json", f"--out_dir={tmp_path}/out")
    assert code == 0
    programs = load_examples(tmp_path / "out" / "svamp_python_sdp.json", need_cot=True)
    assert [(example.question, example.answer_value) for example in programs] == [("1 + 1?", "2.0"), ("1 + 2?", "1003")]
    assert [example.item_id for example in load_examples(tmp_path / "out" / "svamp_nl.json", need_cot=True)] == [
        "svamp_5"
    ]
    assert len(load_examples(tmp_path / "out" / "svamp_questions.json", need_cot=False)) == 7
    assert [(row["item_id"], row["reason"]) for row in lines(tmp_path / "out" / "rejected.jsonl")] == [
        ("svamp_3", "the program returns 5.0, not 4"),
        ("svamp_4", "the program returns nothing (exception)"),
        ("svamp_6", "the text ends in 8, the answer is 7"),
    ]
    assert "7 rows, 2 verified python" in stdout


def test_mathqa_in_both_forms(convert, tmp_path):
    rows = [
        {"item_id": "mathqa_1", "question": "1 + 1? a ) 1 , b ) 2", "answer_value": " B ", "answer_cot": "It is b."}
    ]
    (tmp_path / "mathqa.json").write_text(json.dumps(rows))
    assert convert("mathqa", f"--in={tmp_path}/mathqa.json", f"--out_dir={tmp_path}/out")[0] == 0
    [example] = load_examples(tmp_path / "out" / "mathqa_nl.json", need_cot=True)
    assert example.answer_value == "b"
    rows = [{"item_id": "mathqa-numeric_1", "question": "1 + 1?", "answer_value": 2, "answer_cot": "It is 2."}]
    (tmp_path / "numeric.json").write_text(json.dumps(rows))
    assert convert("mathqa-numeric", f"--in={tmp_path}/numeric.json", f"--out_dir={tmp_path}/out")[0] == 0
    assert load_examples(tmp_path / "out" / "mathqa-numeric_nl.json", need_cot=True)[0].answer_value == "2"


def test_the_input_is_never_overwritten(convert, tmp_path):
    path = tmp_path / "svamp_python_sdp.json"
    path.write_text(json.dumps(SVAMP))
    code, _, stderr = convert("svamp", f"--in={path}", f"--out_dir={tmp_path}")
    assert code == 2 and "would be overwritten" in stderr
    assert json.loads(path.read_text()) == SVAMP and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_files(convert, train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "gsm8k_python_sdp.json").write_text("old")

    def write_text(self, text, encoding):
        if "nl" in self.name:
            raise OSError(28, "No space left on device")
        self.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", write_text)
    code, _, stderr = convert("gsm8k", f"--in={train}", f"--out_dir={out}")
    assert code == 4 and f"{out}/gsm8k_nl.json could not be written (No space left on device)" in stderr
    assert stderr.count("error: ") == 1
    assert (out / "gsm8k_python_sdp.json").read_text() == "old"
    assert len(list(out.iterdir())) == 1


def test_a_broken_line_is_named(convert, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROWS[0]) + '\n{"question": "How many?"}\n')
    code, _, stderr = convert("gsm8k", f"--in={path}", f"--out_dir={tmp_path}/out")
    assert code == 2
    assert stderr == f"error: {path}: line 2, field 'answer': is missing; add it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [650, pytest.param(6500, marks=pytest.mark.long)])
def test_official_data(shared, tmp_path, convert, rows):
    """The bar: 95 % of the rows as programs that keep the rules and run to the right answer, in under a minute.

    The minute is one of processor time: a busy machine would fail the test.
    """
    official, source = lines(shared / "data" / "gsm8k_train.jsonl")[:rows], tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in official))
    began = time.process_time()
    code, _, _ = convert("gsm8k", f"--in={source}", f"--out_dir={tmp_path}")
    took = time.process_time() - began
    assert code == 0
    programs = load_examples(tmp_path / "gsm8k_python_sdp.json", need_cot=True)
    assert len(programs) >= 0.95 * rows
    assert len(load_examples(tmp_path / "gsm8k_nl.json", need_cot=True)) >= 0.995 * rows
    answers = [row["answer"] for row in official]
    for example in programs[::20]:
        answer = answers[int(example.item_id.removeprefix("gsm8k_"))].strip()
        assert broken_rules(example.answer_cot, example.question, answer) == []
    some = programs[::100]
    verdicts = grade([p.answer_cot for p in some], some, "python", run_programs=executor.run_programs)
    assert all(verdict.correct for verdict in verdicts)
    rejected = {row["item_id"] for row in lines(tmp_path / "rejected.jsonl")}
    assert len(programs) + len(rejected) == rows
    assert took < 60
