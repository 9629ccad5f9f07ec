"""Metrics on disk across crashes and resumes, and the progress line under a clock that the test moves."""

import json
import os
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from reft_jax.train import progress as progress_module
from reft_jax.train.metrics import read_metrics
from reft_jax.train.progress import Progress
from reft_jax.train.trackers import MetricsWriter
from reft_jax.types import InputError, SaveError


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(file):
    """The events of one TensorBoard file. A record is length uint64, crc uint32, that many bytes, crc uint32."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def scalars(file):
    return [(event.step, value.tag, value.simple_value) for event in events(file) for value in event.summary.value]


def test_each_step_is_a_json_line_of_plain_numbers_and_an_event(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "rows": 3})
        assert lines(tmp_path / "run") == [{"step": 1, "loss": 0.5, "rows": 3.0}]  # on disk before the next step
        writer.write(2, {"loss": 0.25})
    assert lines(tmp_path / "run")[1] == {"step": 2, "loss": 0.25}
    (file,) = (tmp_path / "run/tb").iterdir()
    assert scalars(file) == [(1, "loss", 0.5), (1, "rows", 3.0), (2, "loss", 0.25)]


def test_what_json_cannot_say_becomes_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "norm": float("inf"), "kl": 0.0})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "norm": None, "kl": 0.0}]
    (file,) = (tmp_path / "tb").iterdir()
    assert [np.isfinite(value) for _, _, value in scalars(file)] == [False, False, True]


def test_a_resumed_run_leaves_the_file_an_uninterrupted_one_would(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the crash
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(3)  # the last checkpoint
        for step in range(4, 7):
            writer.write(step, {"loss": 1 / step})
    assert lines(tmp_path) == [{"step": step, "loss": 1 / step} for step in range(1, 7)]
    assert not (tmp_path / "metrics.tmp").exists()

    # The second TensorBoard file stands beside the first (both made within a second) and hides its events from step 4.
    first, second = sorted((tmp_path / "tb").iterdir(), key=os.path.getmtime)
    assert [step for step, _, _ in scalars(first)] == [1, 2, 3, 4, 5]
    assert [event.step for event in events(second) if event.session_log.status == SessionLog.START] == [4]
    assert [step for step, _, _ in scalars(second)] == [4, 5, 6]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}')
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(2)
        writer.write(3, {"loss": 0.5})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_damage_that_no_crash_explains_is_an_error_and_nothing_is_lost(tmp_path):
    text = '{"step": 1}\n{"st\n{"step": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with MetricsWriter(tmp_path) as writer, pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not"):
        writer.truncate_after(3)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_reading_leaves_out_a_torn_last_line_and_what_is_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == []
    for torn in ("", '{"step": 3, "re', "\x00\x00", "5", "null"):
        path.write_text('{"step": 1, "reward": null, "kl": 0.5}\n{"step": 2, "reward": 0.25}\n' + torn)
        assert read_metrics(tmp_path) == [{"step": 1, "kl": 0.5}, {"step": 2, "reward": 0.25}]
    for line in ("5", '{"kl": 1}', '{"step": "2"}', '{"step": 2, "kl": "x"}', '{"step": 2, "kl": [1]}'):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl: line 2 is not a JSON object of numbers with a step"):
            read_metrics(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read"):
        read_metrics(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("full", ["metrics.jsonl", "tb"])
def test_a_full_disk_ends_the_run_with_a_line_and_nothing_waits(tmp_path, full):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    descriptor = os.open("/dev/full", os.O_WRONLY)
    board, lines = writer._ours
    file = lines._file if full == "metrics.jsonl" else board._file._writer
    os.dup2(descriptor, file.fileno())
    os.close(descriptor)
    with pytest.raises(SaveError, match=rf"{full} could not be written \(No space left on device\)"):
        for step in range(2, 1000):
            writer.write(step, {f"n{i}": 1.0 for i in range(100)})
    with pytest.raises(SaveError):
        writer.close()


@pytest.fixture
def clock(monkeypatch):
    """A list whose one entry is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_the_lines_are_those_of_the_docstring(clock, capsys):
    progress = Progress("reft", total=400, unit="iteration", done0=120)
    clock[0] += 126
    progress.update(150, reward=0.5312, kl=0.0113)  # 30 iterations in 126 s, whatever the first 120 took
    progress = Progress("sample", total=131_900, unit="completion")
    clock[0] += 82
    progress.update(25_600, correct=0.634)
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "reft  150/400 iterations  37 %  left 0:17:30  reward 0.531  kl 0.0113  4.2 s/iteration  elapsed 0:02:06",
        "sample  25600/131900 completions  19 %  left 0:05:40  correct 0.634  312 completions/s  elapsed 0:01:22",
    ]
    assert printed[1] in Progress.__doc__


def test_compile_time_is_in_no_rate(clock, capsys, monkeypatch):
    compiled = [50.0]  # by an earlier stage
    monkeypatch.setattr(progress_module, "compile_seconds", lambda: compiled[0])
    progress = Progress("reft", total=10, unit="iteration")
    for iteration, (seconds, of_them) in enumerate([(100, 96), (4, 0), (30, 26), (4, 0)], 1):
        clock[0] += seconds
        compiled[0] += of_them
        progress.update(iteration)
    progress.close()
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "reft  1/10 iterations  10 %  left 0:00:36  4 s/iteration  elapsed 0:01:40"
    assert last == "reft  4/10 iterations  40 %  left 0:00:24  4 s/iteration  elapsed 0:02:18"  # 6 left, 4 s each


def test_what_takes_long_is_said_at_once(clock, capsys):
    progress = Progress("reft", total=40, unit="iteration", done0=12, first="compiling")
    assert capsys.readouterr().err == "reft  12/40 iterations  compiling\n"
    clock[0] += 1
    progress.update(13)
    assert capsys.readouterr().err == ""  # a line was shown a second ago
    progress.close()
    assert capsys.readouterr().err.startswith("reft  13/40 iterations  32 %")


def test_a_log_gets_a_line_every_15_seconds_and_the_last(clock, capsys):
    progress = Progress("sft", total=100)
    for done in range(1, 101):
        clock[0] += 1
        progress.update(done, loss=1.0)
    progress.close()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == [
        *(f"{done}/100" for done in (1, 16, 31, 46, 61, 76, 91)),
        "100/100",
    ]


def test_a_log_gets_no_line_twice(clock, capsys):
    progress = Progress("sft", total=1)
    progress.update(1)
    progress.close()
    assert capsys.readouterr().err == "sft  1/1 steps  100 %  left ?  ?  elapsed 0:00:00\n"
