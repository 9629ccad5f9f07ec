"""What the documents show: every command is understood, and the files of the tutorial fit together."""

import re
import shlex
from pathlib import Path

import pytest

from reft_jax.__main__ import parse
from reft_jax.commands.flags import config_of, parse_config
from reft_jax.commands.table import COMMANDS, TABLE
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.rewards import Rewards
from reft_jax.types import Example, InputError, Verdict

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(REPO.glob("*.md")), *sorted(REPO.glob("docs/**/*.md")), REPO / "benchmarks" / "README.md"]
TUTORIAL = REPO / "docs" / "tutorial.md"


def commands(text: str) -> list[list[str]]:
    """The words of every command of this project that a document shows in a block; `$config` is set by the block."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.S | re.M):
        config = (re.findall(r'^config="(.*)"$', block, re.M) or [""])[0]
        for line in block.replace("\\\n", " ").replace("$config", config).splitlines():
            if line.count('"') % 2:  # a line of a longer text
                continue
            words = shlex.split(line, comments=True)
            if " -m reft_jax " in line:
                words = words[words.index("reft_jax") + 1 :]
                found.append(words[: words.index("||")] if "||" in words else words)
            elif words and words[0] == "reft":
                found.append(words[1:])
            elif words and words[0].removeprefix("./").startswith(("launch/", ".ci/")):
                found.append(words)
    return found


def understood(words: list[str]) -> None:
    """Checks one command, in the folder of the repository: its script exists, or it parses; so does its config."""
    if "/" in words[0]:
        assert Path(words[0]).is_file()
        if words[:2] != ["launch/tpu_vm.sh", "start"]:
            return
        words = words[2:]
    if words == ["--version"]:
        return
    assert words[0] in COMMANDS
    _, values, _ = parse([row for row in TABLE if row.command == words[0]], words)
    if "config" in values and (values.config or "").startswith("configs/"):
        config_of(values)


SHOWN = [(document, words) for document in DOCUMENTS for words in commands(document.read_text())]
NAMES = [f"{document.name}: {' '.join(words)[:60]}" for document, words in SHOWN]


@pytest.mark.parametrize(("document", "words"), SHOWN, ids=NAMES)
def test_every_command_shown_is_understood(document, words, monkeypatch):
    monkeypatch.chdir(REPO)
    understood(words)


def test_the_documents_show_commands():
    assert len(SHOWN) > 50 and len(commands(TUTORIAL.read_text())) == 5


def test_a_wrong_command_is_found():
    [words] = commands("```bash\n.venv/bin/python -m reft_jax sft --no_such_flag=1 # why\n```\n")
    with pytest.raises(InputError, match="unknown flag"):
        parse([row for row in TABLE if row.command == "sft"], words)


def test_the_files_of_the_tutorial_fit_together(tmp_path, monkeypatch, capsys):
    files = dict(re.findall(r'```python title="mine/(\w+\.py)"\n(.*?)```', TUTORIAL.read_text(), re.S))
    assert sorted(files) == ["config.py", "make_data.py", "reward.py"]
    (tmp_path / "mine").mkdir()
    for name, text in files.items():
        (tmp_path / "mine" / name).write_text(text)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    exec(files["make_data.py"], {})
    assert "20 rows" in capsys.readouterr().out
    config = parse_config(["reft", "--config=mine/config.py", "--config.reward=mine/reward.py:reward"])
    train = load_examples(config.data.train, need_cot=True)
    assert len(train) == 20 and len(load_examples(config.data.test, need_cot=False)) == 7
    names = {}
    exec(train[0].answer_cot, names)
    assert names["solution"]() == float(train[0].answer_value)
    with Rewards(config.reward, 1, 30.0, tmp_path / "log") as rewards:
        paid = rewards.submit(train[0].answer_cot, Example("gsm8k_1", "", "8"), Verdict(8.0, True, 1.0, "ok"))
        assert tuple(paid.result(60)) == (1.0, {"answer": 1.0, "short": 0.0})
        paid = rewards.submit(
            "def solution():\n    return 8", Example("gsm8k_1", "", "8"), Verdict(8.0, True, 1.0, "ok")
        )
        assert paid.result(60)[0] == pytest.approx(1.2)
