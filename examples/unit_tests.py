"""Questions whose answer is a program that passes tests, as in MBPP and HumanEval. Its reward is ReFT's: 1, 0.1 or 0.

    python -m reft_jax pipeline --config=… --workdir=… --config.task=examples/unit_tests.py:UNIT_TESTS

In a data file, `answer_value` is Python. Its asserts and its calls, as `check(add)`, are the tests; the rest runs too.
The answer of a completion is the share of tests that pass, correct if that is 1. A program that does not run has none.
"""

import ast
import re
from dataclasses import dataclass

from reft_jax.tasks.registry import Task

# The completion runs in names of its own, so it cannot replace `solution` or what `solution` uses by accident.
HARNESS = """
def solution(exec=exec, Exception=Exception):
    names, passed = {{"__name__": "solution"}}, 0
    exec({code!r}, names)
    for statement, is_test in {statements!r}:
        try:
            exec(statement, names)
            passed += is_test
        except Exception:  # a test that raises has not passed
            pass
    return passed / {tests}
"""


def statements(tests: str) -> list[tuple[str, bool]]:
    """The statements of a text, each with whether it is a test; an empty list if the text is not Python."""
    try:
        return [  # a number, as in a file of GSM8K, or a docstring would always pass
            (ast.unparse(one), isinstance(one.value if isinstance(one, ast.Expr) else one, ast.Assert | ast.Call))
            for one in ast.parse(tests).body
        ]
    except (SyntaxError, ValueError):
        return []


@dataclass(frozen=True)
class UnitTests(Task):
    after: str = "\nProgram:\n"
    want: str = "tests"
    allowed: str = "Python with at least one assert or call"

    def program(self, completion, example):
        block = re.search(r"```(?:python)?\n(.*?)(?:```|$)", completion, re.DOTALL)
        found = statements(example.answer_value)
        return HARNESS.format(code=block[1] if block else completion, statements=found, tests=sum(t for _, t in found))

    def target(self, answer_value):
        return 1.0 if any(is_test for _, is_test in statements(answer_value)) else None

    def same(self, value, target):
        return value == target


UNIT_TESTS = UnitTests("unit-tests")
