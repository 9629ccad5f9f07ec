"""What happens inside a child: one program compiled, run and its result converted, all under the zygote's timer.

A report is one line of JSON `[status, value, detail, cut]`; a number is a `float.hex` string.
"""

import errno
import itertools
import json
import math
import sys
import types

TEXT_CHARS, DETAIL_CHARS = 256, 80
UNCOMPILABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)
# Run by a child that waits, before it has a program: the pages that compiling and running write to are its own then.
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
    """A fresh `__main__` that holds these names: a program runs in it, imports it and pickles its classes."""
    module = types.ModuleType("__main__")
    module.__dict__.update(names)
    sys.modules["__main__"] = module
    return module


def shift_limits() -> None:
    """Makes the recursion limit, as a program reads and sets it, count from its first frame: see `count_from`."""
    set_limit, get_limit = sys.setrecursionlimit, sys.getrecursionlimit
    sys.getrecursionlimit = lambda: get_limit() - below
    sys.setrecursionlimit = lambda limit: set_limit(limit + below if 0 < limit < 1 << 30 else limit)


def count_from(frames: int) -> None:
    """So many frames are below the program's first."""
    global below
    below = frames
    sys.setrecursionlimit(1000)


def report(status: str, value: str | None = None, detail: str = "", cut: bool = False) -> bytes:
    return json.dumps([status, value, detail[:DETAIL_CHARS], cut]).encode() + b"\n"


def solve(program: str, want: str, namespace: dict) -> bytes:
    """Compiles and runs `program`, calls its `solution()` and converts the result; anything may be raised."""
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
    out_of_memory = report("memory", detail="MemoryError", cut=cut)  # made while there is memory to make it
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
        text = str(result).encode(errors="replace").decode()  # a lone surrogate would break who writes it to a file
        return ("ok", text, "") if len(text) <= TEXT_CHARS else ("wrong_type", None, f"long {kind}")
    try:
        number = float(result)
    except (TypeError, ValueError):
        return "wrong_type", None, kind
    except OverflowError:
        return "not_finite", None, kind
    return ("ok", number.hex(), "") if math.isfinite(number) else ("not_finite", None, kind)
