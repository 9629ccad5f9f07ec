"""A tracker from a file outside the package: what it is told, also across a resume, and that it cannot end a run."""

import json
import os
import re
import struct
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_metrics import lines

from reft_jax.config import check_values, default_config
from reft_jax.train.trackers import DEFAULT, TRACKERS, Guarded, MetricsWriter, load_trackers, share
from reft_jax.types import InputError

SOURCE = '''"""Appends every call to calls.txt of the stage's folder."""

import json
import math
import threading


class Calls:
    def __init__(self, folder):
        self.path = folder / "calls.txt"

    def say(self, *what):
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def open(self, run_id, config):
        self.say("open", run_id, config["rl.kl_coef"])

    def log(self, step, numbers):
        self.say("log", step, {name: x for name, x in numbers.items() if math.isfinite(x)})

    def file(self, path):
        self.say("file", path.name, len(path.read_text().splitlines()))

    def close(self):
        self.say("close")


class Rewinding(Calls):
    def rewind(self, step):
        self.say("rewind", step)


class Failing(Calls):
    def log(self, step, numbers):
        raise ConnectionError("no network\\nat all")


def broken(folder):
    raise KeyError("key")


class Hanging(Calls):
    def log(self, step, numbers):
        self.say("log", step)
        threading.Event().wait()


class NoClose:
    open = log = file = None


number = 3
'''


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)

    def made(name: str, rest: str = DEFAULT):
        config = default_config()
        config.tracking = f"{rest},{tmp_path}/mine.py:{name}"
        return config

    return made


def calls(folder) -> list[list]:
    return [json.loads(line) for line in (folder / "calls.txt").read_text().splitlines()]


def test_a_tracker_is_told_numbers_steps_files_and_the_end(tmp_path, config):
    folder = tmp_path / "run" / "reft"
    with MetricsWriter(folder, config("Calls", "jsonl")) as writer:
        writer.write(1, {"loss": 0.5, "kl": float("nan")})
        writer.write(2, {"loss": 0.25})
        writer.file(tmp_path / "mine.py")
    writer.close()  # a stage that is done closes it twice
    (_, run_id, kl_coef), *rest = calls(folder)
    assert re.fullmatch("run-reft-[0-9a-f]{8}", run_id) and kl_coef == 0.01
    assert rest == [
        ["log", 1, {"loss": 0.5}],
        ["log", 2, {"loss": 0.25}],
        ["file", "mine.py", len(SOURCE.splitlines())],
        ["file", "metrics.jsonl", 2],
        ["close"],
    ]
    assert len(lines(folder)) == 2 and not (folder / "tb").exists()  # tensorboard was left out


def resumed(folder, config) -> list[list]:
    """Three starts of one stage: to step 5, from 3 to 4, and from 3 to 6."""
    with MetricsWriter(folder, config) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    for last in (4, 6):
        with MetricsWriter(folder, config) as writer:
            writer.truncate_after(3)
            for step in range(4, last + 1):
                writer.write(step, {"loss": step})
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6]
    told = calls(folder)
    assert len({call[1] for call in told if call[0] == "open"}) == 1  # the same run
    assert [call[0] for call in told].count("open") == [call[0] for call in told].count("close") == 3
    return told


def test_a_resumed_run_has_the_same_id_and_logs_no_step_twice(tmp_path, config):
    told = resumed(tmp_path / "reft", config("Calls"))
    assert [call[1] for call in told if call[0] == "log"] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_can_rewind_is_told_to_and_gets_the_steps_again(tmp_path, config):
    told = [call[:2] for call in resumed(tmp_path / "reft", config("Rewinding")) if call[0] in ("log", "rewind")]
    steps = [["log", step] for step in range(1, 7)]
    assert told == [*steps[:5], ["rewind", 3], steps[3], ["rewind", 3], *steps[3:]]


def test_another_stage_is_another_run(tmp_path, config):
    for stage in ("sft", "reft"):
        MetricsWriter(tmp_path / stage, config("Calls")).close()
    assert calls(tmp_path / "sft")[0][1] != calls(tmp_path / "reft")[0][1]


@pytest.mark.parametrize(
    ("name", "reason", "told"), [("Failing", "ConnectionError: no network at all", 1), ("broken", "KeyError: 'key'", 0)]
)
def test_a_tracker_that_fails_is_one_warning_and_the_run_continues(tmp_path, config, capsys, name, reason, told):
    with MetricsWriter(tmp_path / "reft", config(name)) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracker ") and line.endswith(
        f"{name} is switched off, the run continues without it ({reason})"
    )
    assert len(lines(tmp_path / "reft")) == 3
    assert len(calls(tmp_path / "reft")) == told if told else not (tmp_path / "reft" / "calls.txt").exists()


def test_settings_that_cannot_be(tmp_path, config):
    assert default_config().tracking == DEFAULT and set(load_trackers(DEFAULT)) == set(
        TRACKERS
    )  # none outside the work directory
    for tracking, message in (
        ("jsonl,tensorbord", "'tensorbord' is not known; did you mean 'tensorboard'"),
        ("tensorboard", "jsonl is missing, and a run resumes from it; write jsonl,tensorboard"),
        (config("number").tracking, "number is not a class"),
        (config("NoClose").tracking, "NoClose has no method close; see Tracker in"),
        (config("Nothing").tracking, "does not define Nothing"),
    ):
        with pytest.raises(InputError) as error:
            load_trackers(tracking)
        assert message in str(error.value)
    without = default_config()
    without.tracking = "tensorboard"
    with pytest.raises(InputError, match="tracking='tensorboard' is not allowed; .* jsonl among them"):
        check_values(without, "config")


def test_a_run_id_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tracking.json").write_text('{"run_id": ')
    with pytest.raises(InputError, match=r"tracking\.json: cannot be read"):
        MetricsWriter(tmp_path)


def test_a_tracker_that_hangs_is_one_warning_and_no_write_waits(tmp_path, config, capsys, monkeypatch):
    monkeypatch.setattr(Guarded, "CALL_SECONDS", 0.3)
    began = time.monotonic()
    with MetricsWriter(tmp_path / "reft", config("Hanging")) as writer:
        for step in range(1, 101):
            writer.write(step, {"loss": 0.5})
        assert time.monotonic() - began < 5
        while not calls_of(tmp_path / "reft", "log"):
            time.sleep(0.01)
        time.sleep(0.5)
        writer.write(101, {"loss": 0.5})
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("(a call took longer than 0.3 s)")
    assert capsys.readouterr().err == ""
    assert len(lines(tmp_path / "reft")) == 101 and calls_of(tmp_path / "reft", "log") == [["log", 1]]


def calls_of(folder, method: str) -> list[list]:
    return [call for call in calls(folder) if call[0] == method] if (folder / "calls.txt").exists() else []


def test_the_results_of_a_run_go_to_its_trackers_and_versions_with_the_config(tmp_path, config):
    (tmp_path / "report.md").write_text("a\nb\n")
    for _ in range(2):  # evaluated twice: the same run
        share(tmp_path, config("Calls"), {"jax": "0.10"}, [tmp_path / "report.md"])
    told = calls(tmp_path)
    assert [call[0] for call in told] == ["open", "file", "close"] * 2 and told[0] == told[3]
    assert told[1] == ["file", "report.md", 2]
    share(tmp_path / "nowhere", default_config(), {}, [])  # the default has no tracker to tell: nothing is written
    assert not (tmp_path / "nowhere").exists()


def three_iterations_in_two_starts(folder, config) -> str:
    """Steps 1, 2 and a stop; then 2 (computed again), 3 and the end. Returns the run id."""
    for steps in ((1, 2), (2, 3)):
        with MetricsWriter(folder, config, {"jax": "0.10"}) as writer:
            writer.truncate_after(steps[0] - 1)
            for step in steps:
                writer.write(step, {"reward": step / 4})
    return json.loads((folder / "tracking.json").read_text())["run_id"]


def in_a_process(code: str, folder, code_of_end: int = 0, **environment) -> str:
    """Standard output of the code: both libraries keep a service or threads that a test process should not have."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from test_trackers import *\nGuarded.CLOSE_SECONDS = 60.0\nfolder = Path({str(folder)!r})\n{code}",
        ],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == code_of_end and "switched off" not in told.stderr, told.stderr
    return told.stdout


START = """
config = default_config()
config.tracking = "jsonl,NAME"
print(three_iterations_in_two_starts(folder / "run" / "reft", config))
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs reft_jax[wandb]")
def test_wandb_offline_has_one_id_for_all_starts_and_each_step_once(tmp_path):
    in_a_process(START.replace("NAME", "wandb"), tmp_path, WANDB_MODE="offline")
    folder = tmp_path / "run" / "reft"
    run_id = json.loads((folder / "tracking.json").read_text())["run_id"]
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{run_id}.wandb"}
    found, configs = [], []
    for file in files:
        for record in wandb_records(file):
            if record.HasField("history"):
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.append((items["_step"], items["reward"]))
            if record.HasField("run"):
                configs += [{one.key: one.value_json for one in record.run.config.update}]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert all(one["rl.kl_coef"] == "0.01" and one["versions.jax"] == '"0.10"' for one in configs) and configs


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
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs reft_jax[trackio]")
def test_trackio_has_one_run_for_all_starts_and_each_step_once(tmp_path):
    read = """
from trackio.sqlite_storage import SQLiteStorage
(one,) = SQLiteStorage.get_run_records("reft_jax")
print("READ", json.dumps([one["name"], SQLiteStorage.get_logs("reft_jax", one["name"], run_id=one["id"]),
      SQLiteStorage.get_run_config("reft_jax", one["name"], run_id=one["id"])]))
"""
    told = in_a_process(START.replace("NAME", "trackio") + read, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    name, logs, config = json.loads(told.split("READ ")[1])
    assert name == json.loads((tmp_path / "run" / "reft" / "tracking.json").read_text())["run_id"]
    assert [(line["step"], line["reward"]) for line in logs] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert config["rl.kl_coef"] == 0.01 and config["versions.jax"] == "0.10"


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs reft_jax[trackio]")
def test_a_killed_and_resumed_run_continues_its_trackio_run(tmp_path):
    begin = """
from trackio.sqlite_storage import SQLiteStorage
config = default_config()
config.tracking = "jsonl,trackio"
def logs():
    return [(one["id"], [line["step"] for line in SQLiteStorage.get_logs("reft_jax", one["name"], run_id=one["id"])])
            for one in SQLiteStorage.get_run_records("reft_jax")]
writer = MetricsWriter(folder / "reft", config)
"""
    killed = """
writer.write(1, {"reward": 0.25})
writer.write(2, {"reward": 0.5})
while not any(steps == [1, 2] for _, steps in logs()):
    time.sleep(0.1)
os.kill(os.getpid(), 9)
"""
    resumed = """
print("READ", json.dumps(logs()))
writer.truncate_after(1)
writer.write(2, {"reward": 0.5})
writer.write(3, {"reward": 0.75})
writer.close()
print("READ", json.dumps(logs()))
"""
    where = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    in_a_process(begin + killed, tmp_path, code_of_end=-9, **where)
    _, before, after = in_a_process(begin + resumed, tmp_path, **where).split("READ ")
    ((run_id, steps),) = json.loads(before.splitlines()[0])
    assert steps == [1, 2] and json.loads(after.splitlines()[0]) == [[run_id, [1, 2, 3]]]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"{name} is not installed; install reft_jax\[{name}\], or leave"):
        load_trackers(f"jsonl,{name}")
