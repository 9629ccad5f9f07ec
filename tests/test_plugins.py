"""plugins.load: the object that a user's file defines, or one line that says what is wrong."""

import pickle
import sys

import pytest

from reft_jax import plugins
from reft_jax.types import InputError


def test_the_object_that_the_file_defines(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Mine:\n    x: int = 3\nTHIS = Mine()\nruns = []\nruns.append(1)\n"
    )
    this = plugins.load(f"{tmp_path}/mine.py:THIS", "model.family")
    assert this.x == 3 and pickle.loads(pickle.dumps(this)) == this
    monkeypatch.chdir(tmp_path)
    assert plugins.load("mine.py:Mine", "model.family") is type(this)  # one module, however it is named
    assert plugins.load("mine.py:runs", "model.family") == [1]


def test_a_file_may_import_what_is_hidden_from_libraries(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as main() does
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch.py").write_text("X = 3\n")
    (tmp_path / "mine.py").write_text("from torch import X\n")
    assert plugins.load(f"{tmp_path}/mine.py:X", "reward") == 3


@pytest.mark.parametrize(
    ("source", "value", "message"),
    [
        (None, "llama", "model.family='llama' must be path.py:NAME: a Python file and a name that it defines"),
        (None, "mine.py", "model.family='mine.py' must be path.py:NAME: a Python file and a name that it defines"),
        (None, "mine.py:", "model.family='mine.py:' must be path.py:NAME: a Python file and a name that it defines"),
        (None, "mine.py:THIS", "model.family='mine.py:THIS': there is no file mine.py; it must be a local file"),
        (
            None,
            "gs://bucket/mine.py:THIS",
            "model.family='gs://bucket/mine.py:THIS': there is no file gs://bucket/mine.py; it must be a local file",
        ),
        ("X = 1\n", "mine.py:THIS", "model.family='mine.py:THIS': mine.py does not define THIS"),
        ("\nx = 1 +\n", "mine.py:x", "model.family: mine.py, line 2: SyntaxError: invalid syntax; correct the file"),
        (
            "import json\ndef f():\n    json.loads('[1,\\n x]')\nf()\n",
            "mine.py:x",
            "mine.py, line 3: JSONDecodeError: Expecting value: line 2 column 2 (char 5); correct the file",
        ),
        (
            "import no_such_module\n",
            "mine.py:x",
            "model.family: mine.py, line 1: ModuleNotFoundError: No module named 'no_such_module'; correct the file",
        ),
        ("raise ValueError('two\\nlines')", "mine.py:x", "mine.py, line 1: ValueError: two lines; correct the file"),
        ("raise SystemExit(3)", "mine.py:x", "model.family: mine.py, line 1: SystemExit: 3; correct the file"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, source, value, message):
    monkeypatch.chdir(tmp_path)
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    with pytest.raises(InputError) as error:
        plugins.load(value, "model.family")
    assert str(error.value).endswith(message) and "\n" not in str(error.value)


def test_a_corrected_file_is_run_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("1 / 0")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        plugins.load(f"{file}:x", "task")
    file.write_text("x = 22  # another size")
    assert plugins.load(f"{file}:x", "task") == 22


def test_the_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plugins.absolute("mine.py:X") == f"{tmp_path}/mine.py:X"
    as_they_are = ["", "ppo", "hub:owner/name:test", "/a/b.py:X", "gs://bucket/b.py:X"]
    assert [plugins.absolute(name) for name in as_they_are] == as_they_are
