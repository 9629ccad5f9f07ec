"""The lenient reading: what a careful person reads, and no answer where two things could be meant."""

import ast
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_jax import executor
from reft_jax.config import check_config, default_config
from reft_jax.run.inputs import load_data
from reft_jax.tasks import readings
from reft_jax.tasks.answers import grade
from reft_jax.tasks.registry import PAPER, TASKS, load_task
from reft_jax.types import Example, InputError, Verdict

LENIENT = load_task("", "lenient")
READ = {
    18: r"18 18. 018 +18 (18) $18 18$ US$18 €18 \$18 18¢ \boxed{18} $\boxed{18}$ **18** `18` '18' <18> 18</s> ~18",
    1080: "1,080 1080 $1,080 1'080 1_080 1,080.00 ١٠٨٠ １０８０",
    50: r"50% 50\%",
    0.5: r"1/2 ½ .5 0,5 \frac{1}{2} $\frac{1}{2}$ 0.5%",
    -5: "-$5 $-5 −5 –5 -5",
    1024: "2**10 2^10 1024km 1024th",
}
LINES = {
    18: [
        " 18\n",
        "18 apples",
        "18 km/h",
        "x = 18",
        "12 + 6 = 18",
        "about 18",
        "The answer is 18.",
        "18.\n\nQuestion: 3",
    ],
    1080: ["1 080", "1\u00a0080", "a total of 1,080 dollars"],
    1.5: ["1 1/2 cups", "1½"],
    1500: ["1.5 x 10^3", r"1.5 \times 10^{3}", "1.5 thousand", "1.5k"],
    12: ["a dozen", "twelve", "2*6", "sqrt(144)"],
    1 / 3: ["0.333..."],
    105: ["one hundred and five"],
}
# Two numbers, or one that can be two, or none.
NO_ANSWER = [
    "3,4",
    "3, 4",
    "3 and 4",
    "2 or 3",
    "3-4",
    "7:30",
    "1:2",
    "1,08",
    "1.5.2",
    "5/6/2024",
    "x = 3, y = 4",
    "0x10",
]
NO_ANSWER += ["", "nan", "inf", "None", "True", "no answer", "1e400", "9" * 400, "1/0", "less than 18", "x < 18", "1,5"]
NO_ANSWER += [
    "18 hours 30 minutes",
    "18 or more",
    "two thousand five hundred",
    "three and four",
    "5 crore",
    "one of them",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [(text, value) for value, texts in READ.items() for text in texts.split() if text != "0.5%"]
    + [(text, value) for value, texts in LINES.items() for text in texts]
    + [(text, None) for text in NO_ANSWER]
    + [("0.5%", 0.5)],
)
def test_a_number(text, value):
    assert readings.number(text) == (value if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(
            (text, "b")
            for text in ("b", "B", "(b)", "b)", "b) 38 apples", "**b**", r"\boxed{B}", "option b", "'b'", "b.")
        ),
        *((text, None) for text in ("", "f", "a or b", "a, b", "ab", "38", "b 38", "a apple")),
    ],
)
def test_a_letter(text, letter):
    assert readings.letter(text) == letter


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**15), 10**15))
def test_what_is_read_strictly_is_read_leniently(number):
    assert readings.number(repr(number)) == float(number) == TASKS["gsm8k"].read(repr(number))


@given(st.text(alphabet="0123456789 ,.-+*/^=()$%{}\\abekxM½…'<>\n", max_size=20))
def test_no_text_is_an_error(text):
    value = readings.number(text)
    assert value is None or math.isfinite(value)


def test_what_a_person_reads_in_135_strings(shared):
    """All but "1,5": one and a half, or a list, as in "3,4"."""
    file = shared / "cases" / "runs" / "grading.py"
    if not file.exists():
        pytest.skip(f"no table of strings at {file}")
    table = next(one for one in ast.parse(file.read_text()).body if isinstance(one, ast.Assign))
    strings = eval(compile(ast.Expression(table.value), file, "eval"))
    found = {text: readings.number(text) for text, _ in strings}
    other = {
        text
        for text, person in strings
        if (found[text] is None) != (person is None) or (person and found[text] != pytest.approx(person, rel=1e-5))
    }
    assert len(strings) == 135 and other == {"1,5"}


def nl(text: str, answer: str = "18", task=LENIENT, item: str = "gsm8k_1") -> Verdict:
    [verdict] = grade([text], [Example(item, "q", answer)], "nl", task, run_programs=None)
    return verdict


def test_a_text_is_read_after_the_phrase_or_where_it_is_boxed():
    assert nl("So 5.\nTherefore, the answer is: $18.") == Verdict(18.0, True, 1.0, "ok")
    assert nl(r"So \boxed{3}, no, $\boxed{18}$.") == nl("#### 18") == Verdict(18.0, True, 1.0, "ok")
    assert nl("Therefore, the answer is: 17 or 18") == nl("It is 18.") == Verdict(None, False, 0.0, "no_answer")
    assert nl("Therefore, the answer is: (C) 38", "c", item="mathqa_1") == Verdict("c", True, 1.0, "ok")


def test_the_default_reads_strictly():
    for text in ("$18", "18 apples", "1,080", r"\boxed{18}", "1/2"):
        assert nl(f"Therefore, the answer is: {text}", task=PAPER).value is None
    assert nl(r"\boxed{18}", task=load_task("svamp")).value is None
    assert check_config(settings()).data.reading == "strict"


def settings(**changes):
    config = default_config()
    config.model.path, config.data.train, config.data.test = "toy", "toy", "toy"
    config.update_from_flattened_dict(changes)
    return config


def test_programs_return_texts_that_are_read(fresh):
    returned = {
        "18": 18.0,
        "'$18'": 18.0,
        "'1,080'": 1080.0,
        "1/3": 1 / 3,
        "[18]": None,
        "'3, 4'": None,
        "10**30": 1e30,
    }
    programs = [f"def solution():\n    return {one}" for one in returned]
    examples = [Example("gsm8k_1", "q", "18")] * len(programs)
    verdicts = grade(programs, examples, "python", LENIENT, run_programs=executor.run_programs)
    assert [verdict.value for verdict in verdicts] == list(returned.values())
    assert verdicts[0].correct and verdicts[4].status == "not_a_number"
    strict = grade(programs, examples, "python", PAPER, run_programs=executor.run_programs)
    assert [verdict.value for verdict in strict] == [18.0, None, None, 1 / 3, None, None, 1e30]


def test_a_target_is_read_strictly_whatever_the_reading():
    assert LENIENT.of("gsm8k_1").target("$18") is None and LENIENT.of("gsm8k_1").target("1,080") == 1080.0


OWN = """
from dataclasses import dataclass
from reft_jax.tasks.registry import Task

@dataclass(frozen=True)
class Even(Task):
    def read(self, raw):
        value = super().read(raw)
        return value if value is not None and value % 2 == 0 else None

@dataclass(frozen=True)
class Both(Even):
    def read_lenient(self, raw):
        return super().read_lenient(str(raw).replace("even", ""))

EVEN, BOTH = Even("even"), Both("both")
"""


def test_a_task_with_a_reading_of_its_own_needs_both(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(InputError, match="data.reading='lenient': task='.*own.py:EVEN' reads answers in its own way"):
        load_task(f"{tmp_path}/own.py:EVEN", "lenient")
    task = load_task(f"{tmp_path}/own.py:BOTH", "lenient")
    assert nl("Therefore, the answer is: even $18", task=task).value == 18.0
    assert load_task(f"{tmp_path}/own.py:EVEN").read("3") is None
    with pytest.raises(InputError, match="data.reading='lenient'"):  # before any data is read
        load_data(settings(**{"task": f"{tmp_path}/own.py:EVEN", "data.reading": "lenient"}), {})
