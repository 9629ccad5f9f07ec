"""wandb, offline, and trackio: what a run leaves in each when it is killed and resumed, as the library reads it."""

import json
import signal
import struct
from importlib.util import find_spec

import pytest
from test_trackers import KILLED, in_a_process, running, until

from reft_jax.config import default_config
from reft_jax.train.trackers import MetricsWriter, deliver

pytestmark = pytest.mark.usefixtures("patience")


def killed_and_resumed(name: str, folder, capsys) -> str:
    """Steps 1, 2 and the kill; then step 2 again, and 3. Returns the run id."""
    in_a_process(KILLED.format(name=name), folder, end=-signal.SIGKILL)
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


STEPS = [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs reft_jax[wandb]")
def test_wandb_offline_has_one_id_after_a_kill_and_each_step_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = killed_and_resumed("wandb", tmp_path, capsys)
    ids, steps, configs = wandb_has(tmp_path / "a run" / "reft")
    assert ids == [run_id.replace(" ", "_")] * 2 and steps == STEPS
    assert configs and all(one["rl.kl_coef"] == "0.01" and one["versions.jax"] == '"0.10"' for one in configs)


def wandb_has(folder) -> tuple[list, list, list]:
    """Of the offline files of a stage: run ids, (step, reward) of each logged line, configs."""
    ids, steps, configs = [], [], []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.append(file.stem.removeprefix("run-"))
        for record in wandb_records(file):
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                steps.append((items["_step"], items["reward"]))
            if record.HasField("run"):
                configs.append({one.key: one.value_json for one in record.run.config.update})
    return ids, steps, configs


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
    told = in_a_process("from test_services import trackio_has\nprint(json.dumps(trackio_has()))", tmp_path).stdout
    ids, steps, (config,) = json.loads(told.splitlines()[-1])
    assert ids == [run_id] and list(map(tuple, steps)) == STEPS
    assert config["rl.kl_coef"] == 0.01 and config["versions.jax"] == "0.10"


def trackio_has(run_id: str = "") -> tuple[list, list, list]:
    """Of the runs in TRACKIO_DIR, or of one of them: run ids, (step, reward) of each logged line, configs.

    Call it in a process of its own: the library keeps threads.
    """
    from trackio.sqlite_storage import SQLiteStorage

    runs = [one for one in SQLiteStorage.get_run_records("reft_jax") if run_id in one["name"]]
    of = [{"project": "reft_jax", "run": one["name"], "run_id": one["id"]} for one in runs]
    steps = [(line["step"], line["reward"]) for one in of for line in SQLiteStorage.get_logs(**one)]
    return [one["name"] for one in runs], steps, [SQLiteStorage.get_run_config(**one) for one in of]
