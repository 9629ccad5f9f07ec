"""The notebooks: they run at toy size, their commands are understood, and their files are those of the tutorial."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from test_launch import stand_in
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
    of_first_cell(path, monkeypatch, size)
    shown = [words for text in scripts(path) for words in commands(f"```bash\n{os.path.expandvars(text)}\n```\n")]
    shown += [words for text in cells(path, "markdown") for words in commands(f"{text}\n")]
    assert len(shown) >= 3
    for words in shown:
        understood(words)


@EACH
def test_a_script_ends_at_its_first_error(path):
    assert len(scripts(path)) >= 4 and all(text.startswith("set -e\n") for text in scripts(path))


GIT = f"""[[ "$*" == "clone --quiet https://address reft_jax" ]] || exit 1
mkdir -p reft_jax/launch reft_jax/reft_jax
cp {REPO}/launch/{{venv,python}}.sh reft_jax/launch
cp {REPO}/requirements*.txt {REPO}/pyproject.toml reft_jax
"""
PYTHON = """case "$*" in
  *version_info*) echo 3.13 ;;
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""
UV = '[[ "$1" != pip ]] || echo "$@" >>"$RECORD"'


def of_first_cell(path: Path, monkeypatch, size: str) -> dict[str, str]:
    """The environment that the scripts of a notebook get."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("PYTHON", "VENV"):
        os.environ.pop(name, None)
    os.environ["REFT_NOTEBOOK"] = size
    exec(cells(path, "code")[0], {})
    return dict(os.environ)


@EACH
def test_a_fresh_machine_gets_its_venv_and_all_cells_may_run_again(path, tmp_path, monkeypatch):
    """The second time the notebook is in the clone already, which has a folder reft_jax of its own."""
    for name, script in (("git", GIT), ("python3.13", PYTHON), ("uv", UV)):
        stand_in(tmp_path, name, script)
    record = tmp_path / "record"
    kernel = of_first_cell(path, monkeypatch, "full") | {"RECORD": str(record)}
    kernel["PATH"] = f"{tmp_path}:{kernel['PATH']}"

    def installed(address: str, folder: Path) -> subprocess.CompletedProcess:
        command = ["bash", "-c", scripts(path)[0]]
        env = kernel | {"REPOSITORY": address}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    without = installed("", tmp_path)
    assert without.returncode and "give its address in the first cell" in without.stderr
    for folder in (tmp_path, tmp_path, tmp_path / "reft_jax"):
        done = installed("https://address", folder)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "reft_jax" / kernel["REFT_PYTHON"]).is_file()
    [install] = record.read_text().splitlines()  # the first time only
    assert install.endswith(f"-r requirements-newest.txt -e .[{kernel['EXTRA']}]")


def test_after_its_hours_the_kaggle_notebook_starts_nothing(tmp_path, monkeypatch):
    path = REPO / "notebooks" / "kaggle_tpu.ipynb"
    [train] = [text for text in scripts(path) if "timeout" in text]
    env = of_first_cell(path, monkeypatch, "full") | {"RECORD": str(tmp_path / "record")}
    env["REFT_PYTHON"] = str(stand_in(tmp_path, "python", 'echo "$@" >>"$RECORD"'))

    def trained(seconds: int) -> subprocess.CompletedProcess:
        end = {"END": str(int(time.time()) + seconds)}
        return subprocess.run(["bash", "-c", train], env=env | end, capture_output=True, text=True, check=False)

    for seconds in (-3600, 0, 30):
        done = trained(seconds)
        assert (done.returncode, done.stderr) == (0, "") and "hours of the first cell are over" in done.stdout
        assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "record").exists()
    assert trained(3600).returncode == 0
    assert (tmp_path / "record").read_text().startswith("-m reft_jax pipeline --config=configs/")


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
