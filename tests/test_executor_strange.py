"""Large and unusual calls: unexpected sizes, timeouts, numbers and callbacks."""

import math
import threading
import time

import pytest
from executor_tools import body, run_one

from reft_jax import executor
from reft_jax.executor import run_programs, start


def test_programs_that_are_too_long_are_not_run_and_hurt_nobody():
    long = [f"x = {number}\n" + "#" * (size << 20) for number, size in enumerate((1, 20, 50))]
    others = [body(f"return {i}") for i in range(20)]
    before, begin = executor.counts(), time.monotonic()
    results = run_programs([*others[:10], *long, *others[10:]], workers=2)
    assert time.monotonic() - begin < 10
    assert [result.value for result in results] == [*range(10), None, None, None, *range(10, 20)]
    assert [result.status for result in results[10:13]] == ["too_long"] * 3
    assert results[11].detail == f"{len(long[1])} bytes"
    assert executor.counts()["too_long"] - before.get("too_long", 0) == 3


def test_the_limit_is_of_bytes_and_can_be_set():
    head = body("return 5")
    fits = head + "#" + "é" * ((64 << 10) - len(head) - 1 >> 1)
    fits += "-" * ((64 << 10) - len(fits.encode()))
    assert len(fits.encode()) == 64 << 10
    results = run_programs([fits, fits + "-", fits + "\ud800"])
    assert [result.status for result in results] == ["ok", "too_long", "too_long"]
    assert run_one(fits + "-" * 10, program_kb=65).value == 5


def test_programs_of_megabytes_run_if_they_may():
    """Both the first and, sent while it runs, the one after it."""
    programs = [body(f"return {i}") + "#" * (12 << 20) for i in range(3)]
    begin = time.monotonic()
    results = run_programs(programs, workers=1, timeout_s=60, program_kb=20 << 10)
    assert [result.value for result in results] == [0, 1, 2]
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("timeout_s", [1e10, math.inf, 10**400, 2**31], ids=["1e10", "infinity", "10**400", "2**31"])
def test_timeouts_without_end(timeout_s):
    assert run_one(body("return 4"), timeout_s=timeout_s).value == 4


@pytest.mark.parametrize("bad", [0, -1, math.nan, -math.inf])
def test_timeouts_that_are_none(bad):
    with pytest.raises(ValueError, match="timeout_s is .*; it must be above 0"):
        run_programs([body("return 1")], timeout_s=bad)


@pytest.mark.parametrize("bad", [0, -2, 1.5, math.nan, math.inf, True])
@pytest.mark.parametrize("name", ["workers", "memory_mb", "program_kb"])
def test_numbers_that_are_no_counts(name, bad):
    with pytest.raises(ValueError, match=f"{name} is .*; it must be a whole number above 0"):
        run_programs([body("return 1")], **{name: bad})
    if name != "program_kb":
        with pytest.raises(ValueError, match=f"{name} is"):
            start(**({"workers": 1, "memory_mb": 256} | {name: bad}))


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_is_printed_and_hurts_nobody(error, monkeypatch, caplog):
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda args: printed.append(args.exc_type))

    def refuse(_):
        raise error("from a callback")

    with executor.stream(workers=1, memory_mb=256) as batch:
        futures = [batch.submit(body("import time", "time.sleep(0.02)", f"return {i}")) for i in range(6)]
        futures[1].add_done_callback(refuse)
        futures[4].add_done_callback(refuse)
    assert [future.result(timeout=0).value for future in futures] == list(range(6))
    said = [record for record in caplog.records if "exception calling callback" in record.message]
    assert len(printed) + len(said) == 2


def test_a_callback_may_call_the_executor():
    inner = []
    with executor.stream(workers=1, memory_mb=256) as batch:
        future = batch.submit(body("return 3"))
        future.add_done_callback(lambda _: inner.append(run_one(body("return 4")).value))
    assert future.result().value == 3 and inner == [4]
