"""How text is read as an answer, and which reward it gets."""

import ast
import json
import math
import operator

import pytest

from reft_jax.executor import ExecResult, run_programs, shutdown
from reft_jax.tasks.answers import grade
from reft_jax.tasks.prompts import sft_target
from reft_jax.tasks.registry import PAPER, TASKS
from reft_jax.types import Example, InputError, Verdict


def must_not_run(programs, *, want):
    raise AssertionError("the answer format nl runs no programs")


class Lookup:
    """Stands in for the executor: answers from a table and remembers the calls."""

    def __init__(self, results: dict[str, ExecResult]):
        self.results, self.calls = results, []

    def __call__(self, programs, *, want):
        self.calls.append((want, list(programs)))
        return [self.results[program] for program in programs]


def grade_nl(text: str, item_id: str, answer_value: str) -> Verdict:
    (verdict,) = grade([text], [Example(item_id, "q", answer_value)], "nl", run_programs=must_not_run)
    return verdict


def grade_program(result: ExecResult, item_id: str, answer_value: str) -> Verdict:
    (verdict,) = grade(["p"], [Example(item_id, "q", answer_value)], "python", run_programs=Lookup({"p": result}))
    return verdict


def test_the_dataset_is_the_prefix_up_to_the_first_underscore():
    assert PAPER.of("gsm8k_12").name == "gsm8k"
    assert PAPER.of("mathqa-numeric_12_b").name == "mathqa-numeric"
    assert PAPER.of("mathqa_12").name == "mathqa"
    with pytest.raises(InputError, match="'mathqanumeric_1' names no known dataset; start it with one of gsm8k, svamp"):
        PAPER.of("mathqanumeric_1")


@pytest.mark.parametrize(
    ("value", "answer_value", "correct"),
    [
        (1080.0, "1,080", True),
        (0.01, "0", True),  # the tolerance itself is within
        (230.009, "230.0", True),
        (230.011, "230.0", False),
        (-5.0, "5", False),
        (None, "0", False),
    ],
)
def test_numbers_are_right_within_a_hundredth(value, answer_value, correct):
    assert TASKS["gsm8k"].is_correct(value, answer_value) is correct
    assert TASKS["mathqa-numeric"].is_correct(value, answer_value) is correct


def test_letters_are_right_when_equal():
    assert TASKS["mathqa"].is_correct("a", "a")
    assert not TASKS["mathqa"].is_correct("b", "a")


@pytest.mark.parametrize(
    ("dataset", "answer_value", "target"),
    [
        ("svamp", "1,080,000.5", 1080000.5),
        ("svamp", "1,080", 1080.0),
        ("svamp", "-1,080", -1080.0),
        ("svamp", " 12,345,678 ", 12345678.0),
        ("svamp", "1080", 1080.0),
        ("svamp", "1,5", None),
        ("svamp", "0,5", None),
        ("svamp", "0,500", None),  # half of something, not 500
        ("svamp", "3,4", None),
        ("svamp", "1,08", None),
        ("svamp", "1080,500", None),
        ("svamp", "12,34,567", None),
        ("svamp", "1.080,50", None),
        ("svamp", "1.5,000", None),
        ("svamp", "18,", None),
        ("svamp", ",180", None),
        ("mathqa", "a,", None),
        ("svamp", "1/2", None),
        ("svamp", "a", None),
        ("svamp", "nan", None),
        ("mathqa", "C", "c"),
        ("mathqa", "f", None),
        ("mathqa", "3", None),
        ("mathqa-numeric", "3", 3.0),
    ],
)
def test_targets(dataset, answer_value, target):
    assert TASKS[dataset].target(answer_value) == target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 3 = 5\nTherefore, the answer is: 5.0", Verdict(5.0, True, 1.0, "ok")),
        ("Therefore, the answer is: 4\nNo.\nTherefore, the answer is: 5", Verdict(5.0, True, 1.0, "ok")),
        ("Therefore, the answer is: 5\nNo.\nTherefore, the answer is: 4", Verdict(4.0, False, 0.1, "ok")),
        ("Therefore, the answer is: five", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is: 5 apples", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is: 5,000", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is: nan", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is: -inf", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is:", Verdict(None, False, 0.0, "no_answer")),
        ("Therefore, the answer is <5>.", Verdict(None, False, 0.0, "no_answer")),  # the authors' SVAMP texts say this
        ("5", Verdict(None, False, 0.0, "no_answer")),
    ],
)
def test_nl_number(text, expected):
    assert grade_nl(text, "svamp_0", "5.0") == expected


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("c", Verdict("c", True, 1.0, "ok")),
        (" 'C' ", Verdict("c", True, 1.0, "ok")),
        ("b", Verdict("b", False, 0.1, "ok")),
        ("c)", Verdict(None, False, 0.0, "no_answer")),
        ("ab", Verdict(None, False, 0.0, "no_answer")),
        ("f", Verdict(None, False, 0.0, "no_answer")),
        ("38", Verdict(None, False, 0.0, "no_answer")),
    ],
)
def test_nl_letter(stated, expected):
    assert grade_nl(f"so it is.\nTherefore, the answer is: {stated}", "mathqa_0", "c") == expected


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ExecResult(5.001, "ok"), Verdict(5.001, True, 1.0, "ok")),
        (ExecResult(6.0, "ok"), Verdict(6.0, False, 0.1, "ok")),
        (ExecResult(None, "timeout"), Verdict(None, False, 0.0, "timeout")),
        (ExecResult(None, "error", "NameError"), Verdict(None, False, 0.0, "error")),
        (ExecResult(math.nan, "ok"), Verdict(None, False, 0.0, "not_a_number")),
        (ExecResult(math.inf, "ok"), Verdict(None, False, 0.0, "not_a_number")),
    ],
)
def test_program_number(result, expected):
    assert grade_program(result, "gsm8k_0", "5") == expected


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (ExecResult('" A "', "ok"), Verdict("a", True, 1.0, "ok")),
        (ExecResult("b", "ok"), Verdict("b", False, 0.1, "ok")),
        (ExecResult("none", "ok"), Verdict(None, False, 0.0, "not_a_letter")),
        (ExecResult("38.0", "ok"), Verdict(None, False, 0.0, "not_a_letter")),
        (ExecResult("", "ok"), Verdict(None, False, 0.0, "not_a_letter")),
        (ExecResult(None, "timeout"), Verdict(None, False, 0.0, "timeout")),
    ],
)
def test_program_letter(result, expected):
    assert grade_program(result, "mathqa_0", "a") == expected


def test_one_call_for_numbers_one_for_letters_and_the_order_stays():
    run = Lookup({"n1": ExecResult(1.0, "ok"), "n2": ExecResult(2.0, "ok"), "l1": ExecResult("a", "ok")})
    examples = [Example("mathqa_0", "q", "a"), Example("gsm8k_0", "q", "2"), Example("toy_0", "q", "1")]
    verdicts = grade(["l1", "n2", "n1"], examples, "python", run_programs=run)
    assert sorted(run.calls) == [("number", ["n2", "n1"]), ("text", ["l1"])]
    assert [verdict.value for verdict in verdicts] == ["a", 2.0, 1.0]
    assert all(verdict.correct for verdict in verdicts)


def test_with_the_real_executor():
    programs = [
        "def solution():\n    return '4.0'",
        "def solution():\n    return [4]",
        "def solution():\n    return ' A'",
    ]
    examples = [Example("gsm8k_0", "q", "4"), Example("gsm8k_1", "q", "4"), Example("mathqa_0", "q", "a")]
    try:
        number, no_number, letter = grade(programs, examples, "python", run_programs=run_programs)
    finally:
        shutdown()
    assert number == Verdict(4.0, True, 1.0, "ok")
    assert (no_number.value, no_number.reward) == (None, 0.0)
    assert letter == Verdict("a", True, 1.0, "ok")


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 completions for 1 examples"):
        grade(["", ""], [Example("svamp_0", "q", "1")], "nl", run_programs=must_not_run)
    with pytest.raises(ValueError, match="shorter"):  # the executor lost a result
        grade(["p"], [Example("svamp_0", "q", "1")], "python", run_programs=lambda programs, want: [])


def test_a_broken_executor_is_no_reward_of_zero():
    def broken(programs, *, want):
        raise ConnectionError("executor died")

    with pytest.raises(ConnectionError):
        grade(["p"], [Example("svamp_0", "q", "1")], "python", run_programs=broken)


def test_gold_texts_of_svamp_are_all_correct(shared):
    examples = [Example(**row) for row in json.loads((shared / "data" / "svamp_nl.json").read_text())]
    targets = [sft_target(example, "nl") for example in examples]
    assert {v.reward for v in grade(targets, examples, "nl", run_programs=must_not_run)} == {1.0}


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def interpret(program: str) -> ExecResult:
    """A slow twin of the executor for straight-line programs: assignments of arithmetic, then `return NAME`."""
    names: dict[str, float] = {}

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.Name(id=name):
                return names[name]
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](value(left), value(right))
        raise KeyError(node)

    try:
        for statement in ast.parse(program).body[0].body[1:]:  # after the docstring
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=node):
                    names[name] = value(node)
                case ast.Return(value=node):
                    return ExecResult(float(value(node)), "ok")
                case _:
                    break
    except KeyError:
        pass
    return ExecResult(None, "unsupported")


def test_gold_programs_of_svamp_that_are_plain_arithmetic_are_all_correct(shared):
    examples = [Example(**row) for row in json.loads((shared / "data" / "svamp_python_sdp.json").read_text())]
    verdicts = grade(
        [sft_target(example, "python") for example in examples],
        examples,
        "python",
        run_programs=lambda programs, want: [interpret(program) for program in programs],
    )
    understood = [verdict for verdict in verdicts if verdict.status == "ok"]
    assert len(understood) > 2500
    assert all(verdict.correct for verdict in understood)
