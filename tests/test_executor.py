"""The executor: exact answers from good programs, a status for all others, and no failure of ours as a score."""

import math
import threading
import time

import pytest
from executor_tools import (
    body,
    linux,
    patched_zygote,
    run_one,
    wait_until,
)

from reft_jax import executor
from reft_jax.executor import calls, process, run_programs

# name: program, value, status, detail
PROGRAMS = {
    "module constant and helper": ("rate = 3\ndef f(x):\n    return x * rate\n" + body("return f(14)"), 42.0, "ok", ""),
    "math without import": (body("return math.sqrt(2)"), math.sqrt(2), "ok", ""),
    "sympy without import": (body("return sympy.solve(sympy.Symbol('x') - 7)[0]"), 7.0, "ok", ""),
    "sympy constant": (body("return sympy.pi"), math.pi, "ok", ""),
    "sympy symbol": (body("return sympy.Symbol('x') + 1"), None, "wrong_type", "Add"),
    "fraction": (body("from fractions import Fraction", "return Fraction(1, 3)"), 1 / 3, "ok", ""),
    "decimal": (body("from decimal import Decimal", "return Decimal('0.1')"), 0.1, "ok", ""),
    "numpy": (body("import numpy as np", "return 1"), None, "exception", "ModuleNotFoundError"),
    "mpmath without sympy": (body("import mpmath", "return mpmath.sqrt(16)"), 4.0, "ok", ""),
    "sympy, a part not loaded yet": (
        body("from sympy.physics.units import meter", "return sympy.Integer(5)"),
        5.0,
        "ok",
        "",
    ),
    "bool": (body("return 3 > 2"), 1.0, "ok", ""),
    "digits": (body("return ' 4_2 '"), 42.0, "ok", ""),
    "words": (body("return '42 apples'"), None, "wrong_type", "str"),
    "none": (body("x = 5"), None, "wrong_type", "NoneType"),
    "complex": (body("return (-8) ** (1 / 3)"), None, "wrong_type", "complex"),
    "nan": (body("return float('nan')"), None, "not_finite", "float"),
    "infinity in text": (body("return '-inf'"), None, "not_finite", "str"),
    "huge int": (body("return 10**400"), None, "not_finite", "int"),
    "no solution": ("x = 5\n", None, "no_solution", ""),
    "empty": ("", None, "no_solution", ""),
    "solution is a number": ("solution = 5\n", None, "exception", "TypeError"),
    "division by zero": (body("return 1 / 0"), None, "exception", "ZeroDivisionError"),
    "sys.exit": (body("import sys", "sys.exit(0)"), None, "exception", "SystemExit"),
    "exception whose text hangs": (
        "class Evil(Exception):\n    def __str__(self):\n        while True: pass\n" + body("raise Evil"),
        None,
        "exception",
        "Evil",
    ),
    "os._exit": (body("import os", "os._exit(3)"), None, "killed", "exit code 3"),
    "crashes the interpreter": (body("import ctypes", "ctypes.string_at(0)"), None, "killed", "exit code -11"),
    "deletes builtins": (
        body("import builtins", "builtins.__dict__.clear()", "return 1"),
        None,
        "killed",
        "exit code 0",
    ),
    "closes every fd": (body("import os", "os.closerange(0, 100)", "return 1"), None, "killed", None),
    "garbage in the report": (body("import os", "os.write(3, b'hello')", "return 1"), None, "killed", None),
    "forged nan": (
        body("import os", """os.write(3, b'["ok", "nan", "", false]\\n')""", "import time", "time.sleep(60)"),
        None,
        "killed",
        "exit code -9",
    ),
    "deeply nested report": (body("import os", "os.write(3, b'[' * 4000 + b'\\n')"), None, "killed", None),
    "endless report": (body("import os", "while True: os.write(3, b'x' * 1000)"), None, "killed", "exit code -9"),
    "prints a lot": (body("for _ in range(1000): print('x' * 10000)", "return 5"), 5.0, "ok", ""),
    "reads stdin": (body("return input()"), None, "exception", "EOFError"),
    "thread": (body("import threading", "threading.Thread(target=print).start()"), None, "exception", "RuntimeError"),
    "writes a file": (body("import tempfile", "return tempfile.TemporaryFile().write(b'x')"), None, "exception", None),
    "no environment": (body("import os", "return len(set(os.environ) & {'HOME', 'PATH', 'USER'})"), 0.0, "ok", ""),
    "null byte": ("def solution():\n    return '\0'\n", None, "syntax_error", None),
    "lone surrogate": (body("return '\ud800'"), None, "syntax_error", "UnicodeEncodeError"),
    "deep expression": ("x = " + "(" * 9000 + "1" + ")" * 9000, None, "syntax_error", None),
    "prose": ("The answer is 42.", None, "syntax_error", "SyntaxError"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_verdict(name):
    program, value, status, detail = PROGRAMS[name]
    result = run_one(program, timeout_s=10)
    assert (result.value, result.status) == (value, status), result
    assert detail in (None, result.detail)
    assert result.ms > 0


@linux
@pytest.mark.parametrize(
    "program",
    [
        body("return len([0] * 10**12)"),
        body("chunks = []", "while True: chunks.append(' ' * 10**6)"),
        body("text = 'ab'", "while True: text += text"),
    ],
)
def test_memory_is_limited(program):
    result = run_one(program, timeout_s=20)
    assert (result.status, result.detail) == ("memory", "MemoryError")


def test_memory_limit_is_above_what_a_fair_program_needs():
    assert run_one(body("return len(bytearray(200 << 20))")).value == 200 << 20


@pytest.mark.parametrize(
    "program",
    [
        body("import time", "time.sleep(3600)"),
        body("import signal", "for s in (2, 14, 15): signal.signal(s, signal.SIG_IGN)", "while True: pass"),
        body("try:", "    while True: pass", "except BaseException: pass", "return 1"),
        body("return sum(range(10**12))"),
        "class Evil:\n    def __float__(self):\n        while True: pass\n" + body("return Evil()"),
        "while True: pass\n",
    ],
)
def test_timeout(program):
    begin = time.monotonic()
    result = run_one(program, timeout_s=0.5)
    assert (result.value, result.status) == (None, "timeout")
    assert 500 <= result.ms and time.monotonic() - begin < 10


def test_text():
    programs = [body("return ' B '"), body("return 2.5"), body("return None"), body("return 'x' * 256")]
    programs += [body("return 'x' * 257"), body("return '\\ud800'"), body("return 1 / 0")]
    results = run_programs(programs, want="text")
    assert [r.value for r in results] == [" B ", "2.5", "None", "x" * 256, None, "?", None]
    assert [r.status for r in results] == ["ok"] * 4 + ["wrong_type", "ok", "exception"]


@pytest.mark.parametrize(
    ("program", "value", "status", "cut"),
    [
        (body("return 5") + "\nThe answer is 5.\n", 5.0, "ok", True),
        (body("return 5") + " \t\nSo 5.\n", 5.0, "ok", True),
        (body("return 1 / 0") + "\nOops!\n", None, "exception", True),
        (body("x = 5", "", "return x"), 5.0, "ok", False),  # a blank line alone is no reason to cut
        (body("return 5") + "The answer is 5.\n", None, "syntax_error", False),
        ("Let me think.\n\n" + body("return 5"), None, "syntax_error", False),
    ],
)
def test_cut_at_first_blank_line_only_if_needed(program, value, status, cut):
    result = run_one(program)
    assert (result.value, result.status, result.cut) == (value, status, cut)


@pytest.fixture
def asked(monkeypatch):
    """The programs that zygotes are asked to run."""
    seen, send = [], process.Zygote.send
    monkeypatch.setattr(process.Zygote, "send", lambda self, *a, **k: seen.append(a[0]) or send(self, *a, **k))
    return seen


@pytest.fixture
def handed_back(monkeypatch):
    """One entry for each program that a zygote gave back unrun."""
    seen, receive = [], process.Zygote.receive

    def recording(self, *a, **k):
        if (result := receive(self, *a, **k)) is None:
            seen.append(self)
        return result

    monkeypatch.setattr(process.Zygote, "receive", recording)
    return seen


def test_order_is_kept_and_equal_programs_run_once(asked):
    programs = [body("import time", f"time.sleep({0.2 - 0.02 * i})", f"return {i}") for i in range(8)]
    before = executor.counts()["programs"]
    results = run_programs([*programs, programs[3], programs[0]], workers=4)
    assert [r.value for r in results] == [*range(8), 3, 0]
    assert results[8] == results[3]
    assert set(asked) == set(programs) and executor.counts()["programs"] - before == len(programs)


def test_more_programs_than_are_kept_under_way(monkeypatch):
    monkeypatch.setattr(calls, "WINDOW", 3)
    programs = [body(f"return {i % 7}") for i in range(20)]
    assert [r.value for r in run_programs(programs)] == [i % 7 for i in range(20)]


def test_a_stream_gives_results_while_programs_still_come(asked):
    with executor.stream(timeout_s=10, workers=2, want="text", memory_mb=256) as batch:
        first = batch.submit(body("return 'a'"))
        assert first.result(timeout=20).value == "a"
        again, slow = (
            batch.submit(body("return 'a'")),
            batch.submit(body("import time", "time.sleep(1.5)", "return 'b'")),
        )
        quick = batch.submit(body("return 'c'"))
        assert again is first and quick.result(timeout=20).value == "c" and not slow.done()
    assert slow.result(timeout=0).value == "b"  # the end of the stream waited for it
    with pytest.raises(RuntimeError, match="has ended"):
        batch.submit(body("return 'd'"))
    assert len(asked) == 3


def test_a_stream_left_by_an_exception_runs_no_more_programs(asked):
    slow = [body("import time", "time.sleep(0.3)", f"return {i}") for i in range(10)]
    with pytest.raises(KeyboardInterrupt), executor.stream(workers=1) as batch:
        futures = [batch.submit(program) for program in slow]
        assert wait_until(futures[0].running)
        raise KeyboardInterrupt
    assert futures[0].result(timeout=0).value == 0
    assert all(future.cancelled() for future in futures[1:])
    assert asked in (slow[:1], slow[:2])  # the second may have been sent ahead; it came back


def test_nothing_waits_behind_a_slow_program(fresh, handed_back):
    """Also when the stream has ended: every program but the slow one is done long before it."""
    quick = [body(f"return {i}") for i in range(40)]
    slow = body("import time", "time.sleep(5)", "return -1")
    with executor.stream(workers=2, memory_mb=339) as batch:  # a zygote starts when all are submitted
        futures = [batch.submit(program) for program in (*quick[:10], slow, *quick[10:])]
        ended = threading.Thread(target=batch.close)
        ended.start()
        last = futures.pop(10)
        assert [future.result(timeout=20).value for future in futures] == list(range(40))
        assert not last.done() and handed_back
    ended.join()
    assert last.result().value == -1


def test_a_program_sent_ahead_can_be_cancelled(fresh):
    """Its zygote still runs it, but its answer is dropped."""
    fresh.setattr(process, "COMMAND", patched_zygote("zygote.PATIENCE_S = 60"))
    programs = [body("import time", "time.sleep(0.5)", f"return {i}") for i in range(4)]
    with executor.stream(workers=1, memory_mb=339) as batch:
        futures = [batch.submit(program) for program in programs]
        assert wait_until(lambda: batch._ahead)
        assert futures[1].cancel()
    assert [future.cancelled() or future.result().value for future in futures] == [0, True, 2, 3]


def test_counts():
    before = executor.counts()
    run_programs([body("return 1"), body("return 1"), body("return None"), "x = 1"])
    change = {key: number - before.get(key, 0) for key, number in executor.counts().items()}
    wanted = {"programs": 3, "ok": 1, "wrong_type": 1, "no_solution": 1}
    assert {key: number for key, number in change.items() if number} == wanted


def test_no_program_sees_another():
    poison = [
        body("math.sqrt = abs", "return 1"),
        body("import builtins", "builtins.float = abs", "return 1"),
        "left = 99\n" + body("return left"),
        body("sympy.solve = abs", "return 1"),
        body("import os", "os.chdir('/tmp')", "return 1"),
    ]
    checks = [
        body("return math.sqrt(16) + float('2')"),
        body("return left"),
        body("return sympy.solve(sympy.Symbol('x') - 7)[0]"),
        body("import os", "return os.getcwd() == '/'"),
    ]
    results = run_programs(poison + checks, workers=1)
    assert [r.value for r in results[len(poison) :]] == [6.0, None, 7.0, 1.0]


def test_several_threads_at_once():
    answers = {}

    def work(name):
        answers[name] = [
            r.value for r in run_programs([body(f"return {name * 100 + i}") for i in range(20)], workers=2)
        ]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {name: [name * 100 + i for i in range(20)] for name in range(4)}


@pytest.mark.parametrize("bad", [{"want": "letter"}, {"timeout_s": 0}, {"workers": 0}, {"memory_mb": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run_programs(["x = 1"], **bad)
