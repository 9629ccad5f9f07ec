"""Questions that no completion can answer: found with a real tokenizer, graded by the executor."""

import ast

import pytest

from reft_jax import executor
from reft_jax.tasks.answerable import can_begin_program, trainable, unanswerable, unteachable, wrong_anyway
from reft_jax.tasks.answers import grade
from reft_jax.tasks.datasets import named
from reft_jax.tasks.prompts import docstring, forced_prefix, make_prompter, sft_target
from reft_jax.tasks.registry import PAPER
from reft_jax.tasks.tokenizer import decode, train_bpe
from reft_jax.types import Example, InputError

ESCAPED = [  # each is a question after whose plain docstring no program can follow
    'Tom said "I have 3"',
    'He asks """how many"""?',
    "Read C:\\users\\tom: 3 files?",
    "Find \\underline{x} if x = 3",
    "Let \\xi = 3. What is \\xi?",
    "\\N{nothing}?",
    "ends in a backslash \\",
    '"',
    '"""',
    'a """\n    return 5\n    """ b',
]
PLAIN = [
    "Plain: 3?",
    'compiles \\"',
    "A \\frac{6}{2} of \\d it?",
    'He said "3" to me?',
    "'''3'''",
    "two\nlines?",
    "é\u2028🍎?",
]
HOPELESS = ["a\0b?", "Which word?\nAnswer reasoning:\nNone of 3?"]


def examples(questions: list[str]) -> list[Example]:
    return [Example(f"gsm8k_{i}", question, "3") for i, question in enumerate(questions)]


@pytest.fixture(scope="module")
def prompter():
    return make_prompter(train_bpe([forced_prefix("How many are 3?", "python")], 300))


@pytest.mark.parametrize("question", ESCAPED)
def test_a_question_that_breaks_a_docstring_is_escaped_and_reads_as_it_was(question):
    assert not can_begin_program(f'def solution():\n    """{question}"""')
    assert ast.literal_eval(docstring(question)) == question


@pytest.mark.parametrize("question", PLAIN)
def test_every_other_question_stands_as_in_the_papers_code(question):
    assert forced_prefix(f" {question}\n", "python") == f'def solution():\n    """{question}"""\n'


def test_a_right_body_earns_the_reward_after_each_of_them():
    questions = ESCAPED + PLAIN
    programs = [forced_prefix(question, "python") + "    return 3" for question in questions]
    verdicts = grade(programs, examples(questions), "python", run_programs=executor.run_programs)
    assert [verdict.reward for verdict in verdicts] == [1.0] * len(questions)


def test_the_worked_solution_is_taught_with_the_docstring_that_a_rollout_begins_with():
    plain, escaped = (
        'def solution():\n    """ends in "it\\""""\n    return 3',
        'def solution():\n    """x"""\n    return 3',
    )
    assert sft_target(Example("gsm8k_0", 'ends in "it"', "3", plain), "python") == plain  # escaped already
    broken = 'def solution():\n    """ends in "it""""\n    return 3'
    assert sft_target(Example("gsm8k_0", 'ends in "it"', "3", broken), "python").startswith(
        forced_prefix('ends in "it"', "python")
    )
    assert sft_target(Example("gsm8k_0", "another question", "3", escaped), "python") == escaped


def test_what_cannot_be_escaped_is_named(prompter):
    asked = examples(ESCAPED + PLAIN + HOPELESS)
    hopeless = {one.item_id: "no program compiles after the question" for one in asked if one.question in HOPELESS}
    assert unanswerable(prompter, asked, 999) == hopeless and len(hopeless) == 2
    assert unanswerable(make_prompter(prompter.tok, "nl"), asked, 999) == {}
    told = wrong_anyway(prompter, asked, 999, "test")
    assert told == (
        "2 of 19 test questions cannot be answered and count as wrong: gsm8k_17, gsm8k_18 (no program compiles after "
        "the question)"
    )
    assert wrong_anyway(prompter, asked[:3], 999, "test") == ""


def test_a_tokenizer_that_changes_quotes_makes_a_question_unanswerable(prompter, monkeypatch):
    """What counts is the text that grading sees, decoded from ids."""
    from reft_jax.tasks import prompts as module

    monkeypatch.setattr(module, "decode", lambda tok, ids: decode(tok, ids).replace('\\"', '"'))
    assert list(unanswerable(prompter, examples(['says "3"', "3?"]), 999)) == ["gsm8k_0"]


def test_a_question_that_leaves_no_room_is_named(prompter):
    asked = examples(["3?", "so " * 50 + "3?"])
    length = len(prompter.prompt(asked[1].question))
    assert unanswerable(prompter, asked, length + 1) == {}
    assert unanswerable(prompter, asked, length) == {"gsm8k_1": "the question leaves no token for an answer"}


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ('def solution():\n    """q"""', True),
        ('def solution():\n    """q"""\n    return 5\n    """"""', False),  # always 5
        ('def solve():\n    """q"""', False),
        ("def solution():\n    q", False),
        ("", False),
    ],
)
def test_what_a_program_can_begin_with(text, begins):
    assert can_begin_program(text) == begins


def test_rows_that_teach_nothing_are_left_out_of_training_and_named(prompter, capsys):
    good = [Example(f"svamp_{i}", f"{i}?", "3", f'def solution():\n    """{i}?"""\n    return 3') for i in range(8)]
    rows = [
        *good,
        Example("svamp_8", "8?", "3", "def solution():\n    return 3 apples"),
        Example("svamp_9", HOPELESS[1], "3", "def solution():\n    return 3"),
    ]
    assert unteachable(rows, "python") == {"svamp_8": "answer_cot is not Python"}
    assert trainable(prompter, rows, 0.2, "data.train=x.json") == good
    assert capsys.readouterr().out == (
        "data.train=x.json: 2 of 10 rows cannot earn a reward or be taught: svamp_8 (answer_cot is not Python); "
        "svamp_9 (no program compiles after the question); they are left out of training\n"
    )
    assert trainable(prompter, good, 0.0, "x") == good and capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"2 of 10 rows .*; at most 10\.0% \(data\.max_dropped\) may be left out"):
        trainable(prompter, rows, 0.1, "data.train=x.json")


def test_a_file_of_the_other_answer_format_is_named_with_its_file(prompter):
    rows = [Example("svamp_0", "3?", "3", "It is 3.")]
    with pytest.raises(InputError, match=r"^data\.train=x\.json: svamp_0: answer_cot is not a program"):
        trainable(prompter, rows, 0.2, "data.train=x.json")


def test_a_line_names_eight_items_of_a_reason():
    assert named({f"a_{i}": "why" for i in range(9)}) == f"{', '.join(f'a_{i}' for i in range(8))}, … (why)"


@pytest.mark.parametrize(
    ("item_id", "value"),
    [
        *[("gsm8k_0", v) for v in ("1,080", " -1,080.50 ", "+12,345,678", "18 ", "1e3", "1_080", ".5", "018")],
        ("mathqa_0", "A"),
        ("mathqa_0", "'c' "),
    ],
)
def test_an_nl_target_is_taught_as_it_is_graded(item_id, value):
    """The last line of what SFT teaches, read by the function that rewards it."""
    example = Example(item_id, "q", value, "Some steps.")
    [verdict] = grade([sft_target(example, "nl")], [example], "nl", run_programs=None)
    assert verdict.reward == 1.0 and PAPER.of(example.item_id).stated(sft_target(example, "nl"))[1] == "ok"
