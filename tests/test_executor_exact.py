"""The executor's numbers and texts are CPython's own, to the last bit."""

import json
import math
import random

import pytest
from executor_tools import body

from reft_jax.executor import run_programs, shutdown


@pytest.fixture(scope="module", autouse=True)
def no_zygote_left():
    yield
    shutdown()


def test_every_svamp_program_gives_its_answer(shared):
    rows = json.loads((shared / "data" / "svamp_python_sdp.json").read_text())
    results = run_programs([row["answer_cot"] for row in rows])
    assert len(rows) == 3043
    for row, result in zip(rows, results, strict=True):
        namespace: dict = {}
        exec(row["answer_cot"], namespace)
        assert repr(result.value) == repr(float(namespace["solution"]())), row["item_id"]
        assert abs(result.value - float(row["answer_value"])) < 0.01, row["item_id"]  # some are given rounded


def expressions(rng: random.Random) -> list[str]:
    """Where a reimplementation of Python's arithmetic would go wrong, with numbers of a kind word problems have."""
    a, b, c = rng.randint(-999, 999), rng.randint(1, 99), rng.randint(1, 40)
    x, y = round(rng.uniform(-50, 50), rng.randint(0, 4)), rng.uniform(-1e3, 1e3)
    tie = f"{rng.randint(-500, 500)}.{rng.randint(0, 99):02d}5"
    return [
        f"round({tie}, 2)",
        f"round({a} + 0.5)",
        f"round({a * 5}, -1)",
        f"{a}**{c} + {b}",
        f"{a} // {b} + {a} % {b}",
        f"{x} // {b} + {x} % -{b}",
        f"divmod({a}, -{b})[1] / {c}",
        f"math.fmod({a}, {b}) + math.remainder({y}, {b})",
        f"int({y!r}) + math.floor({y!r}) * math.ceil({x})",
        f"{y!r} * {x} + 0.1",
        f"sum([0.1] * {c}) + math.fsum([0.1] * {b})",
        f"f'{{{y!r}:.{c % 8}f}}'",
        f"f'{{{a / b!r}:,.2f}}'.replace(',', '')",
        f"'{a}' + '{b}' * {c % 5} + str({x})[-1:]",
        f"'%.{c % 12}g' % ({y!r} / {b})",
        f"math.factorial({c}) / {b}",
        f"math.comb({b}, {c}) % 1000003 - {a}",
        f"{a}.0**-{c % 7 + 1} if {a} else -0.0",
        f"(1 << {c * 5}) / 3 + float('{x}e{c}')",
        f"{a} / {b} == {x} or not {a} > {b}",
    ]


@pytest.mark.parametrize("want", ["number", "text"])
def test_generated_arithmetic_is_that_of_this_python(want):
    rng = random.Random(0)
    asked = [expression for _ in range(100) for expression in expressions(rng)]
    results = run_programs([body(f"return {expression}") for expression in asked], want=want)
    assert len(asked) == 2000
    for expression, result in zip(asked, results, strict=True):
        expected = eval(expression)
        if want == "text":
            assert result.value == str(expected), expression
        else:
            assert result.status == "ok" and repr(result.value) == repr(float(expected)), expression


def test_floats_at_the_edges():
    values = [0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308, 2**53 + 1, -1e22, 1e23]
    results = run_programs([body(f"return {value!r}") for value in values])
    assert [r.value.hex() for r in results] == [float(value).hex() for value in values]
    assert math.copysign(1, results[2].value) == -1
