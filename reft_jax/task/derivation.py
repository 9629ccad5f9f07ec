"""From the equations of a worked solution to a plan: which quantity of the question or earlier step each number is.

Every number of an equation is replaced by where it comes from: an earlier step, a number that the question states, or
a constant that people know (60 minutes in an hour). What is none of these but a short expression of them (45 % is
100 - 55; the 14 days of two weeks) is written as that expression. A step with a number from nowhere is no step.
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.task.algebra import solved_unknowns
from reft_jax.task.equations import MARK, Step, close, evaluate, read_steps
from reft_jax.task.numbers import Mention, read_numbers, same

# What a constant may be when the question does not state it, and the words that go with it. No words: any text.
CONSTANTS = {
    1000: "kilo kg gram thousand km meter metre liter litre ml mm gallon milli pound ton",
    5280: "mile feet",
    3600: "second hour",
    1440: "day minute",
    360: "degree circle angle",
    365: "day year",
    366: "leap",
    180: "triangle degree angle",
    168: "hour week",
    144: "inch feet gross",
    128: "ounce gallon",
    100: "percent % cent dollar $ meter metre cm century number probability",
    90: "right degree corner angle",
    64: "ounce",
    60: "minute second hour",
    52: "week year card",
    48: "hour",
    36: "inch yard",
    32: "ounce quart",
    31: "day month january march may july august october december",
    30: "day month april june september november",
    29: "leap february",
    28: "day february week",
    26: "letter alphabet week",
    25: "quarter cent",
    24: "hour day dozen",
    21: "week",
    20: "score finger nickel decade",
    18: "adult",
    16: "ounce pound",
    15: "minute quarter",
    14: "week fortnight",
    12: "month year dozen inch feet foot hour",
    10: "dime decade cent finger toe mm cm",
    0.25: "quarter",
    0.1: "dime",
    0.05: "nickel",
    0.01: "penny pennies cent",
}
COUNTS = range(0, 11)  # people and things that are listed, not counted: "Ann and her mother", "each side"
FACTOR_WORDS = re.compile(r"\s*(?:-\s*)?(?:times?\b|folds?\b|x\b)", re.IGNORECASE)


class Given(NamedTuple):
    """A number of the question that gets a name: the mention's index among the question's numbers."""

    index: int
    mention: Mention


class Planned(NamedTuple):
    """One assignment. `source` is Python in which `s3` is the step of index 3 and `q5` the question's number 5."""

    index: int
    step: Step
    source: str


class Plan(NamedTuple):
    givens: list[Given]
    steps: list[Planned]


class Underivable(Exception):
    """Why there is no program, in a few words."""


def derive(question: str, answer: str, target: float) -> Iterator[Plan]:
    """Plans that should end in `target`, likely ones first. Raises Underivable if there is none at all."""
    steps = sorted(read_steps(answer) + solved_unknowns(answer), key=lambda step: (step.line, step.end))
    if not steps:
        raise Underivable("no equation in the solution")
    work = Derivation(question, answer, steps)
    ends = [index for index in work.sources if abs(steps[index].value - target) <= 1e-2]
    plans = [work.plan(index) for index in reversed(ends)]
    plans += [work.plan(index, "s{0} * 100") for index in work.sources if close(steps[index].value * 100, target)]
    if not plans:
        known = any(abs(step.value - target) <= 1e-2 for step in steps)
        raise Underivable("a number from nowhere" if known else "no equation gives the final answer")
    yield from plans


class Derivation:
    """The numbers known so far, and how each step comes from those before it."""

    def __init__(self, question: str, answer: str, steps: list[Step]):
        self.question, self.steps = question, steps
        self.text = MARK.sub("", answer.rpartition("####")[0]).lower()
        self.words = f"{question} {self.text}".lower()
        self.mentions = read_numbers(question)
        self.introduced = [mention.value for mention in read_numbers(self.text)]
        self.sources: dict[int, str] = {}
        self.used: set[str] = set()
        for index, step in enumerate(steps):
            found = [self._expression(source, step) for source in step.expressions]
            good = [(-worst, order, source) for order, (source, worst) in enumerate(found) if source]
            if good:
                self.sources[index] = source = min(good)[2]
                self.used |= set(re.findall(r"\b[sq]\d+\b", source))

    def plan(self, last: int, ending: str = "") -> Plan:
        """The steps that step `last` needs, in order, and the numbers of the question that those need."""
        needed, todo = set(), [last]
        while todo:
            index = todo.pop()
            if index not in needed:
                needed.add(index)
                todo += [int(name) for name in re.findall(r"\bs(\d+)\b", self.sources[index])]
        steps = [Planned(index, self.steps[index], self.sources[index]) for index in sorted(needed)]
        if ending:
            end = self.steps[last]._replace(value=self.steps[last].value * 100, subject="percentage")
            steps.append(Planned(len(self.steps), end, ending.format(last)))
        names = sorted({int(name) for step in steps for name in re.findall(r"\bq(\d+)\b", step.source)})
        return Plan([Given(index, self.mentions[index]) for index in names], steps)

    def _expression(self, source: str, step: Step) -> tuple[str | None, float]:
        """The expression with every number replaced, and how sure its least sure replacement is."""
        units = list(step.units)
        tree = ast.parse(source.replace("*0.01", "/100"), mode="eval")
        replaced: dict[int, ast.expr] = {}
        worst = 10.0
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Constant)), key=lambda n: n.col_offset):
            unit = next((words for value, words in units if value is not None and same(value, node.value)), "")
            best = max(self._origins(float(node.value), step, unit), default=None)
            if best is None:
                return None, 0.0
            worst = min(worst, best[0])
            self.used.add(best[1])
            replaced[id(node)] = ast.parse(best[1], mode="eval").body

        class Replace(ast.NodeTransformer):
            def visit_Constant(self, node: ast.Constant) -> ast.expr:
                return replaced[id(node)]

        return ast.unparse(Replace().visit(tree)), worst

    def _origins(self, value: float, step: Step, unit: str) -> Iterator[tuple[float, str]]:
        """Where a number can come from: (how likely, Python source)."""
        yield from self._direct(value, step, unit)
        yield from self._complements(value, step)
        yield from self._pairs(value, step, unit)

    def _earlier(self, step: Step) -> Iterator[tuple[int, Step]]:
        for index in self.sources:
            if self.steps[index] is not step:
                yield index, self.steps[index]

    def _direct(self, value: float, step: Step, unit: str) -> Iterator[tuple[float, str]]:
        stems = _stems(unit)
        for index, earlier in self._earlier(step):
            name = f"s{index}"
            score = 2.0 * (name not in self.used) + index / 100
            if same(earlier.value, value):
                yield 8 + score, name
            elif close(earlier.value, value) and not float(value).is_integer():
                yield 6 + score, name
            elif same(earlier.value / 100, value) and value < 1:
                yield 5 + score, f"{name} / 100"
            elif same(earlier.value * 100, value) and earlier.value <= 1:
                yield 5 + score, f"{name} * 100"
        for index, mention in enumerate(self.mentions):
            if same(mention.value, value) and mention.kind in ("number", "money") and self._nameable(mention):
                name = f"q{index}"
                shared = len(stems & _stems(self.question[mention.end : mention.end + 40]))
                yield 8.5 + (name not in self.used) + min(shared, 2) - index / 100, name
            elif mention.states(value):
                yield 7.5, _literal(value)
        number = int(value) if value.is_integer() else value
        if number in CONSTANTS and any(word in self.words for word in CONSTANTS[number].split()):
            yield 7 + 2 * any(word in unit for word in CONSTANTS[number].split()), _literal(value)
        elif value in COUNTS:
            yield 3 if any(same(value, earlier.value) for earlier in self.steps) else 4, _literal(value)

    def _nameable(self, mention: Mention) -> bool:
        return not FACTOR_WORDS.match(self.question, mention.end)

    def _atoms(self, step: Step) -> Iterator[tuple[float, float, str]]:
        """What a derived number may be made of: (value, how likely, source)."""
        for index, earlier in self._earlier(step):
            yield earlier.value, index / 100, f"s{index}"
        for index, mention in enumerate(self.mentions):
            named = mention.kind in ("number", "money") and self._nameable(mention)
            yield mention.value, 0.0, f"q{index}" if named else _literal(mention.value)
            for other in mention.others:
                yield other, -0.2, _literal(other)

    def _complements(self, value: float, step: Step) -> Iterator[tuple[float, str]]:
        """80 % and 0.8 of "20 % off", 1.2 of "20 % more", 1.5 of "one and a half"."""
        for atom, score, source in self._atoms(step):
            for whole in (1, 100):
                if not (0 < atom < whole or (whole == 100 and atom < 1000)):
                    continue
                for sign in "-+":
                    found = whole - atom if sign == "-" else whole + atom
                    if same(found, value):
                        yield 5 + score, f"{whole} {sign} {source}"
                    elif whole == 100 and same(found / 100, value):
                        yield 4.5 + score, f"({whole} {sign} {source}) / 100"

    def _pairs(self, value: float, step: Step, unit: str) -> Iterator[tuple[float, str]]:
        """A short expression of two numbers that are known, for one that the solution worked out in the head."""
        if value in COUNTS and not unit:
            return
        atoms = list(self._atoms(step))
        near = {number.value for number in read_numbers(self.text.split("\n")[step.line])}
        constants = [(float(c), -0.5, _literal(float(c))) for c in CONSTANTS if any(w in self.words for w in CONSTANTS[c].split())]
        for a, first, left in atoms:
            for b, second, right in atoms + constants:
                if left == right and not left.startswith(("s", "q")):
                    continue
                score = 2 + first + second + (a in near) * 0.5 + (b in near) * 0.5
                if left < right or (b, second, right) in constants:
                    if same(a + b, value) and (b, second, right) not in constants:
                        yield score, f"{left} + {right}"
                    if same(a * b, value) and a != 1 and b != 1:
                        yield score + 0.2, f"{left} * {right}"
                if same(a - b, value) and b:
                    yield score, f"{left} - {right}"
                if b and b != 1 and same(a / b, value):
                    yield score, f"{left} / {right}"


def _stems(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())}


def _literal(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(round(value, 12))
