"""The executor: exact answers from good programs, a typed status from every other, and nothing left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reft_jax.executor import InfrastructureError, pool, run_programs, shutdown, start

LINUX = sys.platform == "linux"
linux = pytest.mark.skipif(not LINUX, reason="needs /proc, namespaces or a memory limit")
ZYGOTE_FOLDER = str(Path(pool.__file__).parent)


def body(*lines: str) -> str:
    return "def solution():\n" + "".join(f"    {line}\n" for line in lines)


def run_one(program: str, **options):
    return run_programs([program], **{"timeout_s": 2, "workers": 1, "memory_mb": 256} | options)[0]


def zygotes(memory_mb: int) -> set[int]:
    """Ids of all live processes started for this memory limit: launchers, zygotes and whatever was forked from them."""
    found = set()
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = cmdline.read_bytes().split(b"\0")
            state = cmdline.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if words[-3:-1] in ([b"plain", b"%d" % memory_mb], [b"sympy", b"%d" % memory_mb]) and state != "Z":
            found.add(int(cmdline.parent.name))
    return found


def wait_until(condition, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def patched_zygote(*lines: str) -> list[str]:
    """A command for a zygote with some of its parts replaced."""
    setup = [f"import sys; sys.path.insert(0, {ZYGOTE_FOLDER!r})", "import zygote", *lines]
    return [sys.executable, "-c", "\n".join([*setup, "zygote.main(sys.argv[1], int(sys.argv[2]))"])]


NO_NAMESPACE = "zygote.LIBC.unshare = lambda flags: -1"


@pytest.fixture
def fresh(monkeypatch):
    """No zygote from another test, and none left for the next."""
    shutdown()
    yield monkeypatch
    shutdown()


@pytest.fixture(scope="module")
def isolated() -> bool:
    """Whether this machine lets a zygote have its own namespace; there its process id is 1."""
    return run_one(body("import os", "return os.getppid()")).value == 1


# name: program, value, status, detail
PROGRAMS = {
    "module constant and helper": ("rate = 3\ndef f(x):\n    return x * rate\n" + body("return f(14)"), 42.0, "ok", ""),
    "math without import": (body("return math.sqrt(2)"), math.sqrt(2), "ok", ""),
    "sympy without import": (body("return sympy.solve(sympy.Symbol('x') - 7)[0]"), 7.0, "ok", ""),
    "sympy constant": (body("return sympy.pi"), math.pi, "ok", ""),
    "sympy symbol": (body("return sympy.Symbol('x') + 1"), None, "wrong_type", "Add"),
    "fraction": (body("from fractions import Fraction", "return Fraction(1, 3)"), 1 / 3, "ok", ""),
    "decimal": (body("from decimal import Decimal", "return Decimal('0.1')"), 0.1, "ok", ""),
    "numpy": (body("import numpy as np", "return np.float32(0.5)"), 0.5, "ok", ""),
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
    "kills itself": (body("import os", "os.kill(os.getpid(), 15)"), None, "killed", "exit code -15"),
    "kills its group": (body("import os", "os.killpg(0, 9)"), None, "killed", "exit code -9"),
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
    "fork bomb": (body("import os", "while True: os.fork()"), None, "exception", "BlockingIOError"),
    "shell": (body("import subprocess", "return subprocess.check_output(['echo', '42'])"), None, "exception", None),
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
    if name == "numpy":
        pytest.importorskip("numpy")
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
        body("import os", "os.kill(os.getpid(), 19)", "return 1"),
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


def test_float_comes_back_exactly():
    values = [0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, 2**53 + 1]
    results = run_programs([body(f"return {value!r}") for value in values])
    assert [r.value.hex() for r in results] == [float(value).hex() for value in values]


def test_order_is_kept_and_equal_programs_run_once(monkeypatch):
    asked, ask = [], pool.Zygote.ask
    monkeypatch.setattr(pool.Zygote, "ask", lambda self, *request: asked.append(request[0]) or ask(self, *request))
    programs = [body("import time", f"time.sleep({0.2 - 0.02 * i})", f"return {i}") for i in range(8)]
    results = run_programs([*programs, programs[3], programs[0]], workers=4)
    assert [r.value for r in results] == [*range(8), 3, 0]
    assert results[8] == results[3]
    assert sorted(asked) == sorted(programs)


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


@linux
@pytest.mark.parametrize("namespace", ["", NO_NAMESPACE])
def test_nothing_survives(fresh, namespace):
    """Even with no limit on processes: a daemon in a new session, whose parent is gone, ends with the call."""
    fresh.setattr(pool, "COMMAND", patched_zygote(namespace, "zygote.lock_down = lambda *a, **k: None"))
    daemon = ["import os, time", "if os.fork() == 0:", "    os.setsid()"]
    daemon += ["    if os.fork(): os._exit(0)", "    time.sleep(600)"]
    assert run_one(body("return 1"), memory_mb=311).value == 1
    before = zygotes(311)
    assert 1 <= len(before) <= 2
    # The daemon holds the child's pipe open, so without a report only the deadline ends the wait.
    for ending, status in [("return 7", "ok"), ("os._exit(1)", "timeout"), ("time.sleep(600)", "timeout")]:
        assert run_one(body(*daemon, "time.sleep(0.2)", ending), timeout_s=1, memory_mb=311).status == status
        assert zygotes(311) == before


@linux
def test_kill_reaches_nothing_outside(fresh, isolated):
    if not isolated:
        pytest.skip("this machine gives a zygote no namespace: the program would really kill")
    start(1, 312)
    before = zygotes(312)
    for target in ("-1", "os.getppid()", "1"):
        run_one(body("import os", f"os.kill({target}, 9)", "return 1"), memory_mb=312)
    outside = run_one(body("import os", f"os.kill({os.getpid()}, 9)"), memory_mb=312)
    assert (outside.status, outside.detail) == ("exception", "ProcessLookupError")
    environ = run_one(body(f"return len(open('/proc/{os.getpid()}/environ').read())"), memory_mb=312)
    assert (environ.status, environ.detail) == ("exception", "PermissionError")
    assert zygotes(312) == before


@linux
@pytest.mark.parametrize("which", [min, max])  # the launcher, the zygote
def test_a_killed_zygote_changes_no_verdict(fresh, which):
    start(2, 313)
    programs = [body("import time", "time.sleep(0.02)", f"return {i}") for i in range(40)]
    timer = threading.Timer(0.2, os.kill, (which(zygotes(313)), signal.SIGKILL))
    timer.start()
    results = run_programs(programs, memory_mb=313)
    timer.join()
    assert [r.value for r in results] == list(range(40))


@linux
def test_a_hung_zygote_is_replaced(fresh):
    fresh.setattr(pool, "GRACE_S", 0.5)
    start(1, 314)
    stopped = zygotes(314)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert run_one(body("return 3"), timeout_s=1, memory_mb=314).value == 3
    assert wait_until(lambda: not zygotes(314) & stopped)


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-c", "raise SystemExit(3)"],
        patched_zygote("zygote.run = lambda *a: sys.exit(4)"),
        patched_zygote("def refuse(*a, **k): raise OSError('no limits here')", "zygote.lock_down = refuse"),
        patched_zygote("sys.modules['sympy'] = None"),
    ],
    ids=["does not start", "dies at work", "cannot lock down", "no sympy"],
)
def test_a_broken_executor_is_an_error_and_no_score(fresh, command):
    fresh.setattr(pool, "COMMAND", command)
    with pytest.raises(InfrastructureError):
        run_programs([body("return sympy.Integer(1)")])


@linux
def test_start_shutdown_and_reuse(fresh):
    start(2, 315)
    started = zygotes(315)
    run_programs([body(f"return {i}") for i in range(10)], workers=2, memory_mb=315)
    assert zygotes(315) == started
    shutdown()
    assert zygotes(315) == set()
    assert run_one(body("return 1"), memory_mb=315).value == 1


@linux
@pytest.mark.parametrize("namespace", ["", NO_NAMESPACE])
def test_zygotes_end_with_their_parent(namespace):
    trainer = (
        f"from reft_jax.executor import pool; pool.COMMAND = {patched_zygote(namespace)!r}\n"
        "pool.start(2, 316)\n"
        "pool.run_programs(['import time; time.sleep(600)'], timeout_s=600, memory_mb=316)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", trainer], cwd=Path(ZYGOTE_FOLDER).parents[1])
    expected = 5 if run_one(body("import os", "return os.getppid()")).value == 1 and not namespace else 3
    try:
        assert wait_until(lambda: len(zygotes(316)) == expected)
    finally:
        process.kill()
        process.wait()
    assert wait_until(lambda: not zygotes(316))


@linux
def test_a_forked_copy_of_the_trainer_leaves_the_zygotes_alone():
    trainer = (
        "import os, sys\n"
        "from reft_jax.executor import pool\n"
        "pool.start(1, 317)\n"
        "mine = pool._idle[False, 317][0]\n"
        "if os.fork() == 0: sys.exit()\n"  # runs atexit
        "os.wait()\n"
        "assert pool.run_programs(['def solution(): return 1'], memory_mb=317)[0].value == 1\n"
        "assert pool._idle[False, 317] == [mine]\n"
    )
    subprocess.run([sys.executable, "-c", trainer], cwd=Path(ZYGOTE_FOLDER).parents[1], check=True, timeout=60)


@pytest.mark.parametrize("bad", [{"want": "letter"}, {"timeout_s": 0}, {"workers": 0}, {"memory_mb": 0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        run_programs(["x = 1"], **bad)


NEEDS_FILE_RULES = "only a rule on paths stops it, and limits are all there is: "
EXCLUDED = {
    "kill_parent": "the namespace ignores the signal, so the program goes on and answers 1; without one it would kill",
    "read_passwd": NEEDS_FILE_RULES + "the file is readable",
    "read_gold": NEEDS_FILE_RULES + "it searches the disk",
    "delete_tree": NEEDS_FILE_RULES + "it may remove what its user may",
    "disk_fill": NEEDS_FILE_RULES + "no byte is written, but an empty file is left",
    "exec_obf": NEEDS_FILE_RULES + "it makes an empty file",
}
EXCLUDED_WITHOUT_NAMESPACE = {
    "kill_all": "it would kill every process of this user",
    "read_proc_parent": "same user, so it may read",
}


@linux
def test_hostile_programs(shared, isolated):
    excluded = EXCLUDED if isolated else EXCLUDED | EXCLUDED_WITHOUT_NAMESPACE
    cases = json.loads((shared / "data" / "hostile_programs.json").read_text())
    assert set(excluded) < {case["id"] for case in cases}
    cases = [case for case in cases if case["id"] not in excluded]
    programs = [eval(case["code_py_expr"]) if "code_py_expr" in case else case["code"] for case in cases]
    results = run_programs(programs, timeout_s=2, workers=4, memory_mb=318)
    for case, result in zip(cases, results, strict=True):
        answered = result.status == "ok"
        assert answered == (result.value is not None), case["id"]
        if case["expect"] == "no_answer":
            assert not answered, (case["id"], result)
        elif case["expect"] != "answer_or_no_answer":
            assert result.value == case["expect"], (case["id"], result)
        for path in case.get("forbid_paths", []):
            assert not Path(path).exists(), case["id"]
    shutdown()
    assert zygotes(318) == set()
