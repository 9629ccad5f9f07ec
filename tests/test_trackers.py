"""A tracker from a file outside the package: what it is told, also across a resume, and that it cannot end a run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_metrics import lines

from reft_jax.config import check_values, default_config
from reft_jax.train.trackers import DEFAULT, TRACKERS, Guarded, MetricsWriter, Results, deliver, load_trackers
from reft_jax.types import InputError

TESTS = Path(__file__).resolve().parent
SOURCE = '''"""Appends every call to calls.txt of the stage's folder."""

import json
import math
import os
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
        self.say("log", step, os.getpid())
        threading.Event().wait()


class NoClose:
    open = log = file = None


number = 3
'''


pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)

    def made(name: str, rest: str = DEFAULT):
        config = default_config()
        config.tracking = f"{rest},{tmp_path}/mine.py:{name}"
        return config

    return made


def calls(folder) -> list[list]:
    deliver()
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
        deliver()  # as at the end of a process
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
    deliver()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: tracker ") and line.endswith(
        f"{name} is switched off, the run continues without it ({reason})"
    )
    assert len(lines(tmp_path / "reft")) == 3
    assert len(calls(tmp_path / "reft")) == told if told else not (tmp_path / "reft" / "calls.txt").exists()


def test_settings_that_cannot_be(tmp_path, config):
    assert default_config().tracking == DEFAULT
    assert set(load_trackers(DEFAULT)) == set(TRACKERS)  # none outside the work directory
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


def until(true, seconds: float = 60.0):
    """Waits until `true()` is true, and returns it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def said(folder, method: str) -> list[list]:
    """The calls of one method so far."""
    path = folder / "calls.txt"
    return [one for one in map(json.loads, path.read_text().splitlines()) if one[0] == method] if path.exists() else []


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return False
    except ProcessLookupError:
        return True


def test_a_tracker_that_hangs_is_one_warning_and_its_end(tmp_path, config, capsys, monkeypatch):
    with MetricsWriter(tmp_path / "reft", config("Hanging")) as writer:
        until(lambda: said(tmp_path / "reft", "open"))
        monkeypatch.setattr(Guarded, "CALL_SECONDS", 0.3)
        began = time.monotonic()
        for step in range(1, 101):
            writer.write(step, {"loss": 0.5})
        assert time.monotonic() - began < 5
        (_, step, pid), *more = until(lambda: said(tmp_path / "reft", "log"))
        until(lambda: ended(pid), 15)
    assert (step, more) == (1, [])
    deliver()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is switched off, the run continues without it (a call took longer than 0.3 s)")
    assert len(lines(tmp_path / "reft")) == 100


def test_the_end_of_a_process_waits_once_for_trackers_that_hang(tmp_path, config):
    """Two stages of one tracker that hangs, one that works; the second warning of a run is not its third."""
    code = """
for stage in ("sft", "reft"):
    writer = MetricsWriter(folder / stage, config)
    until(lambda: said(folder / stage, "open"))
    writer.write(1, {"loss": 0.5})
    writer.close()
writer = MetricsWriter(folder / "rerank_reft", works)
until(lambda: said(folder / "rerank_reft", "open"))
writer.close()
print(json.dumps([said(folder / stage, "log") for stage in ("sft", "reft")]), time.time())
"""
    config, works = config("Hanging").tracking, config("Calls").tracking
    for name, tracking in (("works", works), ("config", config)):
        code = f"{name} = default_config()\n{name}.tracking = {tracking!r}\n{code}"
    told = in_a_process(f"trackers.LEAST_SECONDS = trackers.MOST_SECONDS = 2.0\n{code}", tmp_path)
    took, (line,) = time.time() - float(told.stdout.split()[-1]), told.stderr.splitlines()
    name = f"{tmp_path}/mine.py:Hanging"
    assert line == (
        f"warning: trackers that were not done 2 s after the end lack the last numbers: {name} of sft, {name} of reft; "
        "metrics.jsonl has them all"
    )
    assert 2 <= took < 15 and said(tmp_path / "rerank_reft", "close")
    pids = [said(tmp_path / stage, "log")[0][2] for stage in ("sft", "reft")]
    until(lambda: all(map(ended, pids)), 10)


def test_the_results_of_a_run_go_to_its_trackers_and_versions_with_the_config(tmp_path, config):
    (tmp_path / "report.md").write_text("a\nb\n")
    for _ in range(2):  # evaluated twice: the same run
        Results(tmp_path, config("Calls"), {"jax": "0.10"}).close({"ReFT/top1": 0.5}, [tmp_path / "report.md"])
        deliver()
    told = calls(tmp_path)
    assert [call[0] for call in told] == ["open", "log", "file", "close"] * 2 and told[0] == told[4]
    assert [told[1], told[5]] == [["log", step, {"ReFT/top1": 0.5}] for step in (1, 2)]
    assert told[2] == ["file", "report.md", 2]
    Results(tmp_path / "nowhere", default_config(), {}).close({}, [])  # the default has no tracker to tell
    assert not (tmp_path / "nowhere").exists()


def in_a_process(code: str, folder, end: int = 0, **environment) -> subprocess.CompletedProcess:
    """Runs code that has everything of this file, and the module under test."""
    begin = "import sys\nsys.modules['torch'] = None  # as main() does\nfrom test_trackers import *\n"
    begin += f"from reft_jax.train import trackers\nfolder = Path({str(folder)!r})"
    paths = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}\n{code}"],
        cwd=TESTS,
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), *paths])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == end, done.stderr
    return done


def running(word: str) -> list[bytes]:
    """Command lines of the processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes())
    return [line for line in lines if word.encode() in line and b"tracker_process" in line]


def test_the_tracker_of_a_killed_run_is_closed(tmp_path, config):
    name = config("Calls").tracking
    in_a_process(KILLED.format(name=name.removeprefix("jsonl,")), tmp_path, end=-signal.SIGKILL)
    until(lambda: not running(str(tmp_path)))
    assert [one[0] for one in calls(tmp_path / "a run" / "reft")] == ["open", "log", "log", "close"]


KILLED = """
config = default_config()
config.tracking = "jsonl,{name}"
writer = MetricsWriter(folder / "a run" / "reft", config, {{"jax": "0.10"}})
writer.write(1, {{"reward": 0.25}})
writer.write(2, {{"reward": 0.5}})
until(lambda: trackers._ALL[0]._queue.empty())
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_made(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"{name} is not installed; run launch/venv.sh {name}, or leave"):
        load_trackers(f"jsonl,{name}")
