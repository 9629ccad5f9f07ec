"""The prompt strings, character by character, and that a row's text can be split again."""

import json

import pytest

from reft_jax.tasks.prompts import completion_text, forced_prefix, prompt_text, rollout_prompt, sft_target
from reft_jax.types import Example, InputError

QUESTION = "  How many are 2 and 3?\n"
PROGRAM = 'def solution():\n    """How many are 2 and 3?"""\n    return 2 + 3'
PYTHON = Example("svamp_0", QUESTION, "5.0", PROGRAM)
NL = Example("svamp_0", QUESTION, " 5.0 ", "2 and 3 are 5.\n")


def test_the_strings_exactly():
    assert prompt_text(QUESTION) == "Question:\nHow many are 2 and 3?\nAnswer reasoning:\n"
    assert forced_prefix(QUESTION, "python") == 'def solution():\n    """How many are 2 and 3?"""\n'
    assert forced_prefix(QUESTION, "nl") == ""
    assert rollout_prompt(QUESTION, "python") == (
        'Question:\nHow many are 2 and 3?\nAnswer reasoning:\ndef solution():\n    """How many are 2 and 3?"""\n'
    )
    assert rollout_prompt(QUESTION, "nl") == prompt_text(QUESTION)
    assert sft_target(PYTHON, "python") == PROGRAM
    assert sft_target(NL, "nl") == "2 and 3 are 5.\nTherefore, the answer is: 5.0"


def test_braces_in_a_question_are_text():
    assert prompt_text("{x} of {0}?") == "Question:\n{x} of {0}?\nAnswer reasoning:\n"
    assert forced_prefix("{x} of {0}?", "python") == 'def solution():\n    """{x} of {0}?"""\n'


@pytest.mark.parametrize(("example", "answer_format"), [(PYTHON, "nl"), (NL, "python")])
def test_a_solution_of_the_other_answer_format_is_refused(example, answer_format):
    with pytest.raises(InputError, match=f"svamp_0: .*the answer format is {answer_format}"):
        sft_target(example, answer_format)


def test_completion_is_what_follows_the_last_reasoning_line():
    row = rollout_prompt(QUESTION, "python") + "    return 2 + 3\n"
    assert completion_text(row) == PROGRAM  # the inner indent stays, the outer whitespace goes
    tricky = prompt_text("Which word follows this?\nAnswer reasoning:\nNone") + "none"
    assert completion_text(tricky) == "none"


def test_gold_rows_of_svamp_come_apart_again(shared):
    for file, answer_format in (("svamp_python_sdp.json", "python"), ("svamp_nl.json", "nl")):
        for row in json.loads((shared / "data" / file).read_text()):
            target = sft_target(Example(**row), answer_format)
            assert completion_text(prompt_text(row["question"]) + target) == target
