"""A run that is asked to stop does so soon, saves its work, leaves no process, and grades no interrupted program."""

import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import starts
from executor_tools import processes, wait_until

from reft_jax.run.executions import read_executions

SOON_S = 3 * 20.0  # a test of "in about 20 s" allows three times that
MEMORY_MB = 1013  # of the programs of this file's runs: tells their processes from others
ARGUMENTS = [f"--config.executor.memory_mb={MEMORY_MB}", "--allow_config_change=executor.memory_mb"]


def start(workdir: Path, cache: Path, at: tuple) -> subprocess.CompletedProcess:
    done = starts.run("reft", workdir, cache, *ARGUMENTS, at=at)
    done.ended = time.monotonic()
    return done


def orphans() -> dict[int, str]:
    return {pid: state for pid, state in processes(MEMORY_MB).items() if state != "Z"}


def test_sigterm_in_every_part_of_an_iteration(reference, cache, tmp_path):
    """One run, stopped again and again; saved every 3 iterations, so a stop in between must save by itself."""
    starts.before_ppo(reference, tmp_path)
    stops = [
        # Where, which steps can be used afterwards, and lines of the metrics: what was begun is lost and nothing else.
        (("chunk", 20, "SIGTERM"), [1], 1),  # in iteration 2
        (("program", 16, "SIGTERM"), [1], 1),  # its last one
        (("update", 3, "SIGTERM"), [1, 3], 2),  # of iteration 3: that is finished, its line is saved with it
        (("saving", 1, "SIGTERM"), [3, 6], 6),
    ]
    for at, steps, lines in stops:
        done = start(tmp_path, cache, at)
        assert done.returncode == 75, (at, done.stderr)
        assert "stopped by SIGTERM" in done.stderr.splitlines()[-1]
        hit = float(re.search(r"hit at ([\d.]+)", done.stderr).group(1))
        assert done.ended - hit < SOON_S
        assert wait_until(lambda: not orphans()), orphans()
        assert starts.saved_steps(tmp_path, "reft") == steps, at
        assert len(starts.lines(tmp_path, "reft")) == lines, at
    done = start(tmp_path, cache, ("none", 0, "SIGTERM"))
    assert done.returncode == 0, done.stderr
    assert starts.lines(tmp_path, "reft") == starts.lines(reference, "reft")
    assert starts.result(tmp_path, "reft") == starts.result(reference, "reft")
    logged = list(read_executions(tmp_path / "executions.jsonl.gz"))
    seen = Counter(line["outcome"] for line in logged)
    once = Counter(line["outcome"] for line in read_executions(reference / "executions.jsonl.gz"))
    assert seen.keys() <= once.keys(), "a program that the stop broke off was given a verdict"


def test_sigint_once_stops_and_twice_ends_it_now(reference, cache, tmp_path):
    starts.before_ppo(reference, tmp_path)
    done = start(tmp_path, cache, ("chunk", 5, "SIGINT"))
    assert done.returncode == 75, done.stderr
    assert "stopped by SIGINT" in done.stderr
    done = start(tmp_path, cache, ("update", "1,2", "SIGINT"))  # the second one before the next safe point
    assert done.returncode == 128 + signal.SIGINT
    assert wait_until(lambda: not orphans()), orphans()


def test_a_sweep_keeps_the_questions_that_are_finished(reference, cache, tmp_path):
    starts.before_ppo(reference, tmp_path)
    done = starts.run("sample", tmp_path, cache, "--model=sft", at=("record", 3, "SIGTERM"))
    assert done.returncode == 75, done.stderr
    kept = len(starts.samples(tmp_path, "sft_test"))
    assert 2 <= kept < 7
    done = starts.run("sample", tmp_path, cache, "--model=sft")
    assert done.returncode == 0, done.stderr
    assert starts.samples(tmp_path, "sft_test") == starts.samples(reference, "sft_test")
