"""wandb, offline and with a server, and trackio: what each has of a run that is killed and resumed."""

import hashlib
import json
import signal
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from test_trackers import KILLED, in_a_process, running, until
from wandb_server import serving

from reft_jax.config import default_config
from reft_jax.train.trackers import MetricsWriter, deliver

pytestmark = pytest.mark.usefixtures("patience")


def killed_and_resumed(name: str, folder, capsys, before: str = "") -> str:
    """Steps 1, 2 and the kill; then step 2 again, and 3. Returns the run id.

    before: code of the process that is killed, right before its end.
    """
    *steps, kill = KILLED.format(name=name).splitlines()
    in_a_process("\n".join([*steps, before, kill]), folder, end=-signal.SIGKILL)
    run_id = json.loads((folder / "a run" / "reft" / "tracking.json").read_text())["run_id"]
    until(lambda: not running(str(folder)))  # its process has closed the run
    config = default_config()
    config.tracking = f"jsonl,{name}"
    with MetricsWriter(folder / "a run" / "reft", config, {"jax": "0.10"}) as writer:
        writer.truncate_after(1)
        for step in (2, 3):
            writer.write(step, {"reward": step / 4})
    deliver()
    assert capsys.readouterr().err == "" and not running(str(folder))
    return run_id


STEPS = [{"step": step, "reward": step / 4} for step in (1, 2, 3)]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs reft_jax[wandb]")
def test_wandb_offline_has_one_id_after_a_kill_and_each_step_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = killed_and_resumed("wandb", tmp_path, capsys)
    has = wandb_has(tmp_path / "a run" / "reft")
    assert has.ids == [run_id.replace(" ", "_")] * 2 and has.lines == STEPS
    assert len(has.configs) == 2
    assert all(one["rl.kl_coef"] == 0.01 and one["versions.jax"] == "0.10" for one in has.configs)
    assert has.files == {"metrics.jsonl": sha256(tmp_path / "a run" / "reft" / "metrics.jsonl")}


LOST = """
from urllib.request import urlopen
lines = lambda: json.load(urlopen(os.environ["WANDB_BASE_URL"]))
until(lambda: any(lines()))
until(lambda: lines() == [2], 10)  # the last step does not wait for the next
os.killpg(trackers._ALL[0]._process.pid, signal.SIGKILL)
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs reft_jax[wandb]")
def test_a_server_of_wandb_sees_one_run_that_continues(tmp_path, capsys, monkeypatch):
    """The tracker's process is killed too, as when a machine is lost."""
    with serving(monkeypatch) as runs:
        run_id = killed_and_resumed("wandb", tmp_path, capsys, before=LOST)
    ((name, run),) = runs.items()
    assert name == run_id.replace(" ", "_") and (run.starts, run.resumes, run.complete) == (2, 1, True)
    assert [{"step": line["_step"], "reward": line["reward"]} for line in map(json.loads, run.history)] == STEPS
    config = json.loads(run.config)
    assert config["rl.kl_coef"]["value"] == 0.01 and config["versions.jax"]["value"] == "0.10"
    assert len(run.files["metrics.jsonl"].splitlines()) == 3 and json.loads(run.summary)["reward"] == 0.75


class Has(NamedTuple):
    """What a tracker has of one stage, or of the results."""

    ids: list[str]  # of its runs, one per start for wandb's offline files
    lines: list[dict]  # as in metrics.jsonl
    configs: list[dict]
    files: dict[str, str]  # SHA-256 by name


def wandb_has(folder) -> Has:
    """Reads the offline files of a stage."""
    has = Has([], [], [], {})
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        has.ids.append(file.stem.removeprefix("run-"))
        for record in wandb_records(file):
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                own = {name: value for name, value in items.items() if not name.startswith("_")}
                has.lines.append({"step": items["_step"]} | own)
            if record.HasField("run"):
                has.configs.append(ours({one.key: json.loads(one.value_json) for one in record.run.config.update}))
            if record.HasField("files"):
                names = [one.path for one in record.files.files if one.path != "requirements.txt"]
                has.files.update({name: sha256(file.parent / "files" / name) for name in names})
    return has


def ours(config: dict) -> dict:
    """Without what the library adds."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wandb_records(file):
    """The records of an offline file: LevelDB's log format (blocks of 32 KiB; crc, length, kind) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits: zeros up to the next block
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(data):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs reft_jax[trackio]")
def test_trackio_has_one_run_after_a_kill_and_each_step_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_id = killed_and_resumed("trackio", tmp_path, capsys)
    has = trackio_has(run_id, tmp_path)
    assert (has.ids, has.lines) == ([run_id], STEPS)
    assert has.configs[0]["rl.kl_coef"] == 0.01 and has.configs[0]["versions.jax"] == "0.10"
    assert has.files == {"metrics.jsonl": sha256(tmp_path / "a run" / "reft" / "metrics.jsonl")}


def trackio_has(run_id: str, folder) -> Has:
    """Reads the runs of this name in TRACKIO_DIR. In a process of its own: the library keeps threads."""
    read = f"from test_services import read_trackio\nprint(json.dumps(read_trackio({run_id!r})))"
    return Has(*json.loads(in_a_process(read, folder).stdout.splitlines()[-1]))


def read_trackio(run_id: str) -> Has:
    from trackio.cas import blob_path
    from trackio.sqlite_storage import SQLiteStorage

    has = Has([], [], [], {})
    for one in SQLiteStorage.get_run_records("reft_jax"):
        if one["name"] == run_id:
            of = {"project": "reft_jax", "run": one["name"], "run_id": one["id"]}
            has.ids.append(one["name"])
            for line in SQLiteStorage.get_logs(**of):
                del line["timestamp"]
                has.lines.append(line)
            has.configs.append(ours(SQLiteStorage.get_run_config(**of) or {}))
            for link in SQLiteStorage.get_run_artifacts("reft_jax", one["name"], one["id"])["output"]:
                for file in SQLiteStorage.get_artifact_manifest("reft_jax", link["name"], None)["manifest"]:
                    has.files[file["path"]] = sha256(blob_path("reft_jax", file["digest"]))
    return has
