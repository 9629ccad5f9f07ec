"""Reading data files: what is accepted, and the messages for what is refused."""

import json
import sys
from collections import Counter

import pytest

from reft_jax.tasks.datasets import fit, load_examples, shared_questions, split_off
from reft_jax.types import Example, InputError

ROW = {"item_id": "svamp_1", "question": "1 + 1?", "answer_value": "2.0", "answer_cot": "It is 2."}


@pytest.fixture
def write(tmp_path):
    def write(content: object, name: str = "data.json") -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def questions(*texts: str) -> list[Example]:
    return [Example(f"toy_{index}", text, "1") for index, text in enumerate(texts)]


def test_the_shared_files_load(shared):
    data = shared / "data"
    assert len(load_examples(data / "svamp_python_sdp.json", need_cot=True)) == 3043
    assert len(load_examples(data / "svamp_nl.json", need_cot=True)) == 3076
    assert len(load_examples(data / "svamp_test_set.json", need_cot=False)) == 1000
    mathqa = load_examples(data / "mathqa_test_set.json", need_cot=False)
    assert {example.answer_value for example in mathqa} == set("abcde")
    gsm8k = load_examples(data / "gsm8k_train.jsonl", need_cot=True)
    assert len(gsm8k) == 6500
    assert not any("<<" in example.answer_cot or "####" in example.answer_cot for example in gsm8k)


def test_our_format(write):
    assert load_examples(write([ROW]), need_cot=True) == [Example("svamp_1", "1 + 1?", "2.0", "It is 2.")]
    bare = {key: ROW[key] for key in ("item_id", "question", "answer_value")}
    assert load_examples(write([bare]), need_cot=False) == [Example("svamp_1", "1 + 1?", "2.0", None)]


@pytest.mark.parametrize(("number", "text"), [(2, "2"), (2.5, "2.5"), (-1, "-1"), (1e-3, "0.001")])
def test_a_number_as_answer_value_becomes_text(write, number, text):
    (example,) = load_examples(write([ROW | {"answer_value": number}]), need_cot=False)
    assert example.answer_value == text


def test_official_gsm8k(write):
    official = [
        {"question": "Q0\u2028?", "answer": "Half: 48/2 = <<48/2=24>>24 clips.\nSum <<24+48=72>>72.\n#### 72"},
        {"question": "Q1?", "answer": "Key #### 4.\n#### -1,080"},
    ]
    expected = [
        Example("gsm8k_0", "Q0\u2028?", "72", "Half: 48/2 = 24 clips.\nSum 72."),
        Example("gsm8k_1", "Q1?", "-1080", "Key #### 4."),
    ]
    # ensure_ascii=False leaves U+2028 raw inside the string, where str.splitlines() would break the line
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in official)
    assert load_examples(write(lines, "train.jsonl"), need_cot=True) == expected
    assert load_examples(write(official), need_cot=True) == expected


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", r"data\.json: is empty"),
        ("[{]", r"data\.json: not JSON at line 1, column 3"),
        ('[\n{"item_id": "svamp_1"\n"question"', r"not JSON at line 3, column 1 \(Expecting ',' delimiter\)"),
        ({"data": []}, "holds an object, not a list"),
        ([], "holds no rows"),
        ([ROW, "text"], "row 1 is a string"),
        ([ROW | {"item_id": None}], "row 0, field 'item_id': is missing"),
        ([ROW | {"question": " \n"}], "row 0, field 'question': is blank"),
        ([{k: v for k, v in ROW.items() if k != "question"}], "row 0, field 'question': is missing"),
        ([{k: v for k, v in ROW.items() if k != "answer_value"}], "row 0, field 'answer_value': is missing"),
        ([{k: v for k, v in ROW.items() if k != "answer_cot"}], "row 0, field 'answer_cot': is missing"),
        ([ROW | {"question": 3}], "row 0, field 'question': is a number, not a string"),
        ([ROW | {"answer_value": True}], "row 0, field 'answer_value': is true or false, not a string"),
        ([ROW | {"answer_value": ["2"]}], "row 0, field 'answer_value': is a list, not a string"),
        ([ROW | {"answer_cot": {}}], "row 0, field 'answer_cot': is an object, not a string"),
        ([ROW | {"question": "\ud800"}], "row 0, field 'question': has half a surrogate pair"),
        ([ROW | {"item_id": "svmp_1"}], "row 0, field 'item_id': item_id 'svmp_1' names no known dataset"),
        ([ROW | {"answer_value": "two"}], "row 0, field 'answer_value': 'two' is not a finite number, as svamp"),
        ([ROW | {"answer_value": float("nan")}], "'nan' is not a finite number"),
        ([ROW | {"item_id": "mathqa_1"}], "field 'answer_value': '2.0' is not one letter a-e, as mathqa"),
        ([ROW | {"item_id": "mathqa-numeric_1", "answer_value": "a"}], "'a' is not a finite number"),
        (
            [ROW | {"answer_value": "1,5"}],
            "field 'answer_value': '1,5' is not a finite number, commas only between groups",
        ),
        ([{"question": "q", "answer": "x\n#### 3,5"}], "'3,5' is not a finite number, commas only between groups"),
        ("[" * 100_000 + "]" * 100_000, r"data\.json: cannot be read as JSON from line 1 on \(.*recursion"),
        ('[{"answer_value": ' + "1" * 5000 + "}]", r"data\.json: cannot be read as JSON from line 1 on \(.*digits"),
        ([ROW, ROW | {"item_id": "svamp_2"}, ROW], "row 2, field 'item_id': 'svamp_1' already stands in row 0"),
        ([{"question": "q", "answer": "12"}], "row 0, field 'answer': has no '####'"),
        ([{"question": "q", "answer": "Many.\n####"}], "row 0, field 'answer_value': is blank"),
    ],
)
def test_bad_content_is_named(write, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        load_examples(write(rows), need_cot=True)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # what is wrong; what to do


def test_a_broken_line_of_json_lines_is_counted_in_the_file(write):
    with pytest.raises(InputError, match="not JSON at line 3, column 1"):
        load_examples(write('{"question": "q", "answer": "#### 1"}\n\nnonsense\n', "x.jsonl"), need_cot=False)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_byte_order_mark_and_a_list_in_a_jsonl_file_are_read(tmp_path, name):
    texts = [json.dumps([ROW], indent=1), json.dumps([ROW]), f"\n{json.dumps([ROW])}\n"]
    texts += [json.dumps(ROW) + "\n", json.dumps(ROW)] if name.endswith("l") else []
    for text in texts:
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / name).write_text(text, encoding=encoding)
            [example] = load_examples(tmp_path / name, need_cot=True)
            assert example.question == "1 + 1?"


def test_unreadable_files(tmp_path):
    with pytest.raises(InputError, match=r"missing\.json: cannot be read \(No such file"):
        load_examples(tmp_path / "missing.json", need_cot=False)
    with pytest.raises(InputError, match="cannot be read"):
        load_examples(tmp_path, need_cot=False)
    (tmp_path / "latin.json").write_bytes(b'[{"question": "caf\xe9"}]')
    with pytest.raises(InputError, match="byte 18 is not UTF-8"):
        load_examples(tmp_path / "latin.json", need_cot=False)


def test_a_solution_is_optional_where_none_is_needed(write):
    (example,) = load_examples(write([ROW | {"answer_cot": ""}]), need_cot=False)
    assert example.answer_cot is None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The working folder holds a dataset as the `datasets` library finds it, and the library's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    configs = [{"config_name": "main", "data_files": "m.jsonl"}, {"config_name": "other", "data_files": "o.jsonl"}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    (folder / "m.jsonl").write_text('{"question": "2 and 3?", "answer": "2+3 = <<2+3=5>>5\\n#### 5"}\n')
    (folder / "o.jsonl").write_text('{"item_id": "toy_9", "question": "1?", "answer_value": 1}\n')


def test_the_hubs_library_finds_pytorch_where_it_is_installed(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as main() does
    load_examples("hub:owner/name/other:train", need_cot=False)
    assert sys.modules.get("torch", "nowhere") is not None


def test_hub_datasets(hub):
    assert load_examples("hub:owner/name/main:train", need_cot=True) == [Example("gsm8k_0", "2 and 3?", "5", "2+3 = 5")]
    assert load_examples("hub:owner/name/other:train", need_cot=False) == [Example("toy_9", "1?", "1")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:owner/name/main:dev", "hub:owner/name/main:dev: cannot be loaded .*Unknown split"),
        ("hub:owner/name:train", "cannot be loaded .*Config name is missing"),
        ("hub:nobody/nothing:train", "hub:nobody/nothing:train: cannot be loaded .*check the name and the network"),
        ("hub:owner/name", "not of the form hub:owner/name:split"),
        ("hub:name:train", "not of the form hub:owner/name:split"),
    ],
)
def test_hub_failures(hub, source, message):
    with pytest.raises(InputError, match=message):
        load_examples(source, need_cot=False)


def test_a_question_never_stands_on_both_sides():
    texts = [f"Question {index % 40}?" if index < 60 else f"QUESTION  {index % 40}? \n" for index in range(80)]
    examples = questions(*texts)  # 40 questions, each asked twice or more, in two spellings
    rest, held = split_off(examples, 10, seed=42)
    assert shared_questions(rest, held) == 0
    assert Counter(rest + held) == Counter(examples)
    assert len(held) == 10
    assert rest == sorted(rest, key=examples.index) and held == sorted(held, key=examples.index)
    assert len(split_off(examples, 9, seed=42)[1]) == 10  # the tenth goes with its twin


def test_the_split_is_a_function_of_text_and_seed():
    examples = questions(*(f"Question {index}?" for index in range(50)))
    held = {example.question for example in split_off(examples, 10, seed=42)[1]}
    assert {example.question for example in split_off(examples[::-1], 10, seed=42)[1]} == held
    assert {example.question for example in split_off(examples, 10, seed=43)[1]} != held
    assert split_off(examples, 0, seed=42) == (examples, [])


@pytest.mark.parametrize("rows", [4, 5])
def test_holding_out_everything_is_refused(rows):
    with pytest.raises(InputError, match=f"holding out {rows} of 4 rows leaves none"):
        split_off(questions("a", "b", "c", "d"), rows, seed=0)


def test_shared_questions_ignore_case_and_whitespace():
    assert shared_questions(questions("How  many?", "how many?\n", "Who?"), questions("How many?", "What?")) == 2
    assert shared_questions([], questions("How many?")) == 0


def test_fit_drops_what_is_longer_than_the_limit():
    examples = questions("a", "b", "c", "d")
    assert fit(examples, [5, 7, 6, 8], 7, max_dropped=0.25, what="max_length") == examples[:3]
    assert fit(examples, [5, 7, 6, 8], 8, max_dropped=0.0, what="max_length") == examples


def test_fit_refuses_to_drop_too_many():
    examples = questions("a", "b", "c", "d")
    with pytest.raises(InputError, match=r"max_prompt=6: 2 of 4 rows are longer \(the longest has 8 tokens\).* 25\.0%"):
        fit(examples, [5, 7, 6, 8], 6, max_dropped=0.25, what="max_prompt")
    with pytest.raises(InputError, match="max_prompt=4: 4 of 4 rows"):
        fit(examples, [5, 7, 6, 8], 4, max_dropped=1.0, what="max_prompt")
