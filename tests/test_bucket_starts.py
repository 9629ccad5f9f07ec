"""Starts in a bucket: one that does not answer, one of another store, and folders of others in it."""

import sys
from pathlib import Path

import pytest
from emulator import BUCKET, emulator, faulty, pointed_at
from test_bucket import ROOT, names
from test_workdir import config, toy_of_a_start

from reft_jax import __main__, store
from reft_jax.run.workdir import create_workdir
from reft_jax.types import InputError, SaveError


@pytest.mark.parametrize("place", ["s3://b/run", "GS://b/run", "file:///run", "hdfs://host/run"])
def test_another_store_is_no_folder_of_this_disk(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scheme = place.partition("://")[0]
    config = f"--config={ROOT}/configs/quickstart.py"
    for words in (["sft", config, f"--workdir={place}"], ["convert", "gsm8k", "--in=no", f"--out_dir={place}"]):
        with pytest.raises(InputError, match=f"{place}: {scheme}:// is not supported; give a path on a disk, or gs://"):
            __main__.run_command(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["runs/q", "hub:a/b:test", "path.py:NAME", r"C:\runs", "a/b://c", "://x"])
def test_other_names_with_a_colon_are_paths(name):
    assert store.as_path(name) == Path(name)


def test_a_store_that_is_gone_before_a_start_is_no_wrong_input(tmp_path, impatient, monkeypatch, capsys):
    """Exit code 4, so that a launch script starts it again."""
    monkeypatch.chdir(ROOT)
    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        proxy.gone = True
        words = ["sft", "--config=configs/quickstart.py", f"--workdir={BUCKET}/run"]
        monkeypatch.setattr(sys, "argv", ["reft", *words])
        with pytest.raises(SystemExit) as ended:
            __main__.main()
    assert ended.value.code == SaveError.exit_code == 4
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f"error: {BUCKET}/run/lock.json could not be reached (the bucket refuses or does not answer: "
    )
    assert said.endswith("see to the bucket, your rights in it and the network, then run the same command again")


def test_what_a_gone_store_hides_is_neither_damaged_nor_missing(tmp_path, impatient, monkeypatch):
    from reft_jax.model_folder import read_bytes
    from reft_jax.run.workdir import recorded
    from reft_jax.stages.models import read_result
    from reft_jax.train import checkpoints
    from reft_jax.train.checksums import damage, model_checksum, write_manifest
    from reft_jax.train.metrics import read_metrics
    from reft_jax.train.trackers import _read_known

    with faulty(tmp_path, 0.0) as proxy, pointed_at(proxy.url):
        stage = store.as_path(f"{BUCKET}/run/sft")
        step = stage / "checkpoints" / "3"
        (step / "step.json").write_text("{}")
        write_manifest(step)
        asks = [
            lambda: recorded(stage.parent),
            lambda: read_result(stage / "done.json"),
            lambda: checkpoints.has_value_head(step),
            lambda: damage(step),
            lambda: checkpoints.check_shapes(step, {}),
            lambda: read_metrics(stage),
            lambda: _read_known(stage),
            lambda: read_bytes(stage / "config.json"),
            lambda: store.read_text(f"{BUCKET}/train.json"),
        ]
        saved = checkpoints.Checkpoints(stage / "checkpoints", 2, {})
        monkeypatch.setattr(checkpoints, "_steps", lambda folder: [3])  # the store goes after it has listed them
        proxy.gone = True
        for ask in (*asks, lambda: saved.restore({})):
            with pytest.raises(SaveError, match=f"^{BUCKET}/.* could not be reached"):
                ask()
        monkeypatch.setattr(type(step), "is_file", lambda path: True)  # it goes while a model is looked at
        for ask in (lambda: damage(step), lambda: model_checksum(step, tmp_path, tmp_path / "memory")):
            with pytest.raises(SaveError, match=f"^{BUCKET}/.* could not be reached"):
                ask()
        monkeypatch.undo()
        proxy.gone = False
        assert damage(step) is None and names(stage) == ["checkpoints/3/manifest.json", "checkpoints/3/step.json"]


def test_a_foreign_folder_in_a_bucket_stays(tmp_path):
    """A whole bucket as the work directory."""
    with emulator(tmp_path) as url, pointed_at(url):
        workdir = store.as_path(BUCKET)
        (workdir / "toy" / "plans" / "1.txt").write_text("x")
        with pytest.raises(InputError, match=f"{BUCKET}/toy is there already, and no run has made it"):
            toy_of_a_start(workdir)
        (workdir / "sft" / "done.json").write_text("{}")
        (workdir / "sft" / "checkpoints" / "1").write_text("x")
        create_workdir(config(), workdir)
        assert {"toy/plans/1.txt", "sft/done.json", "sft/checkpoints/1"} <= set(names(workdir))
        (workdir / "config.json").unlink()
        (workdir / "toy" / "plans" / "1.txt").unlink()
        for rows in (20, 40):  # a start that failed, and one with other settings
            toy_of_a_start(workdir, toy_train_rows=rows)
        assert set(names(workdir / "toy")) == {"made_by_reft_jax.txt", "train.json", "dev.json", "test.json"}
