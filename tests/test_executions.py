"""The audit log: its content, that a crash costs at most its last batch, and that its verdicts can be checked."""

import gzip
import json
import os

import pytest

from reft_jax.run.executions import LOG_NAME, ExecutionLog, execution, read_executions, replay
from reft_jax.store import short_hash
from reft_jax.types import Example, InputError, Verdict

EXAMPLE = Example("gsm8k_3", "How many?", "1,080")
LINES = [
    execution("reft rollout", EXAMPLE, "right", Verdict(1080.004, True, 1.0, "ok"), 1.234),
    execution("reft rollout", EXAMPLE, "wrong", Verdict(7.0, False, 0.1, "ok"), 2.0),
    execution("reft dev", EXAMPLE, "none", Verdict(None, False, 0.0, "timeout"), 2000.0),
    execution("reft dev", Example("mathqa_1", "Which?", "c"), "letter", Verdict("c", True, 1.0, "ok"), 3.0),
]


def test_a_line_holds_hash_outcome_milliseconds_and_verdict():
    assert LINES[0] == {
        "purpose": "reft rollout",
        "item_id": "gsm8k_3",
        "answer_value": "1,080",
        "program": short_hash("right"),
        "outcome": "ok",
        "ms": 1.23,
        "value": 1080.004,
        "correct": True,
        "reward": 1.0,
    }
    assert len(short_hash("right")) == 16 and short_hash("right") != short_hash("wrong")


def test_what_is_appended_is_read(tmp_path):
    log = ExecutionLog(tmp_path)
    log.append(LINES[:2])
    log.append(LINES[2:])
    assert list(read_executions(tmp_path / LOG_NAME)) == LINES
    with gzip.open(tmp_path / LOG_NAME, "rt") as plain:  # zcat reads it too
        assert [json.loads(line) for line in plain] == LINES


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_batch_is_cut_off_and_the_log_goes_on(tmp_path, cut):
    log, path = ExecutionLog(tmp_path), tmp_path / LOG_NAME
    log.append(LINES[:2])
    log.append(LINES[2:])
    os.truncate(path, path.stat().st_size - cut)
    assert list(read_executions(path)) == LINES[:2]
    ExecutionLog(tmp_path).append(LINES[3:])
    assert list(read_executions(path)) == [*LINES[:2], LINES[3]]


def test_replay_tells_what_was_executed_and_finds_a_wrong_verdict(tmp_path, capsys):
    ExecutionLog(tmp_path).append(LINES)
    assert replay(tmp_path)
    said = capsys.readouterr().out
    assert "reft rollout: 2, 50.0% correct, p50 1.6 ms, p99 2.0 ms; ok 2" in said
    assert "reft dev: 2, 50.0% correct" in said and "timeout 1" in said
    assert "4 of 4 verdicts are what the log says" in said
    ExecutionLog(tmp_path).append([LINES[1] | {"reward": 1.0, "correct": True}])
    assert not replay(tmp_path)
    assert "gsm8k_3 (reft rollout): logged reward 1.0, graded 0.1" in capsys.readouterr().out


def test_no_log_and_a_broken_line_are_named(tmp_path):
    with pytest.raises(InputError, match="executions.jsonl.gz: no such file"):
        replay(tmp_path)
    (tmp_path / LOG_NAME).write_bytes(gzip.compress(b'{"purpose": '))
    with pytest.raises(InputError, match="line 1 is not an execution"):
        replay(tmp_path)
    for nothing in (b"", gzip.compress(b"{}")[:-1]):  # emptied, and the first batch torn
        (tmp_path / LOG_NAME).write_bytes(nothing)
        with pytest.raises(InputError, match="executions.jsonl.gz: holds no execution"):
            replay(tmp_path)


@pytest.mark.parametrize("damage", ["instead", "behind", "within"])
def test_what_no_crash_explains_is_an_error_and_nothing_is_cut_off(tmp_path, damage):
    path = tmp_path / LOG_NAME
    for line in LINES:
        ExecutionLog(tmp_path).append([line])
    whole = path.read_bytes()
    at = len(whole) // 2
    damaged = {"instead": b"hello\n", "behind": whole + b"hello\n", "within": whole[:at] + b"\0\0" + whole[at + 2 :]}
    path.write_bytes(damaged[damage])
    with pytest.raises(InputError, match="executions.jsonl.gz: damaged after byte"):
        replay(tmp_path)
    with pytest.raises(InputError, match="damaged after byte .* or move it away"):
        ExecutionLog(tmp_path)
    assert path.read_bytes() == damaged[damage]


@pytest.mark.parametrize("line", [b"{}\n", b"5\n", b'{"purpose": "x"}\n'])
def test_a_line_that_is_no_execution(tmp_path, line):
    (tmp_path / LOG_NAME).write_bytes(gzip.compress(line))
    with pytest.raises(InputError, match="line 1 is not an execution"):
        replay(tmp_path)


def test_who_only_reads_cuts_nothing_off(tmp_path):
    ExecutionLog(tmp_path).append(LINES)
    path = tmp_path / LOG_NAME
    torn = path.read_bytes() + path.read_bytes()[:-9]  # another process is writing
    path.write_bytes(torn)
    ExecutionLog(tmp_path)
    assert path.read_bytes() == torn and len(list(read_executions(path))) == len(LINES)
