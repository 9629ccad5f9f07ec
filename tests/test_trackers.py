"""A tracker from a file outside the package: what it is told, also across a resume, and that it cannot end a run."""

import json
import re

import pytest
from test_metrics import lines

from reft_jax.config import check_values, default_config
from reft_jax.train.trackers import DEFAULT, TRACKERS, MetricsWriter, load_trackers
from reft_jax.types import InputError

SOURCE = '''"""Appends every call to calls.txt of the stage's folder."""

import json
import math


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
    assert default_config().tracking == DEFAULT and set(load_trackers(DEFAULT)) == set(TRACKERS)
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
