"""The notebooks: they run at toy size, their commands are understood, and their files are those of the tutorial."""

import json
import os
import re
from pathlib import Path

import pytest
from test_shown import TUTORIAL, commands, understood

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(REPO.glob("notebooks/*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def scripts(path: Path) -> list[str]:
    return [cell.removeprefix("%%bash\n") for cell in cells(path, "code") if cell.startswith("%%bash\n")]


@pytest.mark.parametrize("size", ["toy", "full"])
@EACH
def test_every_command_is_understood(path, size, monkeypatch):
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("REFT_NOTEBOOK", size)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    exec(cells(path, "code")[0], {})  # sets what the scripts read
    shown = [words for text in scripts(path) for words in commands(f"```bash\n{os.path.expandvars(text)}\n```\n")]
    shown += [words for text in cells(path, "markdown") for words in commands(f"{text}\n")]
    assert len(shown) >= 3
    for words in shown:
        understood(words)


@EACH
def test_a_script_ends_at_its_first_error(path):
    assert len(scripts(path)) >= 4 and all(text.startswith("set -e\n") for text in scripts(path))


@EACH
def test_nothing_of_a_run_is_stored(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@EACH
def test_every_file_it_links_is_there(path):
    links = re.findall(r"\]\(((?!http)[^)#]+)", "\n".join(cells(path, "markdown")))
    assert links and [link for link in links if not (path.parent / link).exists()] == []


def test_the_files_are_those_of_the_tutorial():
    told = dict(re.findall(r'```python title="(\S+)"\n(.*?)```', TUTORIAL.read_text(), re.S))
    code = cells(REPO / "notebooks" / "colab.ipynb", "code")
    written = dict(re.findall(r"\A%%writefile (\S+)\n(.*)\Z", cell, re.S)[0] for cell in code if "%%writefile" in cell)
    assert {name: text.strip() for name, text in written.items()} == {n: text.strip() for n, text in told.items()}


@pytest.mark.filterwarnings("ignore")  # those of Jupyter's own packages
@EACH
def test_it_runs_at_toy_size(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -e .[test]")
    nbformat = pytest.importorskip("nbformat")
    (tmp_path / "configs").symlink_to(REPO / "configs")
    monkeypatch.setenv("REFT_NOTEBOOK", "toy")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    shown = json.dumps(notebook.cells)
    assert "voting@2" in shown and (tmp_path / "runs").is_dir()
    if path.stem == "kaggle_tpu":
        assert "programs run with" in shown and (tmp_path / "runs" / "export" / "config.json").is_file()
    else:
        lines = (tmp_path / "runs" / "mine" / "reft" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1] and "reward/short" in json.loads(lines[0])
