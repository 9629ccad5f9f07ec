"""What the documents show: every command is understood, and the files of the tutorial fit together."""

import ast
import re
import shlex
import tomllib
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
CONFIGS, BENCHMARKS = sorted(REPO.glob("configs/*.py")), sorted(REPO.glob("benchmarks/*.py"))
CODE = [path for folder in ("reft_jax", "examples", "tests") for path in sorted(REPO.glob(f"{folder}/**/*.py"))]
SCRIPTS = [*sorted(REPO.glob("launch/*")), *sorted(REPO.glob("benchmarks/*.sh")), REPO / ".ci" / "run"]
EXTRAS = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
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


def in_docstring(path: Path) -> str:
    """The indented lines of a module's docstring, as a block of a document."""
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    return "```bash\n" + "".join(f"{line.strip()}\n" for line in lines if line.startswith("    ")) + "```\n"


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


def after(start: str, text: str) -> list[str]:
    """What a text shows after `start`, in a line or between backticks, to its end or its comment."""
    return re.findall(rf"{start}([^`\n#|]*)", text.replace("\\\n", " "))


def flags_of(script: Path) -> set[str]:
    """The names of a script's flags."""
    defined = re.findall(r'(?:DEFINE_\w+\(|add_argument\()\s*"(?:--)?(\w+)"', script.read_text())
    return {*defined, *(f"no{name}" for name in defined)}


SHOWN = [(document, words) for document in DOCUMENTS for words in commands(document.read_text())]
SHOWN += [(config, words) for config in CONFIGS for words in commands(in_docstring(config))]
NAMES = [f"{document.name}: {' '.join(words)[:60]}" for document, words in SHOWN]


@pytest.mark.parametrize(("document", "words"), SHOWN, ids=NAMES)
def test_every_command_shown_is_understood(document, words, monkeypatch):
    monkeypatch.chdir(REPO)
    understood(words)


def test_the_documents_show_commands():
    assert len(SHOWN) > 50 and len(commands(TUTORIAL.read_text())) == 6


def test_a_wrong_command_is_found():
    [words] = commands("```bash\n.venv/bin/python -m reft_jax sft --no_such_flag=1 # why\n```\n")
    with pytest.raises(InputError, match="unknown flag"):
        parse([row for row in TABLE if row.command == "sft"], words)


@pytest.mark.parametrize("path", [*DOCUMENTS, *BENCHMARKS], ids=lambda path: str(path.relative_to(REPO)))
def test_benchmarks_are_shown_with_flags_that_they_have(path):
    for rest in after("python benchmarks/", path.read_text()):
        name, *words = rest.replace("[", " ").replace("]", " ").split()
        if name == "NAME.py":  # any
            continue
        script = REPO / "benchmarks" / name
        assert script.is_file()
        own = words[: words.index("COMMAND")] if "COMMAND" in words else words
        shown = {word[2:].partition("=")[0] for word in own if word.startswith("--")}
        assert shown <= flags_of(script), rest


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_tests_that_are_shown_exist(path):
    names = [line for file in REPO.glob("tests/test_*.py") for line in [file.name, *names_in(file)]]
    for rest in after(r"(?<![\w-])pytest ", path.read_text()):
        words = shlex.split(rest)
        for file, _, test in (word.partition("::") for word in words if word.startswith("tests")):
            assert (REPO / file).exists() and (not test or test in names_in(REPO / file)), rest
        chosen = words[words.index("-k") + 1] if "-k" in words else ""
        for part in {*chosen.split()} - {"and", "or", "not"}:
            assert any(part in name for name in names), rest


def names_in(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(), re.M)


def test_extras_that_are_shown_exist():
    for path in [*DOCUMENTS, *CODE, *SCRIPTS, *CONFIGS, *BENCHMARKS]:
        text = path.read_text()
        shown = re.findall(r"venv\.sh ([a-z]+(?:,[a-z]+)*)\b", text)
        shown += re.findall(r"pip install (?:-e )?'?(?:\.|reft_jax)\[([a-z,]+)\]", text)
        assert {one for extras in shown for one in extras.split(",")} <= EXTRAS.keys(), path


def test_venv_names_every_extra():
    [named] = re.findall(r"an extra of pyproject.toml: ([\w, \n#]+)\n#   launch", (REPO / "launch/venv.sh").read_text())
    assert sorted(re.findall(r"\w+", named)) == sorted(EXTRAS)


def test_what_does_not_exist_is_found():
    assert after("python benchmarks/", "`python benchmarks/a.py --b` c\npython benchmarks/d.py \\\n--e # f\n") == [
        "a.py --b",
        "d.py  --e ",
    ]
    assert {"rounds", "emulator"} <= flags_of(REPO / "benchmarks" / "bucket.py")
    assert {"full", "nowrite"} <= flags_of(REPO / "benchmarks" / "executor.py")
    assert not {"model", "config"} & flags_of(REPO / "benchmarks" / "bucket.py")


def test_the_files_of_the_tutorial_fit_together(tmp_path, monkeypatch, capsys):
    files = dict(re.findall(r'```python title="mine/(\w+\.py)"\n(.*?)```', TUTORIAL.read_text(), re.S))
    assert sorted(files) == ["config.py", "make_data.py", "reward.py"]
    (tmp_path / "mine").mkdir()
    for name, text in files.items():
        (tmp_path / "mine" / name).write_text(text)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.chdir(tmp_path)
    exec(files["make_data.py"], {})
    assert "112 rows" in capsys.readouterr().out
    config = parse_config(["reft", "--config=mine/config.py", "--config.reward=mine/reward.py:reward"])
    train = load_examples(config.data.train, need_cot=True)
    assert len(train) == 112 and len(load_examples(config.data.test, need_cot=False)) == 38
    names = {}
    exec(train[0].answer_cot, names)
    assert names["solution"]() == float(train[0].answer_value)
    with Rewards(config.reward, 1, 30.0, tmp_path / "log") as rewards:
        paid = rewards.submit(train[0].answer_cot, Example("gsm8k_1", "", "8"), Verdict(8.0, True, 1.0, "ok"))
        assert tuple(paid.result(60)) == (1.2, {"answer": 1.0, "short": 0.2})
        longer = train[0].answer_cot.replace("    result", "    more = 0\n    result", 1)
        paid = rewards.submit(longer, Example("gsm8k_1", "", "8"), Verdict(8.0, True, 1.0, "ok"))
        assert tuple(paid.result(60)) == (1.0, {"answer": 1.0, "short": 0.0})
