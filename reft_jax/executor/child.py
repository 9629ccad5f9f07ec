"""What a child does: compile one program, run it and convert its result, while the zygote keeps the time.

Its report is one line of JSON, `[status, value, detail, cut]`; a number is a `float.hex` string.
"""

import errno
import itertools
import json
import math
import sys
import types

TEXT_CHARS, DETAIL_CHARS = 256, 80
# What `compile` raises for a program that Python cannot compile.
UNCOMPILABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
# A waiting child runs this before it has a program. It then already owns the pages that compiling and running write to.
WARM_UP = '''def solution():
    """How much?"""
    count = 3
    price = 4.5
    names = [f"{count} of {price:.2f}", "two"]
    total = sum(count * price for _ in names) / len(names) - math.floor(2.5)
    result = round(total, 2) if total > 1 else int(total)
    return result
'''
CALL = compile("solution()", "<call>", "eval")
below = 0  # frames on this child's stack below a program's first one


def main_module(**names: object) -> types.ModuleType:
    """Makes a fresh `__main__` with these names. A program runs in it, can import it and can pickle its classes."""
    module = types.ModuleType("__main__")
    module.__dict__.update(names)
    sys.modules["__main__"] = module
    return module


def shift_limits() -> None:
    """Makes the recursion limit that a program reads and sets count from its own first frame: see `count_from`."""
    set_limit, get_limit = sys.setrecursionlimit, sys.getrecursionlimit
    sys.getrecursionlimit = lambda: get_limit() - below
    sys.setrecursionlimit = lambda limit: set_limit(limit + below if 0 < limit < 1 << 30 else limit)


def count_from(frames: int) -> None:
    """Says how many frames are below the program's first one."""
    global below
    below = frames
    sys.setrecursionlimit(1000)


def report(status: str, value: str | None = None, detail: str = "", cut: bool = False) -> bytes:
    """The line that a child sends; `detail` is cut to DETAIL_CHARS characters."""
    return json.dumps([status, value, detail[:DETAIL_CHARS], cut]).encode() + b"\n"


def solve(program: str, want: str, namespace: dict) -> bytes:
    """Compiles and runs `program`, calls its `solution()` and returns a report. Anything may be raised.

    A program that does not compile is cut at its first blank line and tried again.
    """
    cut = False
    try:
        code = compile(program, "<program>", "exec", dont_inherit=True)
    except UNCOMPILABLE as error:
        head = "\n".join(itertools.takewhile(str.strip, program.split("\n")))
        try:
            code = compile(head, "<program>", "exec", dont_inherit=True)
        except UNCOMPILABLE:
            return report("syntax_error", detail=type(error).__name__)
        cut = True
    out_of_memory = report("memory", detail="MemoryError", cut=cut)  # made now, while there is memory for it
    try:
        exec(code, namespace)
        if "solution" not in namespace:
            return report("no_solution", cut=cut)
        status, value, detail = convert(eval(CALL, namespace), want)  # as deep on the stack as the program itself
    except MemoryError:
        return out_of_memory
    except BaseException as error:
        refused = isinstance(error, PermissionError) and error.errno in (errno.EPERM, errno.EACCES)
        return report("refused" if refused else "exception", detail=type(error).__name__, cut=cut)
    return report(status, value, detail, cut)


def convert(result: object, want: str) -> tuple[str, str | None, str]:
    """(status, value, detail) of what `solution()` returned."""
    kind = type(result).__name__
    if want == "text":
        text = str(result).encode(errors="replace").decode()  # a lone surrogate cannot be written to a file
        return ("ok", text, "") if len(text) <= TEXT_CHARS else ("wrong_type", None, f"long {kind}")
    try:
        number = float(result)
    except (TypeError, ValueError):
        return "wrong_type", None, kind
    except OverflowError:
        return "not_finite", None, kind
    return ("ok", number.hex(), "") if math.isfinite(number) else ("not_finite", None, kind)
