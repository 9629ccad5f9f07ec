"""Finds where a number of a worked solution comes from: an earlier step, the question, common knowledge or a short sum.

An origin is Python source in which `s3` is the step of index 3 and `q5` the question's number of index 5. Several
origins may give the same number. Each has a score, which depends on the words around both numbers and on whether the
origin was used before.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.gsm8k_programs.constants import CONSTANTS, COUNTS, is_known, stems
from reft_jax.gsm8k_programs.equations import Step, close
from reft_jax.gsm8k_programs.numbers import Mention, read_numbers, same

FACTOR_WORDS = re.compile(  # the 3 of "3 times as many" is written where it is used; the 3 of "3 times." gets a name
    r"\s*(?:-\s*)?(?:times?\b(?!\s*(?:[.,?!]|$|(?:a|an|each|every|per|in|on|and|this|for|before|at|during)\b))"
    r"|folds?\b|x\b)",
    re.IGNORECASE,
)
MEASURES = [
    number for number in CONSTANTS if (number >= 7 or number == 3) and number not in (9, 14, 15, 18, 20, 25, 26, 50)
]
AND_SELF = re.compile(r"\b(?:(?:and|with|for) (?:his|her|their|my)|invites?|invited) (?:other )?$")
CERTAIN = 5  # a direct origin with this score is not compared with longer expressions
LIKELY = 4  # an origin with this score is not compared with sums that are worked out


class Origin(NamedTuple):
    """One possible origin. `key` is what `used` remembers: a name, or a literal with the mention that states it."""

    score: float
    source: str
    key: str


class Atom(NamedTuple):
    """A known quantity that a short expression may use."""

    value: float
    score: float
    source: str


class Origins:
    """Finds origins from the question, the solution's text (without marks) and the steps known so far."""

    def __init__(self, question: str, text: str, steps: list[Step]):
        self.question, self.steps = question, steps
        self.text = text.lower()
        self.words = stems(f"{question} {text}")
        self.percent = bool({"%", "percent"} & self.words)
        self.mentions = read_numbers(question)
        lines = self.text.split("\n")
        self.lines = [_stems(line) for line in lines]
        self.numbers = [[number.value for number in read_numbers(line)] for line in lines]
        self.results = [_stems(lines[step.line][step.end : step.end + 25]) for step in steps]
        self.contexts = [_stems(question[max(0, m.start - 45) : m.end + 45]) for m in self.mentions]
        self.nouns = [_stems(question[m.end : m.end + 30]) for m in self.mentions]
        self.known: set[int] = set()  # steps that have an expression
        self.used: set[str] = set()

    def find(self, value: float, step: Step, unit: str, beside: list[str]) -> Origin | None:
        """The likeliest origin of a number of `step`, or None.

        unit: the words after the number in the equation. beside: keys of the numbers before it in the equation.
        """
        found = [o._replace(score=o.score - 2.5 * (o.key in beside)) for o in self._direct(value, step, unit)]
        if not found or max(found).score < CERTAIN:
            found += self._complements(value, step)
        if not found or max(found).score < LIKELY:
            found += [Origin(score, source, source) for score, source in self._worked_out(value, step, unit)]
        return max(found, default=None)

    def share(self, value: float, step: Step) -> str | None:
        """The earlier step that computed this number, if it is not whole, such as 2/3; else None."""
        if value.is_integer():
            return None
        return next((f"s{index}" for index, earlier in self._earlier(step) if same(earlier.value, value)), None)

    def is_plain(self, value: float, step: Step) -> bool:
        """Whether `value` is the result of an earlier step or a named number of the question."""
        stated = any(self.named(mention) and same(mention.value, value) for mention in self.mentions)
        return stated or any(same(earlier.value, value) for _, earlier in self._earlier(step))

    def named(self, mention: Mention) -> bool:
        """Whether a number gets a name: not a percentage, a fraction, "twice", "3 times as many" or "one"."""
        if mention.kind not in ("number", "money") or FACTOR_WORDS.match(self.question, mention.end):
            return False
        return self.question[mention.start : mention.end].lower() != "one"

    def _earlier(self, step: Step) -> Iterator[tuple[int, Step]]:
        return ((index, self.steps[index]) for index in sorted(self.known) if self.steps[index] is not step)

    def _direct(self, value: float, step: Step, unit: str) -> Iterator[Origin]:
        """Yields origins that are the number itself: a step's result, a number of the question, a constant."""
        counted = _stems(unit)
        for index, earlier in self._earlier(step):
            name = f"s{index}"
            score = 2.0 * (name not in self.used) + index / 100
            if same(earlier.value, value):
                yield Origin(9 + score + bool(counted & self.results[index]), name, name)
            elif same(earlier.value, -value):
                yield Origin(8 + score, f"-{name}", name)
            elif close(earlier.value, value) and not value.is_integer():
                yield Origin(6 + score, name, name)
            elif same(earlier.value / 100, value) and value < 1:
                yield Origin(5 + score, f"{name} / 100", name)
            elif same(earlier.value * 100, value) and earlier.value <= 1:
                yield Origin(5 + score, f"{name} * 100", name)
        for index, mention in enumerate(self.mentions):
            score = self._fit(index, step, unit) - index / 100
            name, literal = f"q{index}", literal_of(value)
            if same(mention.value, value) and self.named(mention):
                yield Origin(8 + score + (name not in self.used), name, name)
            elif mention.kind == "money" and "cent" in self.words and same(mention.value * 100, value):
                yield Origin(7 + score, f"{name} * 100", name)
            elif mention.states(value):
                key = f"{literal} of {name}"
                yield Origin(6.5 + score + self._aptness(mention, value, unit) + (key not in self.used), literal, key)
        number = int(value) if value.is_integer() else value
        if is_known(number, self.words):
            score = 7 + 2 * is_known(number, stems(unit.split(" ")[0]))
            yield Origin(score, literal_of(value), "")
        elif value in COUNTS and not any(same(value, other.value) for other in self.steps):
            yield Origin(4, literal_of(value), "")

    def _aptness(self, mention: Mention, value: float, unit: str) -> float:
        """Scores how well a literal matches a mention: "half" is a bare 2 or 0.5; 20% gives 20 only in 20/100."""
        if mention.kind == "percent" and same(mention.value, value):
            return -1.0
        bare = (not unit and value.is_integer()) * {"factor": 1.6, "fraction": 1.6, "number": 0.9}.get(
            mention.kind, 0.0
        )
        return 1.0 + bare - 3.0 * (mention.kind == "ordinal")

    def _fit(self, index: int, step: Step, unit: str) -> float:
        """Scores how well a number of the question matches the line of a step and the words after the number."""
        mention = self.mentions[index]
        about = len(self.contexts[index] & self.lines[step.line])
        score = 0.4 * min(3, about) + bool(_stems(unit) & self.nouns[index])
        counted = [words for value, words in step.units if same(value, step.value)]  # what the equation gives
        if not unit and mention.kind == "money" and counted:
            if "$" in counted[0]:
                score += 0.6
            elif not re.search(r"[*/]", step.expressions[0]):
                score -= 1.2  # dollars are not added to bottles
        if unit and mention.kind in ("money", "number"):
            score += 0.75 if ("$" in unit) == (mention.kind == "money") else -0.75
        return score

    def _atoms(self, step: Step) -> list[Atom]:
        atoms = [Atom(earlier.value, index / 100, f"s{index}") for index, earlier in self._earlier(step)]
        for index, mention in enumerate(self.mentions):
            source = f"q{index}" if self.named(mention) else literal_of(mention.value)
            atoms.append(Atom(mention.value, 0.0, source))
        return atoms

    def _complements(self, value: float, step: Step) -> Iterator[Origin]:
        """Yields complements: 80 % and 0.8 for "20 % off", 1.2 for "20 % more", 2/3 for "a third was sold"."""
        for atom, score, source in self._atoms(step):
            if 0 < atom < 1:
                for found, text in ((1 - atom, f"1 - {source}"), (1 + atom, f"1 + {source}")):
                    if same(found, value):
                        yield Origin(5 + score, text, source)
            elif self.percent and atom < 1000 and source[0] != "q":
                for found, text in ((100 - atom, f"100 - {source}"), (100 + atom, f"100 + {source}")):
                    if same(found, value):
                        yield Origin(5 + score, text, source)
                    elif same(found / 100, value):
                        yield Origin(4.5 + score, f"({text}) / 100", source)

    def _worked_out(self, value: float, step: Step, unit: str) -> Iterator[tuple[float, str]]:
        """Yields short expressions for a number that the solution uses without showing how it was computed."""
        stated = [line for line, numbers in enumerate(self.numbers) if any(same(n, value) for n in numbers)]
        at = stated[0] if stated else step.line
        here, before = self.numbers[at], self.numbers[max(0, at - 1)]
        here = [number for number in here if not same(number, value)]
        atoms = self._atoms(step)
        constants = [Atom(float(c), 0.0, literal_of(float(c))) for c in MEASURES if is_known(c, self.words)]
        yield from _pairs(value, here or before, _among(atoms, here or before), constants)
        if here:
            yield from _of_steps(value, _among(atoms, before))
        yield from self._alike(value, _stems(unit) or self._unit_of(value))
        for constant in constants:  # 30 minutes are 30 / 60 of an hour
            stated = [atom for atom in atoms if atom.source[0] == "q" and constant.value]
            yield from (
                (1.0, f"{a.source} / {constant.source}") for a in stated if same(a.value / constant.value, value)
            )
        for index, mention in enumerate(self.mentions):
            if mention.kind == "fraction":
                part = literal_of(mention.value)
                yield from ((1.2, f"{a.source} * {part}") for a in atoms if same(mention.value * a.value, value))
                yield from ((1.0, f"{part} * {c.source}") for c in constants if same(mention.value * c.value, value))
            elif same(mention.value + 1, value) and AND_SELF.search(self.question[: mention.start]):
                yield 2.0, f"q{index} + 1"  # "Ann and her 14 friends"

    def _alike(self, value: float, units: set[str]) -> Iterator[tuple[float, str]]:
        """Yields sums and differences of the question's numbers of like things: 20 games, 15 of them played."""
        alike = [(i, m.value) for i, m in enumerate(self.mentions) if self.named(m) and units & self.nouns[i]]
        for first, a in alike:
            for second, b in alike:
                if first != second and same(a - b, value):
                    yield 1.4, f"q{first} - q{second}"
                if first < second and same(a + b, value):
                    yield 1.3, f"q{first} + q{second}"

    def _unit_of(self, value: float) -> set[str]:
        """The word after a number where the solution first states it."""
        match = re.search(rf"(?<![\d.,]){re.escape(literal_of(value))}(?![\d.,])\s+(\w+)", self.text)
        return _stems(match[1]) if match else set()


def _among(atoms: list[Atom], numbers: list[float]) -> list[Atom]:
    return [atom for atom in atoms if any(same(atom.value, number) for number in numbers)]


def _pairs(value: float, numbers: list[float], near: list[Atom], constants: list[Atom]) -> Iterator[tuple[float, str]]:
    """Yields expressions of two numbers near the one in question, or of one such number and a unit of measure.

    Sums and differences need a step's result; two numbers of the question are added only if they count like things.
    """
    for a in near:
        for b in constants:
            if same(a.value * b.value, value) and a.value != 1:
                yield 2.6 + a.score, f"{a.source} * {b.source}"
            if same(a.value / b.value, value):
                yield 2.4 + a.score, f"{a.source} / {b.source}"
        for b in near:
            score = 2 + a.score + b.score
            twice = a is b and numbers.count(a.value) > 1 and a.source[0] not in "sq"  # three times three times as many
            if (a.source == b.source and not twice) or 1 in (a.value, b.value):
                continue
            if same(a.value * b.value, value) and a.source <= b.source:
                yield score + 0.2, f"{a.source} * {b.source}"
            if b.value and same(a.value / b.value, value):
                yield score, f"{a.source} / {b.source}"
            if "s" in (a.source[0], b.source[0]) and same(a.value + b.value, value) and a.source < b.source:
                yield score, f"{a.source} + {b.source}"
            if "s" in (a.source[0], b.source[0]) and same(a.value - b.value, value):
                yield score, f"{a.source} - {b.source}"


def _of_steps(value: float, before: list[Atom]) -> Iterator[tuple[float, str]]:
    """Yields sums and differences of a step's result and another number of the line before."""
    for a in before:
        for b in before:
            if a.source[0] == "s" and b.source[0] in "sq" and a.source != b.source:
                if same(a.value + b.value, value):
                    yield 1.1, f"{b.source} + {a.source}"
                if same(abs(a.value - b.value), value):
                    larger, smaller = (a, b) if a.value > b.value else (b, a)
                    yield 1.1, f"{larger.source} - {smaller.source}"


def _stems(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())}


def literal_of(value: float) -> str:
    """The number as it is written in a program."""
    return str(int(value)) if float(value).is_integer() else repr(round(value, 12))


def stated_literal(mention: Mention) -> str:
    """The question's number as it is written in a program: two dozen is 2 * 12."""
    if mention.others[-1:] == (12.0,) and mention.value == mention.others[0] * 12 and mention.value != 12:
        return f"{literal_of(mention.others[0])} * 12"
    return literal_of(mention.value)
