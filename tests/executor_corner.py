"""Tries what programs can do to a trainer, and how honest ones end, on this machine (tests/denied.py removes what
its kernel offers): `python executor_corner.py HONEST ANSWER_FILE` with SECRET in its environment prints a JSON object.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from executor_tools import body
from hostile_programs import HOSTILE, LIBC

from reft_jax import executor

MEMORY_MB = 340
GET = ["import ctypes, os", LIBC.replace("libc", "c")]
FORGED = '{"status": "ok", "value": "0x1p+9", "detail": "", "cut": false, "ms": 1.0}'
# Each returns what it read as text. <pid>: the trainer; <address>: where it keeps the secret.
READS_MEMORY = {
    "environment": ["return open(f'/proc/{<pid>}/environ').read()"],
    "memory": ["file = open(f'/proc/{<pid>}/mem', 'rb', 0)", "file.seek(<address>)", "return str(file.read(40))"],
    "memory by a call": [
        *GET,
        "into = ctypes.create_string_buffer(40)",
        "vector = lambda at: (ctypes.c_size_t * 2)(at, 40)",
        "ours, theirs = vector(ctypes.addressof(into)), vector(<address>)",
        "c.process_vm_readv(<pid>, ours, 1, theirs, 1, 0)",
        "return str(into.raw)",
    ],
    "descriptors of the trainer": ["import os", "return str([os.readlink(f'/proc/{<pid>}/fd/{i}') for i in (0, 3)])"],
}
READS_FILES = {
    "answers": ["return open(<file>).read()"],
    "answers, by number": ["import os", "return os.read(os.open(<file>, os.O_RDONLY), 99).decode()"],
}
# Each tries to answer for the programs after it.
STEALS = {
    whose: [*GET, f"there = c.syscall(434, {pid}, 0)", "for fd in range(40):",
            "    mine = c.syscall(438, there, fd, 0)",
            f"    if mine > 3: os.write(mine, {(FORGED + chr(10)).encode()!r} * 2)", "return 'done'"]
    for whose, pid in (("the zygote's socket", "os.getppid()"), ("the trainer's socket", "<pid>"))
}  # fmt: skip
LEAVES = {
    "System V memory": [*GET, "return str(c.shmget(0, 1 << 20, 0o600) >= 0)"],
}
BROADCASTS = {"kills its siblings"}  # signals to whom it does not know: not where nothing keeps them in


def honest(count: int) -> tuple[list[str], list[float]]:
    """Programs as models write them, and their answers."""
    kinds = [
        (lambda i: body(f"return {i} * 7 / 3"), lambda i: i * 7 / 3),
        (lambda i: body("from fractions import Fraction", f"return Fraction({i}, 7)"), lambda i: i / 7),
        (lambda i: body("import decimal", f"return decimal.Decimal('{i}.5') * 2"), lambda i: float(2 * i + 1)),
        (lambda i: body(f"return sum(x * x for x in range({i}))"), lambda i: float(sum(x * x for x in range(i)))),
        (lambda i: body(f"return math.sqrt({i})"), lambda i: i**0.5),
        (lambda i: body("import statistics", f"return statistics.mean([{i}, 4])"), lambda i: (i + 4) / 2),
        (lambda i: body(f"return sympy.Integer({i}) ** 2"), lambda i: float(i * i)),
    ]
    chosen = [(kinds[i % 6 if i % 25 else 6], i) for i in range(count)]
    return [kind[0](i) for kind, i in chosen], [kind[1](i) for kind, i in chosen]


def fill(line: str, words: dict) -> str:
    for name, word in words.items():
        line = line.replace(f"<{name}>", repr(word))
    return line


def shared_memory() -> list[str]:
    return Path("/proc/sysvipc/shm").read_text().splitlines()


def main(count: int, answer_file: str) -> dict:
    secret = ctypes.create_string_buffer(os.environ["SECRET"].encode())
    found: dict = {"line": executor.start(2, MEMORY_MB, allow_unsandboxed=True)}
    words = {"pid": os.getpid(), "address": ctypes.addressof(secret), "file": answer_file}
    kept_in = any(name in found["line"] for name in ("seccomp", "namespaces", "Landlock"))
    segments = shared_memory()

    def run(programs: list[str], **options) -> list[executor.ExecResult]:
        return executor.run_programs(programs, **{"timeout_s": 20, "workers": 2, "memory_mb": MEMORY_MB} | options)

    for name, attacks in {"memory": READS_MEMORY, "files": READS_FILES, "steals": STEALS, "leaves": LEAVES}.items():
        programs = [body(*(fill(line, words) for line in lines)) for lines in attacks.values()]
        results = zip(attacks, run(programs, want="text", workers=1), strict=True)
        # A long text is `wrong_type`: whether it was read shows in the class.
        found[name] = {attack: result.value or f"{result.status} {result.detail}" for attack, result in results}
    found["segments"] = [row for row in shared_memory() if row not in segments]
    for row in found["segments"]:  # a failing test leaves none either: the next one would not see its own
        ctypes.CDLL(None).shmctl(int(row.split()[1]), 0, None)
    programs, answers = honest(count)
    begin = time.monotonic()
    hostile = [
        p for name, (p, ends) in HOSTILE.items() if (kept_in or name not in BROADCASTS) and "timeout" not in ends
    ]
    mixed = [program for pair in zip(programs, hostile, strict=False) for program in pair]
    mixed += programs[len(hostile) :]
    got = dict(zip(mixed, run(mixed), strict=True))
    found["wrong"] = [(program, got[program]) for program, answer in zip(programs, answers, strict=True)
                      if (got[program].value, got[program].status) != (answer, "ok")]  # fmt: skip
    found["seconds"] = time.monotonic() - begin
    executor.shutdown()
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2])))
