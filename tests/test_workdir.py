"""A work directory that was moved, and leftover and damaged files in it."""

import json
import re
from pathlib import Path

import pytest

from reft_jax.commands import paths
from reft_jax.commands.solve import trained_with
from reft_jax.commands.sweep import find
from reft_jax.config import check_config, load_config, replaced
from reft_jax.run import open as open_
from reft_jax.run.workdir import MACHINE, check_workdir, create_workdir, recorded, with_absolute_paths
from reft_jax.settings import SETTINGS
from reft_jax.stages.models import read_result
from reft_jax.types import InputError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


def config(**changed):
    """As a user writes it, with relative paths."""
    written = load_config(str(CONFIG))
    files = {"model.path": "m", "data.train": "train.json", "data.test": "../t/test.json", "data.dev": ""}
    written.update_from_flattened_dict(files | {key.replace("_", ".", 1): value for key, value in changed.items()})
    return check_config(written)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of a first start, with its model and its data."""
    (tmp_path / "here" / "m").mkdir(parents=True)
    (tmp_path / "t").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for file in ("here/train.json", "t/test.json"):
        (tmp_path / file).write_text("[]")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def opened(written, workdir: Path):
    """What a start does to its config, and what it records."""
    changed = with_absolute_paths(written, workdir)
    check_workdir(changed, workdir, [])
    create_workdir(changed, workdir)
    return changed


def test_paths_are_recorded_absolute_and_mean_the_same_from_elsewhere(here, monkeypatch, capsys):
    written, workdir = config(), here / "run"
    first = opened(written, workdir)
    assert written.model.path == "m"
    assert recorded(workdir)["model.path"] == first.model.path == str(here / "here" / "m")
    assert first.data.test == str(here / "t" / "test.json") and first.data.dev == ""
    monkeypatch.chdir(here / "elsewhere")
    assert opened(written, workdir) == first
    assert f"model.path: m is {here}/here/m, as before" in capsys.readouterr().out
    (here / "elsewhere" / "m").mkdir()  # another model of that name
    with pytest.raises(InputError, match=f"made with other settings .*model.path: '{here}/here/m' -> '{here}/else"):
        opened(written, workdir)


def test_an_older_work_directory_with_relative_paths_still_opens(here):
    workdir = here / "run"
    opened(config(), workdir)
    before = recorded(workdir) | {"model.path": "m", "data.train": "train.json", "data.test": "../t/test.json"}
    (workdir / "config.json").write_text(json.dumps(before))
    opened(config(), workdir)
    assert recorded(workdir)["data.train"] == str(here / "here" / "train.json")
    (workdir / "config.json").write_text(json.dumps(before | {"model.path": "other"}))
    with pytest.raises(InputError, match="made with other settings"):
        opened(config(), workdir)


def old_names(settings: dict) -> dict:
    """As versions before recorded them."""
    back = {"rl.questions": "ppo.prompts", "data.format": "data.engine"}
    return {back.get(key) or re.sub(r"^rl\.", "ppo.", key): value for key, value in settings.items()}


def test_an_older_work_directory_with_old_names_still_opens(here):
    workdir = here / "run"
    absolute = opened(config(data_format="nl"), workdir)
    (workdir / "models" / "sft").mkdir(parents=True)
    now, path = recorded(workdir), workdir / "config.json"
    before = old_names(now)
    assert {"ppo.prompts", "ppo.kl_coef", "data.engine"} <= before.keys() and not any(k[:3] == "rl." for k in before)
    path.write_text(json.dumps(before))
    assert recorded(workdir) == now
    check_workdir(absolute, workdir, ["sft"], read_only=True)  # as export
    assert json.loads(path.read_text()) == before
    assert trained_with(find(str(workdir / "models" / "sft")))["data.format"] == "nl"
    opened(config(data_format="nl"), workdir)  # as evaluate
    assert json.loads(path.read_text()) == now
    path.write_text(json.dumps(before))
    with pytest.raises(InputError, match=r"other settings \(rl.kl_coef: 0.01 -> 0.5\); .*=rl.kl_coef$"):
        opened(config(data_format="nl", rl_kl_coef=0.5), workdir)


def test_a_work_directory_that_is_older_than_a_setting_still_opens(here):
    """With the default of the setting; another value is refused, as it is where the setting is recorded."""
    workdir = here / "run"
    now = replaced(config(), {key: setting.default for key, setting in SETTINGS.items()})
    opened(now, workdir)
    everything, path = recorded(workdir), workdir / "config.json"
    for key in SETTINGS:
        path.write_text(json.dumps({name: value for name, value in everything.items() if name != key}))
        opened(now, workdir)
        assert recorded(workdir) == everything
        path.write_text(json.dumps({name: value for name, value in everything.items() if name != key}))
        default = SETTINGS[key].default
        changed = replaced(now, {key: f"{default}x" if isinstance(default, str) else default + 1})
        if key in MACHINE:
            check_workdir(changed, workdir, [])
            continue
        with pytest.raises(InputError, match=rf"made with other settings \({key}: [^;]*\); .*={key}$"):
            check_workdir(changed, workdir, [])


def test_names_are_no_paths(here):
    (here / "here" / "toy").mkdir()
    written = config(model_path="toy", data_train="toy", data_test="toy", data_dev="hub:a/b:test")
    assert with_absolute_paths(written, here / "run") == written
    nowhere = config(model_path="codellama/CodeLlama-7b-hf")
    assert with_absolute_paths(nowhere, here / "run").model.path == "codellama/CodeLlama-7b-hf"


def test_what_a_finished_stage_no_longer_needs_goes(here):
    workdir = here / "run"
    opened(config(), workdir)
    for folder in ("sft/checkpoints/3", "sft/best_2", "sft/best_3.new", "sft/tb", "reft/checkpoints/1", "reft/best_1"):
        (workdir / folder).mkdir(parents=True)
    for foreign in ("job/checkpoints", "job/best_1"):
        (workdir / foreign).mkdir(parents=True)
    for stage in ("sft", "job"):
        (workdir / stage / "done.json").write_text("{}")
    opened(config(), workdir)
    left = sorted(str(path.relative_to(workdir)) for path in workdir.glob("*/*"))
    theirs = ["job/best_1", "job/checkpoints", "job/done.json"]
    assert left == [*theirs, "reft/best_1", "reft/checkpoints", "sft/done.json", "sft/tb"]


def test_a_folder_that_is_new_to_runs_loses_nothing(here):
    workdir = here / "run"
    for stage in ("sft", "job"):  # another tool may use our names, too
        (workdir / stage / "checkpoints").mkdir(parents=True)
        (workdir / stage / "done.json").write_text("{}")
    opened(config(), workdir)
    left = sorted(str(path.relative_to(workdir)) for path in workdir.glob("*/*"))
    assert left == ["job/checkpoints", "job/done.json", "sft/checkpoints", "sft/done.json"]


def toy_files(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "toy").iterdir()}


def toy_of_a_start(workdir: Path, **changed) -> None:
    """What a start does to toy/, without the model, which takes seconds."""
    written = load_config(str(CONFIG))
    written.update_from_flattened_dict({key.replace("_", ".", 1): value for key, value in changed.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_, "write_model", lambda *args: None)
        for last in ("load_tokenizer", "read_inputs"):
            patch.setattr(open_, last, lambda *args: None)
        open_.toy_inputs(check_config(written), workdir, read_only=False)


def test_a_toy_folder_of_another_is_never_removed(tmp_path):
    (tmp_path / "toy" / "plans").mkdir(parents=True)
    with pytest.raises(InputError, match=f"--workdir: {tmp_path}/toy is there already, and no run has made it; choose"):
        toy_of_a_start(tmp_path)
    assert toy_files(tmp_path) == {"plans"}


def test_the_toy_of_a_start_that_failed_is_made_again(tmp_path):
    toy_of_a_start(tmp_path, toy_train_rows=20)
    assert len(json.loads((tmp_path / "toy" / "train.json").read_text())) <= 20
    (tmp_path / "toy" / "model").mkdir()
    toy_of_a_start(tmp_path, toy_train_rows=40)
    assert len(json.loads((tmp_path / "toy" / "train.json").read_text())) > 20
    assert "model" not in toy_files(tmp_path)


def test_a_folder_in_it_that_cannot_be_written_is_found_first(here, monkeypatch):
    workdir = here / "run"
    (workdir / "samples").mkdir(parents=True)
    refuses = str(workdir / "samples")
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != refuses)
    with pytest.raises(InputError, match="cannot write to .*/run/samples"):
        check_workdir(config(), workdir, [])
    check_workdir(config(), workdir, [], read_only=True)


@pytest.mark.parametrize("name", ["report.md", "curves.png", "executions.jsonl.gz", "samples/sft_test.jsonl"])
def test_what_cannot_be_written_at_the_end_is_found_at_the_start(here, monkeypatch, name):
    path = here / "run" / name
    path.mkdir(parents=True)
    with pytest.raises(InputError, match=f"/run/{name} is not a file that can be written"):
        check_workdir(config(), here / "run", [])
    check_workdir(config(), here / "run", [], read_only=True)
    path.rmdir()
    path.write_text("")
    check_workdir(config(), here / "run", [])
    monkeypatch.setattr("os.access", lambda there, mode: str(there) != str(path))
    with pytest.raises(InputError, match=f"/run/{name} is not a file that can be written"):
        check_workdir(config(), here / "run", [])


def test_a_file_where_a_folder_has_to_be_is_found_at_the_start(here):
    (here / "run").mkdir()
    (here / "run" / "samples").write_text("")
    with pytest.raises(InputError, match="/run/samples is not a folder that can be written"):
        check_workdir(config(), here / "run", [])


RESULT = {"best": 1, "epochs": 2, "seconds": 1.0, "checksum": "0"}


def changed_results() -> list[str]:
    """Results of an SFT with one mistake each, which parse."""
    without = [{key: value for key, value in RESULT.items() if key != name} for name in RESULT]
    wrong = [{"seconds": "x"}, {"best": "1"}, {"epochs": True}, {"data": [1]}, {"data": {"train": "a"}}, {"from": 3}]
    return [json.dumps(one) for one in (*without, *(RESULT | one for one in wrong))]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"best": 3}', "\x00" * 20, *changed_results()])
def test_a_damaged_done_json_is_one_line(tmp_path, text):
    path = tmp_path / "sft" / "done.json"
    path.parent.mkdir()
    assert read_result(path) is None
    path.write_text(text)
    with pytest.raises(InputError, match=r"sft/done.json: not what a finished stage writes .*models/sft to begin"):
        read_result(path)
    path.write_text(json.dumps(RESULT))
    assert read_result(path) == RESULT


@pytest.mark.parametrize(
    ("text", "folders", "expected"),
    [
        ("a=m+r,m", "m r", [("a", "m", "r"), ("", "m", "")]),
        ("lr=1e-5/m", "lr=1e-5/m", [("", "lr=1e-5/m", "")]),
        ("lr=1e-5/m", "1e-5/m", [("lr", "1e-5/m", "")]),
        ("./lr=1e-5/m", "lr=1e-5/m", [("", "./lr=1e-5/m", "")]),
        ("a=x/lr=1e-5/m", "x/lr=1e-5/m", [("a", "x/lr=1e-5/m", "")]),
        ("a=c++/m+c++/r", "c++/m c++/r", [("a", "c++/m", "c++/r")]),
        ("c++/m", "c++/m", [("", "c++/m", "")]),
        ("a=x,y/m,b=z", "x,y/m z", [("a", "x,y/m", ""), ("b", "z", "")]),
        ("a=x,y+r,1,m", "x,y r,1 m", [("a", "x,y", "r,1"), ("", "m", "")]),
        ("a=no,m", "m", [("a", "no", ""), ("", "m", "")]),
    ],
)
def test_letters_that_divide_may_stand_in_a_path(tmp_path, monkeypatch, text, folders, expected):
    for folder in folders.split():
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = [paths.named(entry) for entry in paths.listed(text, paths.is_checkpoint)]
    assert [(name, *paths.with_reranker(rest)) for name, rest in found] == expected


@pytest.mark.parametrize(
    ("folders", "says"), [("m+", "on one side"), ("+m", "on one side"), ("a+b+c", "more than one '[+]'")]
)
def test_a_reranker_that_is_not_clear(tmp_path, monkeypatch, folders, says):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        paths.with_reranker(folders)
