"""The toy word problems: always the same, correct by a second calculation, with annotations as requested.

Not covered: whether a model learns from them, and how natural the wording is; read some to judge that.
"""

import hashlib
import json
import random
import re
from collections import Counter

import pytest

from reft_jax.tasks import prompts
from reft_jax.tasks.registry import PAPER
from reft_jax.toy import problems as synthetic
from reft_jax.toy.families import DISTRACTORS, FAMILIES
from reft_jax.toy.problems import DISTRACTED_SHARE, SKIPPED_STYLES, STYLES, make_problems, make_split
from reft_jax.types import InputError

ROWS = 1000
SKIPPED_SHARE = 0.3

# The answers once more, straight from the numbers of the question.
ANSWERS = {
    "gain": lambda a, b: a + b,
    "loss": lambda a, b: a - b,
    "groups": lambda a, b: a * b,
    "share": lambda a, b: a / b,
    "groups_loss": lambda a, b, c: a * b - c,
    "two_prices": lambda a, b, c, d: a * b + c * d,
    "change": lambda a, b, c: c - a * b,
    "wages": lambda a, b, c: a * b * c,
    "more_together": lambda a, b: 2 * a + b,
    "times_together": lambda a, b: a + a * b,
    "remove_share": lambda a, b, c: (a - b) / c,
    "half_then": lambda a, b: a / 2 + b,
    "same_price": lambda a, b, c: (a + b) * c,
    "discount": lambda a, b: a * (100 - b) / 100,
    "minutes": lambda a, b: a * 60 / b,
    "dozen": lambda a, b: 12 * a - b,
    "twice_fewer": lambda a, b: a + 2 * a + (2 * a - b),
    "quarter_sold": lambda a, b, c: a * b * 3 / 4 * c,
}

# Numbers that a good program may use though no digit of the question shows them.
CONSTANTS = {
    "1": "the share that `n times as many` comes on top of",
    "2": "half, twice, double",
    "3": "three quarters, what a quarter leaves",
    "4": "a quarter",
    "12": "a dozen",
    "60": "minutes in an hour",
    "100": "percent",
}

# One of the irrelevant sentences, whatever fills its slots; it is never the last sentence.
DISTRACTOR = re.compile("|".join(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(text)) + " " for text, _, _ in DISTRACTORS))


@pytest.fixture(scope="module", params=["python", "nl"])
def answer_format(request):
    return request.param


@pytest.fixture(scope="module")
def problems(answer_format):
    return make_problems(0, "train", ROWS, answer_format, SKIPPED_SHARE)


@pytest.fixture(scope="module")
def programs():
    return make_problems(0, "train", ROWS, "python", SKIPPED_SHARE)


@pytest.fixture(scope="module")
def texts():
    return make_problems(0, "train", ROWS, "nl", SKIPPED_SHARE)


def run_program(program):
    scope = {}
    exec(program, scope)
    return scope["solution"]()


def body(problem):
    return problem.example.answer_cot.removeprefix(prompts.forced_prefix(problem.example.question, "python"))


def numerals(text):
    return set(re.findall(r"\b\d+\b", text))


@pytest.mark.parametrize(
    ("answer_format", "digest"),
    [
        ("python", "c0d9fa3410a186b6"),
        ("nl", "e488bdad71d5b781"),
    ],
)
def test_rows_are_the_same_everywhere(answer_format, digest):
    rows = [problem.example for problem in make_problems(0, "train", 200, answer_format, SKIPPED_SHARE)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == digest


def test_fewer_rows_are_the_first_of_more_rows(answer_format, problems):
    assert make_problems(0, "train", 50, answer_format, SKIPPED_SHARE) == problems[:50]
    assert [problem.example.item_id for problem in problems[:3]] == ["toy_0", "toy_1", "toy_2"]
    assert make_split(0, "train", 50, answer_format=answer_format, skipped_share=SKIPPED_SHARE) == [
        p.example for p in problems[:50]
    ]


@pytest.fixture
def small_world(monkeypatch):
    """Few enough questions (3 people, 3 things, 11 x 18 numbers) that splits would meet unless kept apart."""
    groups = next(family for family in FAMILIES if family.name == "groups")
    monkeypatch.setattr(synthetic, "FAMILIES", (groups._replace(questions=groups.questions[:1]),))
    for table in ("PEOPLE", "THINGS"):
        monkeypatch.setattr(synthetic, table, getattr(synthetic, table)[:3])
    monkeypatch.setattr(synthetic, "CONTAINERS", synthetic.CONTAINERS[:1])


def questions(seed, split, rows):
    return [example.question for example in make_split(seed, split, rows, answer_format="python", skipped_share=0)]


def test_splits_share_no_question_even_across_seeds(small_world):
    train, dev, test = (
        [DISTRACTOR.sub("", question) for seed in (0, 1) for question in questions(seed, split, rows)]
        for split, rows in (("train", 700), ("dev", 100), ("test", 100))
    )
    assert not set(train) & set(dev)
    assert not set(train) & set(test), "a train question with a sentence about the weather is no test question either"
    assert not set(dev) & set(test)


def test_no_question_stands_twice(small_world):
    rows = [DISTRACTOR.sub("", question) for question in questions(0, "train", 700)]
    assert len(set(rows)) == 700


def test_seeds_and_splits_have_their_own_questions():
    drawn = [
        question for seed in (0, 1) for split in ("train", "dev", "test") for question in questions(seed, split, 20)
    ]
    assert len(set(drawn)) == 120


def test_only_train_has_annotations():
    assert all(e.answer_cot for e in make_split(0, "train", 20, answer_format="nl", skipped_share=0))
    for split in ("dev", "test"):
        assert all(e.answer_cot is None for e in make_split(0, split, 20, answer_format="nl", skipped_share=0))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_way_to_solve_a_family_gives_the_answer(family):
    between = random.Random(0).randint
    for _ in range(300):
        numbers = family.numbers(between)
        assert min(numbers.values()) >= 2, "a plural would be wrong"
        answer = ANSWERS[family.name](**numbers)
        assert answer == int(answer) > 0
        for solution in family.solutions:
            known = {name.strip("{}"): numbers[letter] for name, letter in family.given.items()}
            for step in solution:
                value = eval(step.expression.replace("{", "").replace("}", ""), {}, known)
                assert value == int(value) >= 0, f"{step.expression} gives {value}"
                known[step.name.strip("{}")] = value
            assert known["result"] == answer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_paraphrase_states_every_number(family):
    assert len(family.questions) >= 4
    for question in family.questions:
        assert set(re.findall(r"\{([a-d])\}", question)) == set(family.given.values())


def test_programs_compute_the_answer_skipped_or_not(programs):
    for example, *_ in programs:
        value = run_program(example.answer_cot)
        assert float(value) == int(example.answer_value) >= 0, example.answer_cot


def test_programs_begin_with_the_forced_prefix_and_are_assignments(programs):
    for problem in programs:
        example = problem.example
        assert example.answer_cot.startswith(prompts.forced_prefix(example.question, "python"))
        assert prompts.sft_target(example, "python") == example.answer_cot
        *assignments, last = body(problem).split("\n")
        assert last == "    return result"
        assert all(re.fullmatch(r"    [a-z_]+ = \S.*", line) for line in assignments)
        assert assignments[-1].startswith("    result = ")


def test_text_solutions_reach_the_answer_and_leave_the_phrase_to_the_prompt(texts):
    for example, _, style, _ in texts:
        assert PAPER.phrase.strip() not in example.answer_cot
        assert prompts.sft_target(example, "nl").endswith(f"\nTherefore, the answer is: {example.answer_value}")
        lines = example.answer_cot.split("\n")
        assert all(line[0] == line[0].upper() and line.endswith(".") for line in lines)
        assert example.answer_value in numerals(lines[-1])
        equations = re.findall(r"([\d(][\d+*/() -]*) = (\d+)", example.answer_cot)
        assert all(eval(left) == int(right) for left, right in equations)
        expected = {"nested": 1, "skips_steps": 1, "skips_all": 0}.get(style, len(lines))
        assert len(equations) == expected, example.answer_cot


def test_good_programs_use_only_numbers_of_the_question_and_named_constants(programs):
    for problem in programs:
        unexplained = numerals(body(problem)) - numerals(problem.example.question) - CONSTANTS.keys()
        assert problem.skipped or not unexplained, problem.example.answer_cot


def test_skipped_programs_write_a_computed_value_down(programs):
    """`result = 22`, or `cost = 22` before a last step that is still shown."""
    for problem in (problem for problem in programs if problem.skipped):
        *assignments, last, _ = body(problem).split("\n")
        if problem.style == "skips_all":
            assert last.strip() == f"result = {problem.example.answer_value}"
        else:
            assert re.search(r"[-+*/]", last)
        assert not any(re.search(r"[-+*/]", line) for line in assignments)


def test_share_of_skipped_annotations_is_as_asked():
    for share in (0.0, 0.3, 1.0):
        problems = make_problems(0, "train", ROWS, "python", share)
        noise = 4 * (share * (1 - share) / ROWS) ** 0.5
        assert abs(sum(problem.skipped for problem in problems) / ROWS - share) <= noise
        assert all((problem.style in SKIPPED_STYLES) == problem.skipped for problem in problems)


def test_half_of_the_skipped_solutions_of_several_steps_keep_the_last_step():
    problems = make_problems(0, "train", ROWS, "python", 1.0)
    one_step = {family.name for family in FAMILIES if len(family.solutions[0]) == 1}
    assert {problem.style for problem in problems if problem.family in one_step} == {"skips_all"}
    longer = [problem.style == "skips_steps" for problem in problems if problem.family not in one_step]
    assert abs(sum(longer) / len(longer) - 0.5) < 4 * 0.5 / len(longer) ** 0.5


def test_skipped_share_changes_nothing_but_the_skipped_annotations(answer_format, problems):
    clean = make_problems(0, "train", ROWS, answer_format, 0.0)
    more = make_problems(0, "train", ROWS, answer_format, 0.6)
    for good, some, many in zip(clean, problems, more, strict=True):
        assert good.example[:3] == some.example[:3] == many.example[:3]
        assert some == (many if some.skipped else good)


def test_answer_format_changes_annotations_only(programs, texts):
    assert [p.example[:3] for p in programs] == [p.example[:3] for p in texts]


def test_families_and_styles_all_occur_about_equally(answer_format, problems):
    families = Counter(problem.family for problem in problems)
    assert families.keys() == ANSWERS.keys()
    assert min(families.values()) > 0.6 * ROWS / len(FAMILIES)
    styles = Counter(problem.style for problem in problems if not problem.skipped)
    assert styles.keys() == set(STYLES[answer_format])
    assert min(styles.values()) > 0.8 * styles.total() / len(STYLES[answer_format])


def test_wording_is_clean_and_compact(programs):
    distracted = 0
    for example, *_ in programs:
        question = example.question
        assert question[0].isupper() and question.endswith("?") and len(question.split()) <= 35
        assert not re.search(r'[{}"\\]|  | 1 \w+s\b|\ba [aeiou]', question), question
        distracted += bool(DISTRACTOR.search(question))
    assert abs(distracted / ROWS - DISTRACTED_SHARE) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "valid"}, "no split 'valid'; use one of train, dev, test"),
        ({"answer_format": "sql"}, "no answer format 'sql'; use one of python, nl"),
        ({"rows": -1}, "-1 rows; use 0 or more"),
        ({"skipped_share": 1.5}, "skipped_share is 1.5; use a number from 0 to 1"),
    ],
)
def test_bad_requests_are_refused(change, message):
    request = {"seed": 0, "split": "train", "rows": 1, "answer_format": "python", "skipped_share": 0.0} | change
    with pytest.raises(InputError, match=re.escape(message)):
        make_problems(**request)
