"""The embedded data set "toy": seeded grade-school word problems with worked solutions. families.py lists the kinds.

Two things make it resemble collected data. First, a question may contain a sentence with a number that it does not need
(`DISTRACTED_SHARE`). Second, annotators differ: in the layout of a solution (`STYLES`), in how they divide a problem
into steps, and a `skipped_share` of them skips arithmetic. These solutions contain a computed value without showing how
it was computed. Their answer is still correct, but they are bad examples: no rule leads from the question to the value.

Every draw depends only on (seed, split, candidate number). So a smaller split is the beginning of a larger one, and the
draws for solutions do not change the questions.
"""

import ast
import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from reft_jax.tasks import prompts
from reft_jax.toy.families import CONTAINERS, DISTRACTORS, FAMILIES, PEOPLE, THINGS, Family, Step
from reft_jax.types import Example, InputError

Split = Literal["train", "dev", "test"]
AnswerFormat = Literal["python", "nl"]

DISTRACTED_SHARE = 0.4
STYLES = {
    "python": ("inputs_first", "interleaved", "nested", "literals"),
    "nl": ("inline", "because", "so", "nested"),
}
SKIPPED_STYLES = ("skips_steps", "skips_all")  # skips all steps except the last, or the whole solution

# The hash values (of ten) that belong to a split. Only the text decides, so splits of any seeds and sizes are disjoint.
_BUCKETS = {"train": range(8), "dev": range(8, 9), "test": range(9, 10)}
_VARIABLE = re.compile(r"[a-z]\w*")


class ToyExample(NamedTuple):
    """An example and how it was made: its family, the style of its annotation, and whether it skips arithmetic."""

    example: Example
    family: str
    style: str
    skipped: bool


class _Problem(NamedTuple):
    """A question, its text without the distractor (`core`), and the values for the slots of its family's templates."""

    family: Family
    question: str
    core: str
    slots: dict[str, str | int]


class _Solution(NamedTuple):
    """One way to the answer with its slots filled: the `given` variables, the steps and the value of each step."""

    given: dict[str, int]
    steps: list[Step]
    values: dict[str, int]


class _Dice:
    """The random stream named by `key`, the same on every platform and Python version.

    It uses only `random()` of random.Random after an integer seed, because only that is promised never to change.
    """

    def __init__(self, *key: object):
        digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
        self.share = random.Random(int.from_bytes(digest[:8], "big")).random

    def between(self, low: int, high: int) -> int:
        return low + int(self.share() * (high - low + 1))

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.between(0, len(options) - 1)]

    def several(self, options: Sequence[Any], count: int) -> list[Any]:
        left = list(options)
        return [left.pop(self.between(0, len(left) - 1)) for _ in range(count)]


def make_split(
    seed: int, split: Split, rows: int, *, answer_format: AnswerFormat, skipped_share: float
) -> list[Example]:
    """Makes the same rows as `make_problems`, but returns only the examples."""
    return [problem.example for problem in make_problems(seed, split, rows, answer_format, skipped_share)]


def make_problems(
    seed: int, split: Split, rows: int, answer_format: AnswerFormat, skipped_share: float
) -> list[ToyExample]:
    """Makes the first `rows` problems of a split, `toy_0`, `toy_1`, ..., without repeated questions.

    Two splits share no question, for any seeds and numbers of rows. `answer_format` and `skipped_share` change only the
    annotations. A row that skips arithmetic at one share skips it in the same way at every higher share. A "python"
    annotation begins with the prefix that rollouts get; an "nl" annotation has no closing answer phrase, which
    `prompts.sft_target` adds. Outside "train" there is no annotation: `answer_cot` is None.

    Raises InputError for an unknown split or answer format, negative rows, or a share outside 0 to 1.
    """
    if split not in _BUCKETS:
        raise InputError(f"toy data: no split {split!r}; use one of {', '.join(_BUCKETS)}")
    if answer_format not in STYLES:
        raise InputError(f"toy data: no answer format {answer_format!r}; use one of {', '.join(STYLES)}")
    if rows < 0:
        raise InputError(f"toy data: {rows} rows; use 0 or more")
    if not 0 <= skipped_share <= 1:
        raise InputError(f"toy data: skipped_share is {skipped_share}; use a number from 0 to 1")
    problems: list[ToyExample] = []
    seen: set[str] = set()
    candidate = 0
    while len(problems) < rows:
        problem = _pose(_Dice("question", seed, split, candidate))
        if _bucket(problem.core) in _BUCKETS[split] and problem.core not in seen:
            seen.add(problem.core)
            dice = _Dice("annotation", seed, split, candidate)
            row = _annotate(problem, f"toy_{len(problems)}", answer_format, skipped_share, dice)
            problems.append(row if split == "train" else row._replace(example=row.example._replace(answer_cot=None)))
        candidate += 1
    return problems


def _bucket(core: str) -> int:
    """Hashes the text without its distractor, because a sentence about the weather does not make a new question."""
    return hashlib.sha256(core.encode()).digest()[0] % 10


def _pose(dice: _Dice) -> _Problem:
    family = dice.one(FAMILIES)
    people = dice.several(PEOPLE, 3)
    things, others, extras = dice.several(THINGS, 3)
    box, boxes = dice.one(CONTAINERS)
    slots = {"things": things, "others": others, "extras": extras, "box": box, "boxes": boxes}
    slots |= {slot: name for slot, (name, _) in zip(("Ann", "Ben", "Cleo"), people, strict=True)}
    slots |= {slot: name.lower() for slot, (name, _) in zip(("ann", "ben", "cleo"), people, strict=True)}
    slots |= {"she": people[0][1], "She": people[0][1].capitalize()}
    slots |= family.numbers(dice.between)
    core = dice.one(family.questions).format(**slots)
    question = core
    if dice.share() < DISTRACTED_SHARE:
        template, low, high = dice.one(DISTRACTORS)
        sentences = re.split(r"(?<=\.) ", core)
        # First, or right before the question: elsewhere it would separate a sentence from what its "each" refers to.
        sentences.insert(dice.one((0, len(sentences) - 1)), template.format(**slots, k=dice.between(low, high)))
        question = " ".join(sentences)
    return _Problem(family, question, core, slots)


def _annotate(
    problem: _Problem, item_id: str, answer_format: AnswerFormat, skipped_share: float, dice: _Dice
) -> ToyExample:
    # Every row makes all draws, in this order, so that skipped_share does not change the other draws.
    solution = _solve(problem, dice.one(problem.family.solutions))
    style = dice.one(STYLES[answer_format])
    skipped = dice.share() < skipped_share
    skipped_style = dice.one(SKIPPED_STYLES)
    if skipped:
        style = skipped_style if len(solution.steps) > 1 else "skips_all"
    if answer_format == "python":
        lines = [*_program(solution, style), "return result"]
        cot = prompts.forced_prefix(problem.question, answer_format) + "\n".join(f"    {line}" for line in lines)
    else:
        cot = "\n".join(line[0].upper() + line[1:] + "." for line in _text(solution, style))
    example = Example(item_id, problem.question, str(solution.values["result"]), cot)
    return ToyExample(example, problem.family.name, style, skipped)


def _solve(problem: _Problem, steps: tuple[Step, ...]) -> _Solution:
    slots = problem.slots
    given = {name.format(**slots): slots[number] for name, number in problem.family.given.items()}
    filled, values = [], {}
    for step in steps:
        # `{value}` stays in the text: the style decides what replaces it.
        name, expression, sentence = (part.format(**slots, value="{value}") for part in step)
        filled.append(Step(name, expression, sentence))
        values[name] = int(eval(expression, {}, given | values))  # our own table's arithmetic; all divisions are exact
    return _Solution(given, filled, values)


def _program(solution: _Solution, style: str) -> list[str]:
    """The assignments of a program, the last one to `result`."""
    given, steps, values = solution
    inputs = {name: f"{name} = {value}" for name, value in given.items()}
    last = f"result = {steps[-1].expression}"
    match style:
        case "inputs_first":
            return [*inputs.values(), *(f"{step.name} = {step.expression}" for step in steps)]
        case "interleaved":
            lines = []
            for step in steps:
                lines += [inputs.pop(name) for name in _VARIABLE.findall(step.expression) if name in inputs]
                lines.append(f"{step.name} = {step.expression}")
            return lines
        case "nested":
            return [*inputs.values(), f"result = {_unfold(steps, {})}"]
        case "literals":
            return [f"{step.name} = {_replace(step.expression, given)}" for step in steps]
        case "skips_steps":
            return [*inputs.values(), *(f"{step.name} = {values[step.name]}" for step in steps[:-1]), last]
    return [*inputs.values(), f"result = {values['result']}"]  # skips_all


def _text(solution: _Solution, style: str) -> list[str]:
    """The sentences of a text solution, without capitals and full stops."""
    given, steps, values = solution
    known = given | values
    bare = [step.sentence.format(value=values[step.name]) for step in steps]
    sums = [f"{_replace(step.expression, known)} = {values[step.name]}" for step in steps]
    inline = [step.sentence.format(value=equation) for step, equation in zip(steps, sums, strict=True)]
    match style:
        case "inline":
            return inline
        case "because":
            return [f"{sentence} because {equation}" for sentence, equation in zip(bare, sums, strict=True)]
        case "so":
            return [f"{equation}, so {sentence}" for sentence, equation in zip(bare, sums, strict=True)]
        case "nested":
            return [steps[-1].sentence.format(value=f"{_unfold(steps, given)} = {values['result']}")]
        case "skips_steps":
            return [*bare[:-1], inline[-1]]
    return [bare[-1]]  # skips_all


def _unfold(steps: list[Step], terms: dict[str, Any]) -> str:
    """The whole solution as one expression."""
    for step in steps:
        terms = terms | {step.name: _replace(step.expression, terms)}
    return terms["result"]


def _replace(expression: str, terms: dict[str, Any]) -> str:
    """Replaces every variable of `expression` that is in `terms`; adds parentheses only where they are needed."""
    wrapped = _VARIABLE.sub(lambda name: f"({terms.get(name[0], name[0])})", expression)
    return ast.unparse(ast.parse(wrapped, mode="eval"))
