"""A program gets what it would get as a script: CPython's answers, and nothing from other programs."""

import random
import subprocess
import sys

import pytest
from executor_tools import (
    LINUX,
    NO_LANDLOCK,
    NO_NAMESPACE,
    body,
    linux,
    patched_zygote,
    run_one,
    wait_until,
    zygotes,
)

from reft_jax import executor
from reft_jax.executor import process, run_programs

SCRIPTS = {
    "dataclass with string annotations": """
from __future__ import annotations
import dataclasses
from typing import ClassVar
@dataclasses.dataclass
class Box:
    count: int = 3
    price: ClassVar[int] = 5
def solution():
    return len(dataclasses.fields(Box)) * Box().count * Box.price
""",
    "pickle of a class": """
import copy, pickle
class Box:
    def __init__(self, count): self.count = count
    def __reduce__(self): return Box, (self.count + 1,)
def solution():
    return pickle.loads(pickle.dumps(Box(4))).count * 10 + copy.deepcopy(Box(7)).count
""",
    "type hints": """
from __future__ import annotations
import typing
class Box: ...
def pack(box: Box, count: int) -> list[Box]: ...
def solution():
    hints = typing.get_type_hints(pack)
    return len(hints) + (hints['box'] is Box)
""",
    "imports its own module": """
import __main__, sys
rate = 6
def solution():
    __main__.rate += 1
    return rate + 10 * (sys.modules['__main__'] is __main__) + 100 * (__main__.__name__ == '__main__')
""",
    "exit that is caught": """
def solution():
    try:
        exit()
    except SystemExit as end:
        return 9 if end.code is None else 1
""",
    "depth of recursion": """
def down(n):
    try:
        return down(n + 1)
    except RecursionError:
        return n
outside = down(0)
def solution():
    return outside * 10000 + down(0)
""",
    "depth of recursion, set": """
import sys
sys.setrecursionlimit(333)
def down(n):
    try:
        return down(n + 1)
    except RecursionError:
        return n
def solution():
    return down(0) * 10000 + sys.getrecursionlimit()
""",
    "the limit as it is": "import sys\ndef solution():\n    return sys.getrecursionlimit()\n",
    "a limit that cannot be": """
import sys
def solution():
    try:
        sys.setrecursionlimit(0)
    except ValueError:
        return 5
""",
    "no module of ours": """
import sys
def solution():
    found = 0
    for name in ('begin', 'child', 'files', 'lockdown', 'sysv', 'wire', 'zygote'):
        try:
            __import__(name)
        except ImportError:
            found += 1
    return found
""",
}


def test_scripts_do_what_this_python_does():
    """With children that are fresh and with those that have waited."""
    runs = [[sys.executable, "-c", script + "\nprint(float(solution()))"] for script in SCRIPTS.values()]
    expected = [subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() for run in runs]
    executor.shutdown()
    for mark in ("", "# again"):
        results = run_programs([script + mark for script in SCRIPTS.values()], workers=1, memory_mb=355)
        got = {name: str(result.value) for name, result in zip(SCRIPTS, results, strict=True)}
        assert got == dict(zip(SCRIPTS, expected, strict=True))
        if LINUX:  # `zygotes` needs /proc; without seccomp there are no spares to wait for
            wait_until(lambda: len(zygotes(355)) >= len(SCRIPTS), 5)


def generated(rng: random.Random) -> list[tuple[str, float]]:
    """Programs with dataclasses, pickle, type hints and deep recursion, and what they give."""
    a, b, depth = rng.randint(2, 99), rng.randint(2, 99), rng.randint(300, 980)
    future = "from __future__ import annotations\n"
    fields = [f"x{i}" for i in range(rng.randint(1, 6))]
    record = "".join(f"    {name}: int = {a + i}\n" for i, name in enumerate(fields))
    static = f"    rate: ClassVar[int] = {b}\n"
    data = "import dataclasses\nfrom typing import ClassVar\n@dataclasses.dataclass(order=True)\n"
    data += f"class Row:\n{record}{static}"
    return [
        (future + data + body("return sum(dataclasses.astuple(Row())) * Row.rate"),
         float(sum(a + i for i in range(len(fields))) * b)),
        (future + data + body(f"return len(dataclasses.fields(Row)) + (Row() < Row({a + 1}))"), float(len(fields) + 1)),
        (data + body("import pickle", f"row = Row({b})", "return pickle.loads(pickle.dumps(row)).x0 + (row == Row())"),
         float(b + (a == b))),
        (future + data + body("import typing", "return len(typing.get_type_hints(Row))"), float(len(fields) + 1)),
        (f"def total(n):\n    return 0 if n == 0 else {a} + total(n - 1)\n" + body(f"return total({depth})"),
         float(a * depth)),
        ("import sys\nsys.setrecursionlimit(20000)\ndef total(n):\n    return 0 if n == 0 else 1 + total(n - 1)\n"
         + body(f"return total({depth * 10})"), float(depth * 10)),
    ]  # fmt: skip


def test_generated_programs_with_classes_and_recursion():
    rng = random.Random(1)
    asked = [pair for _ in range(50) for pair in generated(rng)]
    assert len({program for program, _ in asked}) >= 290
    results = run_programs([program for program, _ in asked])
    wrong = [
        (program, result) for (program, value), result in zip(asked, results, strict=True) if result.value != value
    ]
    assert not wrong, wrong[0]


def test_a_surrogate_pair_is_an_error_in_a_program_and_no_character():
    for mark in ("\ud83d\ude00", "\ud83d"):
        result = run_one(f"def solution():\n    return len('{mark}')\n")
        assert (result.status, result.detail) == ("syntax_error", "UnicodeEncodeError")
    assert run_one(body("return len('\U0001f600')")).value == 1
    assert run_one(body("return chr(0xd83d) + chr(0xde00)"), want="text").value == "??"


@pytest.mark.parametrize(("length", "status"), [(256, "ok"), (257, "killed"), (1000, "killed")])
def test_a_forged_report_has_no_more_characters_than_an_honest_one(length, status):
    forge = f"""os.write(3, ('["ok", "' + 'é' * {length} + '", "", false]\\n').encode())"""
    result = run_one(body("import os", forge, "os._exit(0)"), want="text")
    assert (result.status, result.value) == (status, "é" * 256 if status == "ok" else None)


# Looks through all memory that its process may write to, and all objects, for a text that its own source does not hold.
SEARCH = """
import ctypes, gc, sys
def solution():
    text = 'NEEDLE' + '-IN-ANOTHER'
    found = 0
    gc.unfreeze()
    frame = sys._getframe()
    while frame:
        found += any(text in str(value) for value in frame.f_locals.values() if value is not text)
        frame = frame.f_back
    del frame
    needle = text.encode()
    for line in open('/proc/self/maps'):
        where, rights, *_, name = line.split(' ')
        if rights.startswith('rw') and '[v' not in name:
            begin, end = (int(number, 16) for number in where.split('-'))
            memory = (ctypes.c_char * (end - begin)).from_address(begin)
            found += memory.raw.count(needle[:6] + needle[6:]) > (begin <= id(text) < end) + (begin <= id(needle) < end)
    return found
"""


@linux
def test_no_program_finds_another_in_its_memory(fresh):
    """One that ran before it, and one that its zygote has already; in a fresh child and in one that waited."""
    fresh.setattr(process, "COMMAND", patched_zygote(NO_LANDLOCK, NO_NAMESPACE, "zygote.PATIENCE_S = 60"))
    fresh.setattr(executor.pool._state, "allow_unsandboxed", True)
    other = body("text = 'NEEDLE-IN-ANOTHER'", "return len(text)")
    for mark in ("", "# again"):
        programs = [other + mark, SEARCH + mark, other + "# after" + mark, other + "# last" + mark]
        results = run_programs(programs, workers=1, memory_mb=356, timeout_s=60)
        assert [result.value for result in results] == [17.0, 0.0, 17.0, 17.0]


def test_flags_of_open_files_are_each_childs_own():
    fill = body("import fcntl, os", "for fd in (0, 1, 2): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_NONBLOCK)")
    look = body("import fcntl, os", "flags = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (0, 1, 2)]",
                "return sum(bool(flag & (os.O_APPEND | os.O_NONBLOCK)) for flag in flags)")  # fmt: skip
    for mark in ("", "# again"):
        results = run_programs([fill + mark, look + mark], workers=1, memory_mb=357)
        assert (results[0].status, results[1].value) == ("wrong_type", 0.0)
