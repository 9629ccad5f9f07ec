"""Official GSM8K rows: how numbers, equations and unknowns are read, and the programs made from them."""

import pytest

from reft_jax.gsm8k_programs.algebra import solved_unknowns
from reft_jax.gsm8k_programs.conversion import Official, convert_row, nl_example, nl_problem
from reft_jax.gsm8k_programs.equations import plain_text, read_steps, to_python
from reft_jax.gsm8k_programs.numbers import read_numbers
from reft_jax.gsm8k_programs.program_rules import stated_numbers
from reft_jax.gsm8k_programs.words import PARTICIPLES, singular
from reft_jax.tasks.datasets import read_rows
from reft_jax.tasks.gsm8k import read_official
from reft_jax.types import Example, InputError


def row(question: str, answer: str) -> Official:
    return Official("gsm8k_0", question, answer, answer.rpartition("####")[2].strip().replace(",", ""))


def body(question: str, answer: str) -> list[str]:
    """The lines of a row's program after its docstring, without `return result`."""
    conversion = convert_row(row(question, answer))
    assert conversion.reason == ""
    head, docstring, *lines, last = conversion.program.split("\n")
    assert (head, docstring, last) == ("def solution():", f'    """{question}"""', "    return result")
    return [line.strip() for line in lines]


NUMBERS = [
    ("1,000 clips", [1000], [1000]),
    ("$2.50 each", [2.5], [2.5]),
    ("25% of them", [25], [25, 0.25]),
    ("1/2 of it", [0.5], [0.5, 1, 2]),
    ("2 1/2 cups", [2.5], [2.5]),
    ("half of it", [0.5], [0.5, 2]),
    ("two dozen eggs", [24], [24, 2, 12]),
    ("thirty-five days", [35], [35]),
    ("two-thirds of it", [2 / 3], [2 / 3]),
    ("a hundred and five", [105], [105]),
    ("$1.5 million", [1500000], [1500000, 1.5]),
    ("50 cents", [50], [50, 0.5]),
    ("four and a half hours", [4.5], [4.5]),
    ("an hour and a half", [1.5], [1.5]),
    ("twice as many", [2], [2]),
    ("a third of it", [1 / 3], [1 / 3, 3]),
    ("the third day", [3], [3]),
    ("½ of it", [0.5], [0.5]),
]


@pytest.mark.parametrize(("text", "values", "stated"), NUMBERS)
def test_numbers_are_read_by_both_readers(text, values, stated):
    """The writer's reader and the rules' reader share no code."""
    mentions = [mention for mention in read_numbers(text) if mention.value != 1]
    assert [mention.value for mention in mentions][: len(values)] == pytest.approx(values)
    for value in stated:
        assert mentions[0].states(value)
        assert any(abs(value - number) < 1e-9 for number in stated_numbers(text))


def test_where_a_number_stands():
    [mention] = read_numbers("She paid $1,250.50, then left.")
    assert "She paid $1,250.50, then left."[mention.start : mention.end] == "$1,250.50"
    assert (mention.value, mention.kind) == (1250.5, "money")


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("5*3", "5*3"),
        ("$5 x 3", "5*3"),
        ("20% of 50", "(20/100)*50"),
        ("3 boxes * $5 per box", "3*5"),
        ("1,200 ÷ 2", "1200/2"),
        ("7(3)", "7*(3)"),
        ("2 1/2 + 1", "2.5+1"),
        ("8 times .05", "8*0.05"),
        ("80 000 - 5", "80000-5"),
        ("3 apples 4", None),
        ("2x + 5", None),
        ("__import__('os')", None),
    ],
)
def test_written_arithmetic(text, python):
    assert to_python(text) == python


def test_steps_are_read_from_marks_and_text_and_must_be_true():
    answer = (
        "Ann sold 48/2 = <<48/2=24>>24 clips.\nA pair costs 3 * $4 = $12.\nWrong: 2+2 = <<2+2=5>>5.\n"
        "Half: 1/2*12=<<6=6>>6 items.\n#### 6"
    )
    found = [(step.expressions[0], step.value, step.line) for step in read_steps(answer)]
    assert found == [("48/2", 24, 0), ("3*4", 12, 1), ("1/2*12", 6, 3)]
    assert plain_text(answer).startswith("Ann sold 48/2 = 24 clips.\n")
    assert "<<" not in plain_text(answer) and "####" not in plain_text(answer)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("Let x be the hens.\nx + (x + 55) = 215\nx = 80", "(215 - 55) / 2"),
        ("Let x be the hens.\nx + 2x + 3x = 120\nx = 20", "120 / (1 + 2 + 3)"),
        ("Let d be the books.\n6d - 8 + d = 69\nd = 11", "(69 + 8) / (6 + 1)"),
        ("Let y be it.\n20(y + 15) = 40y\ny = 15", "20 * 15 / (40 - 20)"),
        ("Let y be it.\ny*y = 16\ny = 4", None),  # not linear
        ("Let y be it.\n2y = 16", None),  # the value is never stated
        ("He has 2 x 3 = 6 and a 5 = 5.", None),
    ],
)
def test_linear_equations_are_solved_in_what_they_state(text, source):
    assert [step.expressions[0] for step in solved_unknowns(f"{text}\n#### 1")] == ([source] if source else [])


def test_forms_of_words():
    assert [PARTICIPLES[word] for word in ("sells", "running", "carries", "bought")] == [
        "sold",
        "run",
        "carried",
        "bought",
    ]
    nouns = "boxes cookies berries people glasses price_of_shoes".split()
    assert [singular(noun) for noun in nouns] == "box cookie berry person glass price_of_shoe".split()


def test_a_program_of_prices():
    assert body(
        "Mia buys 3 boxes of pens for $4 each and a notebook for $2.50. How much does she spend?",
        "The pens cost 3 * $4 = $<<3*4=12>>12.\nMia spends $12 + $2.50 = $<<12+2.5=14.50>>14.50 in all.\n#### 14.50",
    ) == [
        "boxes_of_pens = 3",
        "price_per_pen = 4",
        "notebook_price = 2.5",
        "pens_cost = boxes_of_pens * price_per_pen",
        "total_spent = pens_cost + notebook_price",
        "result = total_spent",
    ]


def test_a_percentage_and_its_rest():
    assert body(
        "A shirt costs $40. There is a 25% discount. What is the price now?",
        "The discount is 40*.25 = $<<40*.25=10>>10.\nSo the shirt costs 40-10 = $<<40-10=30>>30 now.\n#### 30",
    ) == [
        "shirt_price = 40",
        "discount = shirt_price * 0.25",
        "shirt_cost = shirt_price - discount",
        "result = shirt_cost",
    ]
    assert body(
        "A school has 60% girls and 200 boys. How many pupils does the school have?",
        "The boys are 100 - 60 = <<100-60=40>>40% of the pupils.\n"
        "The school has 200 / .40 = <<200/.4=500>>500 pupils.\n#### 500",
    ) == [
        "boys = 200",
        "boys_percent = 100 - 60",
        "pupils = boys / (boys_percent / 100)",
        "result = pupils",
    ]


def test_an_unknown():
    assert body(
        "Ann and Ben have 215 marbles. Ben has 55 more marbles than Ann. How many marbles does Ann have?",
        "Let x be the number of marbles Ann has.\nx + (x + 55) = 215\n2x = 160\nx = 80\n#### 80",
    ) == [
        "marbles = 215",
        "extra_marbles = 55",
        "ann_marbles = (marbles - extra_marbles) / 2",
        "result = ann_marbles",
    ]


def test_equations_without_marks_dozens_and_what_is_not_needed():
    assert body(
        "Zoe is 30 years old. She bought two dozen eggs and used 7 of them. How many eggs are left?",
        "She bought 2 x 12 = 24 eggs.\nIn 5 years she will be 30 + 5 = 35.\nShe has 24 - 7 = 17 eggs left.\n#### 17",
    ) == [
        "eggs_used = 7",
        "eggs_bought = 2 * 12",
        "eggs_left = eggs_bought - eggs_used",
        "result = eggs_left",
    ]


def test_endings_that_round_or_give_a_percentage():
    lines = body(
        "Eggs come in boxes of 6. Joe needs 20 eggs. How many boxes must he buy?",
        "Joe needs 20/6 = <<20/6=3.33>>3.33 boxes, so he buys a whole number of 4 boxes.\n#### 4",
    )
    assert lines[-2:] == ["joe_boxes = math.ceil(boxes_needed)", "result = joe_boxes"]
    lines = body(
        "Kim read 30 of 40 pages. What percentage of the pages is that?",
        "Kim read 30/40 = <<30/40=.75>>.75 of the pages, which is 75%.\n#### 75",
    )
    assert lines[-2:] == ["percentage = share_of_pages * 100", "result = percentage"]


def test_a_number_worked_out_in_the_head_is_derived():
    lines = body(
        "Tim hikes 20 miles and has done 15 miles. It takes 2 hours a mile. How long will the rest take?",
        "For the remaining 5 miles he needs 5 * 2 = <<5*2=10>>10 hours.\n#### 10",
    )
    assert any(" - " in line for line in lines)
    assert not any("5 " in line.partition("=")[2] and "15" not in line for line in lines)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Kim has 3 cats. How many legs?", "They have 7 + 5 = <<7+5=12>>12 legs.\n#### 12", "a number from nowhere"),
        ("Kim has 3 cats. How many?", "She has 3 + 3 = <<3+3=6>>6.\n#### 7", "no equation gives the final answer"),
        ("Kim has 3 cats. How many?", "She has them all.\n#### 3", "no equation in the solution"),
        ('Kim has 3 cats and 4 dogs "?"', "3 + 4 = <<3+4=7>>7\n#### 7", "a docstring cannot hold the question"),
    ],
)
def test_nothing_is_guessed(question, answer, reason):
    assert convert_row(row(question, answer)) == (None, reason)


def test_programs_do_not_depend_on_the_order_of_rows():
    question, answer = "Ann has 5 red and 7 blue pens. How many pens?", "5+7 = <<5+7=12>>12 pens.\n#### 12"
    once = convert_row(row(question, answer))
    convert_row(row("Ben has 3 cats. How many legs?", "3*4 = <<3*4=12>>12 legs.\n#### 12"))
    assert convert_row(row(question, answer)) == once


def test_the_text_engine():
    official = row("How many?", "48/2 = <<48/2=24>>24 clips.\nSum <<24+48=72>>72.\n#### 1,072")
    assert nl_example(official) == Example("gsm8k_0", "How many?", "1072", "48/2 = 24 clips.\nSum 72.")
    assert nl_problem(nl_example(official)) == ""
    assert nl_problem(nl_example(row("How many?", "#### 3"))) == "no solution before '####'"
    assert "mark" in nl_problem(nl_example(row("How many?", "1+1 = <<1+1=2 clips.\n#### 2")))


def test_official_rows_are_read(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": " Q? ", "answer": "1+1 = <<1+1=2>>2\\n#### 1,002 "}\n\n')
    [official] = read_official(str(path), read_rows(str(path)))
    assert official == Official("gsm8k_0", "Q?", "1+1 = <<1+1=2>>2\n#### 1,002", "1002")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q?"}', "line 3, field 'answer': is missing"),
        ('{"question": "", "answer": "1\\n#### 1"}', "line 3, field 'question': is blank"),
        ('{"question": "Q?", "answer": "1"}', "line 3, field 'answer': does not end in '#### ' and a number"),
        ('{"question": "Q?", "answer": "1 #### one"}', "line 3, field 'answer': does not end"),
        ("[1]", "line 3 is not an object"),
    ],
)
def test_a_row_that_is_no_official_row(tmp_path, line, message):
    path = tmp_path / "train.jsonl"
    path.write_text(f'{{"question": "Q?", "answer": "1\\n#### 1"}}\n\n{line}\n')
    with pytest.raises(InputError, match="train.jsonl: ") as raised:
        read_official(str(path), read_rows(str(path)))
    assert message in str(raised.value)
