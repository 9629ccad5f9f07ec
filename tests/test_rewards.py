"""Rewards of one's own: what they get, where they run, and that none of their mistakes becomes a reward."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from faults.starts import lines, run, saved_steps

from reft_jax.run.executions import read_executions
from reft_jax.tasks.rewards import Paid, RewardError, Rewards, check_reward
from reft_jax.types import Example, InputError, Verdict

ITEM = Example("gsm8k_7", "How many?", "18", "def solution():\n    return 18")
RIGHT = Verdict(18.0, True, 1.0, "ok")
SOURCE = """
import ctypes, os, subprocess, sys, time


def parts(completion, example, verdict):
    print("a print", flush=True)
    tidy = 0.1 * completion.startswith("def")
    return verdict.reward + tidy + len(example.question), {"answer": verdict.reward, "format": tidy}


def seen(completion, example, verdict):
    found = example.item_id == "gsm8k_7" and verdict.correct and example.answer_cot is not None
    return found + 2 * ("jax" in sys.modules)


def prints(completion, example, verdict):
    print('{"reward": 9.0, "parts": {}}', flush=True)
    os.write(1, b'{"reward": 9.0, "parts": {}}\\n')
    subprocess.run(["echo", '{"reward": 9.0, "parts": {}}'], check=True)
    sys.stderr.write("a warning\\n")
    return sys.stdin.read() == ""


def raises(completion, example, verdict):
    return 1 / len(completion)


def hangs(completion, example, verdict):
    if completion:
        return 1.0
    time.sleep(1000)


def ignores(completion, example, verdict):
    import signal

    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(1000)


def gives(completion, example, verdict):
    return eval(completion)


def ends(completion, example, verdict):
    eval(completion)
    return 1.0


def waits(completion, example, verdict):
    if completion:
        with open(completion, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(1000)
    return os.getpid()


def slow(completion, example, verdict):
    time.sleep(0.4)
    return os.getpid()


two = lambda completion, example: 1.0
number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(SOURCE)
    return path


def opened(file, name, workers=1, timeout_s=30.0) -> Rewards:
    return Rewards(f"{file}:{name}", workers, timeout_s, file.parent / "logs" / f"{name}.log")


def paid(file, name, text="", verdict=RIGHT, timeout_s=30.0) -> Paid:
    with opened(file, name, timeout_s=timeout_s) as rewards:
        return rewards.submit(text, ITEM, verdict).result(60)


def test_it_gets_completion_example_and_verdict_and_its_parts_are_named(file):
    found = paid(file, "parts", "def solution():", Verdict(None, False, 0.0, "timeout"))
    assert found == Paid(pytest.approx(9.1), {"answer": 0.0, "format": pytest.approx(0.1)})
    assert paid(file, "seen") == Paid(1.0, {})  # and it runs without JAX


def test_what_it_prints_goes_to_the_log_and_is_no_reply(file, capfd):
    assert paid(file, "prints") == Paid(1.0, {})
    assert capfd.readouterr() == ("", "")
    assert (file.parent / "logs" / "prints.log").read_text().count('"reward": 9.0') == 3


def test_an_exception_is_an_error_with_the_item_and_the_traceback(file):
    with pytest.raises(RewardError) as error:
        paid(file, "raises")
    said = str(error.value)
    assert said == f"reward='{file}:raises': item 'gsm8k_7': ZeroDivisionError: division by zero; correct the file"
    assert "return 1 / len(completion)" in error.value.traceback and "reward_worker" not in error.value.traceback


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("float('nan')", "ValueError: the reward is nan; it must be finite"),
        ("-float('inf')", "ValueError: the reward is -inf; it must be finite"),
        ("1e39", "ValueError: the reward is 1e.39; it must be finite, in float32 too"),
        ("__import__('numpy').float32('nan')", "ValueError: the reward is .*nan.*; it must be finite"),
        ("None", "TypeError: the reward is None; it must be a number"),
        ("'1.0'", "TypeError: the reward is '1.0'; it must be a number"),
        ("(1.0, {'format': float('nan')})", "ValueError: the part 'format' is nan"),
        ("(1.0, {3: 1.0})", "TypeError: a reward is a number, or .number, {name: number}.; this is .1.0, {3: 1.0}."),
        ("(1.0, 2.0)", "TypeError: a reward is a number, or"),
        ("[1.0]", "TypeError: the reward is \\[1.0\\]; it must be a number"),
    ],
)
def test_what_is_no_finite_number_is_an_error(file, value, told):
    with pytest.raises(RewardError, match=f"item 'gsm8k_7': {told}"):
        paid(file, "gives", value)


def test_any_finite_number_is_a_reward(file):
    with opened(file, "gives") as rewards:
        found = [
            rewards.submit(text, ITEM, RIGHT).result(60)
            for text in ("True", "-3", "__import__('numpy').float32(0.1)", "1/3")
        ]
    assert [one.reward for one in found] == [1.0, -3.0, float(np.float32(0.1)), 1 / 3]


@pytest.mark.parametrize("name", ["hangs", "ignores"])
def test_the_time_limit_is_kept(file, name):
    begun = time.monotonic()
    with pytest.raises(RewardError, match="item 'gsm8k_7': its process did not answer within 0.5 s; raise") as error:
        paid(file, name, timeout_s=0.5)
    assert time.monotonic() - begun < 0.5 + 3 * 3  # to start, and to end
    assert ("in hangs" in error.value.traceback) == (name == "hangs")  # where it hangs, if it lets us know


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("os._exit(3)", r"ended \(exit code 3\)"),
        ("ctypes.string_at(0)", r"ended \(exit code -11\)"),
        ("sys.exit()", "SystemExit"),
    ],
)
def test_a_process_that_ends_is_an_error(file, text, told):
    with pytest.raises(RewardError, match=f"item 'gsm8k_7': .*{told}"):
        paid(file, "ends", text)


def test_slow_ones_run_side_by_side(file):
    with opened(file, "slow", workers=4) as rewards:
        [one.result(60) for one in [rewards.submit("", ITEM, RIGHT) for _ in range(4)]]  # all have started
        begun = time.monotonic()
        pids = {one.result(60).reward for one in [rewards.submit("", ITEM, RIGHT) for _ in range(8)]}
        assert len(pids) == 4 and time.monotonic() - begun < 3 * 0.8 < 8 * 0.4


def alive(pid: float) -> bool:
    try:
        os.kill(int(pid), 0)
        return True
    except ProcessLookupError:
        return False


def test_workers_end_with_the_context_also_those_at_work(file):
    with opened(file, "slow") as rewards:
        pid = rewards.submit("", ITEM, RIGHT).result(60).reward
        assert alive(pid)
        waiting = [rewards.submit("", ITEM, RIGHT) for _ in range(50)]
        begun = time.monotonic()
    assert not alive(pid) and time.monotonic() - begun < 5 and waiting[-1].cancelled()
    with opened(file, "slow") as rewards:  # and start again
        assert rewards.submit("", ITEM, RIGHT).result(60).reward != pid


def test_workers_end_with_a_parent_that_is_killed(file, tmp_path):
    """One is idle, the other at work."""
    script = f"""
import time
from pathlib import Path

from test_rewards import ITEM, RIGHT, opened
with opened(Path({str(file)!r}), "waits", 2) as rewards:
    rewards.submit({str(tmp_path / "busy")!r}, ITEM, RIGHT)
    print(int(rewards.submit("", ITEM, RIGHT).result().reward), flush=True)
    time.sleep(1000)
"""
    folder = os.path.dirname(__file__)
    this_package = os.environ | {"PYTHONPATH": os.path.dirname(folder)}  # tests/mutations.py tests a copy
    command = [sys.executable, "-c", script]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=this_package)
    with parent:
        pids = [int(parent.stdout.readline()), until(lambda: int((tmp_path / "busy").read_text()))]
        assert all(map(alive, pids))
        parent.send_signal(signal.SIGKILL)
    assert until(lambda: not any(map(alive, pids)) or None)


def until(found, seconds: float = 20.0):
    """What `found()` gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if (value := found()) is not None:
                return value
        time.sleep(0.05)
    return None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine.py:absent", "does not define absent"),
        ("mine.py:number", "must be a function of .completion, example, verdict. .* not a callable"),
        ("mine.py:two", "must be a function of .completion, example, verdict. .*too many positional arguments"),
        ("broken.py:x", "reward: .*broken.py, line 2: ZeroDivisionError: division by zero; correct the file"),
        ("ends.py:x", "its process ended .exit code 4. while it loaded; correct the file"),
        ("none.py:x", "there is no file"),
    ],
)
def test_a_wrong_file_is_found_at_the_start(file, name, told):
    (file.parent / "broken.py").write_text("\n1 / 0")
    (file.parent / "ends.py").write_text("import os\nos._exit(4)")
    with pytest.raises(InputError, match=told) as error:
        check_reward(f"{file.parent}/{name}")
    assert "\n" not in str(error.value)


def test_no_reward_needs_no_process():
    check_reward("")


RUN = """
import itertools, time

calls = itertools.count()


def reward(completion, example, verdict):
    print(example.item_id)
    if next(calls) >= {after}:
        {line}
    return 0.5 + 2 * verdict.reward, {{"format": 0.25}}
"""
FAILURES = {  # line: in the last line of stderr, and above it
    "assert completion is None": ("AssertionError; correct", "assert completion is None"),
    "return float('nan')": ("ValueError: the reward is nan; it must be finite, in float32 too; correct", "Traceback"),
    "time.sleep(1000)": ("did not answer within 5 s; raise reward_timeout_s, or correct", ", line 10 in reward"),
}


def test_a_run_pays_it_ends_with_its_error_and_resumes_with_the_corrected_file(tmp_path):
    """On the toy: it raises in the second iteration, then it gives NaN, then it hangs; then the file is corrected."""
    file, workdir, cache = tmp_path / "mine.py", tmp_path / "run", tmp_path / "compiled"
    chosen = [f"--config.reward={file}:reward", "--config.reward_workers=1", "--config.rl.iterations=2"]
    chosen += ["--config.reward_timeout_s=5", "--config.rl.eval_every=2", "--config.rl.save_every=1"]
    file.write_text(RUN.format(after=0, line="pass"))
    assert run("sft", workdir, cache, *chosen).returncode == 0
    first = None
    for (line, (end, above)), after in zip(FAILURES.items(), (16, 3, 3), strict=True):
        file.write_text(RUN.format(after=after, line=line))
        failed = run("reft", workdir, cache, *chosen)
        *told, last = failed.stderr.strip().splitlines()
        assert failed.returncode == 2 and above in "\n".join(told), failed.stderr
        assert last.startswith(f"error: reward='{file}:reward': item 'toy_") and last.endswith(f"{end} the file")
        assert saved_steps(workdir, "reft") == [1] and not (workdir / "models" / "reft").exists()
        first = first or lines(workdir, "reft")
        assert len(first) == 1 and lines(workdir, "reft") == first
    file.write_text(RUN.format(after=0, line="pass"))
    done = run("reft", workdir, cache, *chosen)
    assert done.returncode == 0, done.stderr
    both = lines(workdir, "reft")
    assert both[0] == first[0]
    assert [line["step"] for line in both] == [1, 2] and all(line["reward/format"] == 0.25 for line in both)
    executions = list(read_executions(workdir / "executions.jsonl.gz"))
    paid_for = [one for one in executions if "parts" in one]
    assert len(paid_for) == 2 * 16 and {one["purpose"] for one in paid_for} == {"reft rollout"}
    assert np.mean([line["reward"] for line in both]) == pytest.approx(np.mean([one["reward"] for one in paid_for]))
    assert {one["reward"] for one in paid_for} <= {0.5, 0.7, 2.5}
    assert "toy_" in (workdir / "logs" / "rewards_0.log").read_text() and "toy_" not in done.stdout
