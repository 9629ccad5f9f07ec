"""`solve`: how the answer is read. A stand-in for the engine writes a program that returns a letter."""

import json

import numpy as np
import pytest
from tiny import tiny_model

from reft_jax import __main__, executor, save_hf
from reft_jax.commands import solve
from reft_jax.commands.sweep import Source
from reft_jax.tasks.tokenizer import encode, train_bpe
from reft_jax.types import Completion

PROGRAM = 'def solution():\n    """2 and 3?"""\n    return "b"'


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solve") / "base"
    tokenizer = train_bpe([PROGRAM], 300)
    save_hf(folder, *tiny_model(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    yield folder, tokenizer
    executor.shutdown()


@pytest.fixture
def answer(base, monkeypatch, capsys):
    """What `solve` says of the answer, and on stderr, given its flags."""
    folder, tokenizer = base

    class Engine:
        def __init__(self, *args, **kw): ...

        def generate(self, lm, asked, **kw):
            head = tokenizer.decode(asked[0].tokens)
            tokens = np.array(encode(tokenizer, PROGRAM.removeprefix(head[head.rfind("def") :])), np.int32)
            return [(0, Completion("question", 0, tokens, np.zeros(len(tokens), np.float32), False))]

    monkeypatch.setattr(solve, "Engine", Engine)
    monkeypatch.setattr(Source, "load", lambda *args: None)

    def ask(*flags):
        __main__.run_command(["solve", "2 and 3?", "--allow_unsandboxed", *flags])
        said, told = capsys.readouterr()
        return said.splitlines()[-1], told

    return ask


@pytest.fixture
def model(base, tmp_path):
    """A model of a run on MathQA that leaves the setting `task` empty."""
    folder = tmp_path / "models" / "sft"
    folder.mkdir(parents=True)
    data = tmp_path / "train.json"
    (tmp_path / "config.json").write_text(json.dumps({"model.path": str(base[0]), "task": "", "data.train": str(data)}))
    data.write_text(json.dumps([{"item_id": "mathqa_1", "question": "2 and 3?", "answer_value": "b"}]))
    return folder


def test_the_training_file_of_the_run_says_what_an_answer_is(answer, model):
    found, told = answer(f"--model={model}")
    assert found == "answer: b" and "read as a number" not in told
    assert answer(f"--model={model}", "--task=gsm8k")[0] == "answer: none (wrong_type)"
    (model.parents[1] / "train.json").unlink()
    found, told = answer(f"--model={model}")
    assert found == "answer: none (wrong_type)"
    assert "the answer is read as a number; --task says otherwise" in told and "train.json" in told


def test_the_task_of_a_folder_is_a_flag(answer, base):
    assert answer(f"--model={base[0]}")[0] == "answer: none (wrong_type)"
    assert answer(f"--model={base[0]}", "--task=mathqa")[0] == "answer: b"
