"""The rules of converted programs refuse what breaks them, one rule at a time."""

import pytest

from reft_jax.gsm8k_programs.program_rules import broken_rules

QUESTION = "Ann had 12 apples, ate 25% of them and bought twice as many pears as she had left. How many pears?"
ANSWER = (
    "She ate 12*.25 = <<12*.25=3>>3 apples.\nShe had 12-3 = <<12-3=9>>9 apples left.\n"
    "In 60 minutes she bought 9*2 = <<9*2=18>>18 pears.\n#### 18"
)
GOOD = f'''def solution():
    """{QUESTION}"""
    apples = 12
    apples_eaten = apples * 0.25
    apples_left = apples - apples_eaten
    pears_bought = apples_left * 2
    result = pears_bought
    return result'''


def check(*replacements: tuple[str, str]) -> list[str]:
    program = GOOD
    for old, new in replacements:
        assert old in program
        program = program.replace(old, new)
    return broken_rules(program, QUESTION, ANSWER)


def test_a_good_program():
    assert check() == []
    assert check(("apples * 0.25", "apples * 25 / 100")) == []
    assert check(("apples_left * 2", "apples_left * (60 / 60) * 2")) == []  # a constant that the solution introduces
    assert check(("apples_eaten", "eaten"), ("pears_bought", "total_pears")) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("apples_left * 2", "apples_left + 7 + 2", "7 is neither in the question nor a well-known constant"),
        ("apples_left * 2", "9 * apples_left / 9 * 2", "9 is a result, and the question does not state it"),
        ("apples_eaten = apples * 0.25", "apples_eaten = 3", "3 is a result"),
        ("result = pears_bought", "result = pears_bought * 18 / 18", "18 is a result"),
        ("result = pears_bought", "result = 18", "`result` is not computed"),
        ("pears_bought", "step_1", "`step_1` is not a valid name"),
        ("pears_bought", "x1", "`x1` is not a valid name"),
        ("pears_bought", "step", "`step` means nothing"),
        ("pears_bought", "value", "`value` means nothing"),
        ("pears_bought", "p", "`p` means nothing"),
        ("pears_bought", "sum", "`sum` is not a valid name"),
        ("pears_bought", "PearsBought", "`PearsBought` is not a valid name"),
        ("pears_bought", "dragons_bought", "`dragons_bought` is not from the text"),
        ("apples_left", "apples", "a name is assigned twice"),
        ("apples = 12", "apples = 12\n    pears = 2", "`pears` is never used"),
        ("apples = 12", "apples = pears_bought", "`pears_bought` is used before it is assigned"),
        ("apples = 12", "apples = '12'", "'12' is not a number"),
        (f'    """{QUESTION}"""\n', "", "the docstring is not the question"),
        ("How many pears?", "How many?", "the docstring is not the question"),
        ("    return result", "    return pears_bought", "does not end in `return result`"),
        ("apples = 12", "apples = 12\n    if apples: pass", "not one assignment per step"),
        ("def solution():", "import os\ndef solution():", "not one function `solution`"),
        ("def solution():", "def answer():", "not one function `solution`"),
        ("apples = 12", "apples = = 12", "not Python"),
    ],
)
def test_what_is_refused(old, new, problem):
    problems = check((old, new))
    assert any(found.startswith(problem) for found in problems), problems


def test_a_constant_needs_its_words():
    program = GOOD.replace("apples_left * 2", "apples_left * (365 / 365) * 2")
    assert broken_rules(program, QUESTION, ANSWER) != []
    assert broken_rules(program, QUESTION, ANSWER.replace("In 60 minutes", "In a year")) == []


def test_a_number_in_a_mark_alone_is_no_statement():
    """In the solution 5 occurs only as a result, in a mark and in the text."""
    answer = ANSWER.replace("In 60 minutes", "She had 3+2 = <<3+2=5>>5 plums, and")
    assert "5 is a result, and the question does not state it" in broken_rules(
        GOOD.replace("apples_left * 2", "apples_left * (5 / 5) * 2"), QUESTION, answer
    )
