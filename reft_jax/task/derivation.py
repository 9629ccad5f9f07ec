"""From the equations of a worked solution to a plan: which quantity of the question or earlier step each number is.

Every number of an equation is replaced by where it comes from: an earlier step, a number that the question states, or
a constant that people know (60 minutes in an hour). What is none of these but a short expression of them (45 % is
100 - 55; the 14 days of two weeks) is written as that expression. A step with a number from nowhere is no step.
"""

import ast
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.task.algebra import solved_unknowns
from reft_jax.task.constants import CONSTANTS, COUNTS, is_known
from reft_jax.task.equations import MARK, Step, close, evaluate, read_steps
from reft_jax.task.numbers import Mention, read_numbers, same

ROUNDED = re.compile(r"\bround|\bwhole\b|\bnearest\b|\bcan(?:'|’)?(?:no)?t\b|\bneeds? to buy\b|\bat least\b|\bonly\b")
COMPARED = re.compile(r"\b(?:more|less|fewer|faster|slower|longer|older|total|altogether|difference|combined|in all)\b")
FACTOR_WORDS = re.compile(
    r"\s*(?:-\s*)?(?:times?\b(?!\s*(?:[.,?!]|$|(?:a|an|each|every|per|in|on|and|this|for|before|at|during)\b))|folds?\b|x\b)",
    re.IGNORECASE,
)


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
    plans = [work.plan(index) for index in reversed(work.sources) if abs(steps[index].value - target) <= 1e-2]
    plans = plans or list(work.endings(target))
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
        self.lines = [_stems(line) for line in self.text.split("\n")]
        rows = self.text.split("\n")
        self.results = [_stems(rows[step.line][step.end : step.end + 25]) for step in steps]
        self.numbers = [[number.value for number in read_numbers(line)] for line in self.text.split("\n")]
        self.contexts = [_stems(question[max(0, m.start - 45) : m.end + 45]) for m in self.mentions]
        self.nouns = [_stems(question[m.end : m.end + 30]) for m in self.mentions]
        self.sources: dict[int, str] = {}
        self.used: set[str] = set()
        for index, step in enumerate(steps):
            found = [self._expression(source, step) for source in step.expressions]
            good = [(-worst, order, source) for order, (source, worst) in enumerate(found) if source]
            if good:
                self.sources[index] = source = min(good)[2]

    def endings(self, target: float) -> Iterator[Plan]:
        """Plans for an answer that no equation gives: a share as a percentage, a rounded number, a last comparison."""
        for index in reversed(self.sources):
            value = self.steps[index].value
            exact = evaluate_with(self.sources, self.mentions, index)
            if close(value * 100, target):
                yield self.plan(index, f"s{index} * 100", target)
            if exact is None or not ROUNDED.search(self.words):
                continue
            for factor, source in ((1, f"s{index}"), (100, f"s{index} * 100")):
                if not float(exact * factor).is_integer() and abs(exact * factor - target) < 1:
                    function = "round" if round(exact * factor) == target else ""
                    function = "math.ceil" if math.ceil(exact * factor) == target and not function else function
                    function = "math.floor" if math.floor(exact * factor) == target and not function else function
                    if function:
                        yield self.plan(index, f"{function}({source})", target)
        leaves = [index for index in self.sources if not self._serves(index)]
        if len(leaves) == 2 and COMPARED.search(self.text.strip().split("\n")[-1]):
            (a, b), (first, second) = leaves, (self.steps[leaf].value for leaf in leaves)
            for found, source in (
                (first - second, f"s{a} - s{b}"),
                (second - first, f"s{b} - s{a}"),
                (first + second, f"s{a} + s{b}"),
            ):
                if same(found, target):
                    yield self.plan(leaves, source, target)

    def _serves(self, index: int) -> bool:
        return any(re.search(rf"\bs{index}\b", source) for source in self.sources.values())

    def plan(self, last: int | list[int], ending: str = "", target: float = 0.0) -> Plan:
        """The steps that `last` needs, in order, and the numbers of the question that those need; then the ending."""
        needed, todo = set(), [last] if isinstance(last, int) else list(last)
        while todo:
            index = todo.pop()
            if index not in needed:
                needed.add(index)
                todo += [int(name) for name in re.findall(r"\bs(\d+)\b", self.sources[index])]
        steps = [Planned(index, self.steps[index], self.sources[index]) for index in sorted(needed)]
        if ending:
            lines = self.text.rstrip().split("\n")
            end = Step((ending,), target, len(lines) - 1, len(lines[-1]), len(lines[-1]))
            steps.append(Planned(len(self.steps), end, ending))
        names = sorted({int(name) for step in steps for name in re.findall(r"\bq(\d+)\b", step.source)})
        return Plan([Given(index, self.mentions[index]) for index in names], steps)

    def _expression(self, source: str, step: Step) -> tuple[str | None, float]:
        """The expression with every number replaced, and how sure its least sure replacement is."""
        units = list(step.units)
        tree = ast.parse(source.replace("*0.01", "/100"), mode="eval")
        replaced = {id(node): node for node in self._ratios(tree)} | self._earlier_ratios(tree, step)
        here: list[str] = []
        worst = 10.0
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Constant)), key=lambda n: n.col_offset):
            if id(node) in replaced:
                continue
            unit = next((words for value, words in units if value is not None and same(value, node.value)), "")
            best = self._origin(float(node.value), step, unit, here)
            if best is None:
                return None, 0.0
            worst = min(worst, best[0])
            here.append(best[1])
            replaced[id(node)] = ast.parse(best[1].partition(" #")[0], mode="eval").body

        class Replace(ast.NodeTransformer):
            def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
                return replaced.get(id(node)) or self.generic_visit(node)

            def visit_Constant(self, node: ast.Constant) -> ast.expr:
                return replaced[id(node)]

        self.used |= set(here)
        return ast.unparse(Replace().visit(tree)), worst

    def _ratios(self, tree: ast.Expression) -> Iterator[ast.Constant]:
        """Both numbers of every 1/4 and 20/100 that the question states as one: a fraction, or 20%."""
        for node in ast.walk(tree):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
                continue
            top, bottom = node.left, node.right
            if isinstance(top, ast.BinOp) and isinstance(top.op, ast.Mult | ast.Div):  # 3 * 1 / 4 is (3 * 1) / 4
                top = top.right
            if not (isinstance(top, ast.Constant) and isinstance(bottom, ast.Constant)) or not bottom.value:
                continue
            for mention in self.mentions:
                part = mention.kind == "fraction" and same(top.value / bottom.value, mention.value)
                part = part and any(same(bottom.value, other) for other in mention.others)
                if part or (mention.kind == "percent" and bottom.value == 100 and same(top.value, mention.value)):
                    yield from (top, bottom)

    def _earlier_ratios(self, tree: ast.Expression, step: Step) -> dict[int, ast.expr]:
        """Every 2/3 that an earlier step computed, by the identity of its nodes: the division is that step's name."""
        replaced = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                parts = (node.left, node.right)
                if all(isinstance(part, ast.Constant) for part in parts) and node.right.value:
                    share = node.left.value / node.right.value
                    for index, earlier in self._earlier(step):
                        if same(earlier.value, share) and not share.is_integer():
                            replaced |= {id(node): ast.Name(f"s{index}"), **{id(part): part for part in parts}}
        return replaced

    def _origin(self, value: float, step: Step, unit: str, here: list[str]) -> tuple[float, str] | None:
        """Where a number most likely comes from: (how likely, Python source)."""
        found = [(score - 2.5 * (source in here), source) for score, source in self._direct(value, step, unit)]
        if not found or max(found)[0] < 5:
            found += self._complements(value, step)
        if not found or max(found)[0] < 4:
            found += self._pairs(value, step, unit)
        return max(found, default=None)

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
                yield 9 + score + (stems & self.results[index] != set()), name
            elif close(earlier.value, value) and not float(value).is_integer():
                yield 6 + score, name
            elif same(earlier.value / 100, value) and value < 1:
                yield 5 + score, f"{name} / 100"
            elif same(earlier.value * 100, value) and earlier.value <= 1:
                yield 5 + score, f"{name} * 100"
        line = self.lines[step.line]
        for index, mention in enumerate(self.mentions):
            topic = 0.4 * min(3, len(self.contexts[index] & line)) + (stems & self.nouns[index] != set())
            if unit and mention.kind in ("money", "number"):
                topic += 0.75 if ("$" in unit) == (mention.kind == "money") else -0.75
            if same(mention.value, value) and self._nameable(mention):
                name = f"q{index}"
                yield 8 + (name not in self.used) + topic - index / 100, name
            elif mention.kind == "money" and "cent" in self.words and same(mention.value * 100, value):
                yield 7 + topic, f"q{index} * 100"
            elif mention.states(value):
                literal = f"{_literal(value)} # {index}"
                bare = 1.6 if not unit and mention.kind in ("factor", "fraction") and value in (2, 3, 4) else 0
                yield 7.5 + bare + (literal not in self.used) + topic - index / 100, literal
        number = int(value) if value.is_integer() else value
        if is_known(number, self.words):
            yield 7 + 2 * any(word in unit.split(" ")[0] for word in CONSTANTS[number].split()), _literal(value)
        elif value in COUNTS:
            computed = any(same(value, other.value) for other in self.steps)
            yield 0.5 if computed else 4, _literal(value)

    def _nameable(self, mention: Mention) -> bool:
        """Whether the number is worth a name: not a percentage, a fraction, "twice", "3 times" or "one"."""
        word = self.question[mention.start : mention.end].lower()
        return mention.kind in ("number", "money") and word != "one" and not FACTOR_WORDS.match(self.question, mention.end)

    def _atoms(self, step: Step) -> Iterator[tuple[float, float, str]]:
        """What a derived number may be made of: (value, how likely, source)."""
        for index, earlier in self._earlier(step):
            yield earlier.value, index / 100, f"s{index}"
        for index, mention in enumerate(self.mentions):
            yield mention.value, 0.0, f"q{index}" if self._nameable(mention) else _literal(mention.value)

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
        """A short expression for a number that the solution worked out in the head, from the numbers beside it.

        These stand in the line where it is first stated; only if none does, in the line before.
        """
        stated = [number for number, numbers in enumerate(self.numbers) if any(same(n, value) for n in numbers)]
        at = stated[0] if stated else step.line
        near = [n for n in self.numbers[at] if not same(n, value)]
        before = self.numbers[max(0, at - 1)] if near else []
        near = near or self.numbers[max(0, at - 1)]
        atoms = list(self._atoms(step))
        beside = [atom for atom in atoms if any(same(atom[0], n) for n in near)]
        constants = [(float(c), -0.5, _literal(float(c))) for c in CONSTANTS if is_known(c, self.words)]
        for a, first, left in beside:
            for b, second, right in beside + constants:
                score = 2 + first + second
                if left == right and not left.startswith(("s", "q")):
                    continue
                if same(a * b, value) and a != 1 and b != 1:
                    yield score + 0.2, f"{left} * {right}"
                if b not in (0, 1) and same(a / b, value):
                    yield score, f"{left} / {right}"
                if (b, second, right) in constants:
                    continue
                if same(a + b, value) and left < right:
                    yield score, f"{left} + {right}"
                if same(a - b, value):
                    yield score, f"{left} - {right}"
            for b, _, right in atoms:
                if same(a * b, value) and a != 1 and b != 1:
                    yield 1.5 + first, f"{left} * {right}"
        earlier = [atom for atom in atoms if any(same(atom[0], n) for n in before)]
        for a, _, left in earlier:
            for b, _, right in earlier:
                if left[0] == "s" and right[0] in "sq" and left != right:
                    if same(a + b, value):
                        yield 1.1, f"{right} + {left}"
                    if same(a - b, value) or same(b - a, value):
                        yield 1.1, f"{left} - {right}" if a > b else f"{right} - {left}"
        units = _stems(unit) or self._unit_of(value)
        alike = [index for index, m in enumerate(self.mentions) if self._nameable(m) and units & self.nouns[index]]
        for a in alike:
            for b in alike:
                if a != b and same(self.mentions[a].value - self.mentions[b].value, value):
                    yield 1.4, f"q{a} - q{b}"
                if a < b and same(self.mentions[a].value + self.mentions[b].value, value):
                    yield 1.3, f"q{a} + q{b}"
        for index, mention in enumerate(self.mentions):
            for quantity, _, left in atoms:
                if mention.kind == "fraction" and left[0] in "sq" and same(mention.value * quantity, value):
                    yield 1.2, f"{left} * {_literal(mention.value)}"
            for constant, _, right in constants:
                if mention.kind == "fraction" and same(mention.value * constant, value):
                    yield 1, f"{_literal(mention.value)} * {right}"
            if same(mention.value + 1, value) and self._and_self(mention):
                yield 2, f"q{index} + 1"

    def _unit_of(self, value: float) -> set[str]:
        """The words behind a number where the solution first states it."""
        match = re.search(rf"(?<![\d.,]){re.escape(_literal(value))}(?![\d.,])\s+(\w+)", self.text)
        return _stems(match[1]) if match else set()

    def _and_self(self, mention: Mention) -> bool:
        """Whether the number counts people beside the one that the sentence is about: "Ann and her 14 friends"."""
        return bool(re.search(r"\b(?:(?:and|with|for) (?:his|her|their|my)|invites?|invited) (?:other )?$", self.question[: mention.start]))


def evaluate_with(sources: dict[int, str], mentions: list[Mention], index: int) -> float | None:
    """The exact value of a step, from the question's numbers."""
    source = re.sub(r"\bq(\d+)\b", lambda match: repr(mentions[int(match[1])].value), sources[index])
    for name in set(re.findall(r"\bs(\d+)\b", source)):
        value = evaluate_with(sources, mentions, int(name))
        source = re.sub(rf"\bs{name}\b", repr(value) if value is not None else "(1/0)", source)
    return evaluate(source)


def _stems(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall(r"[a-z]{3,}", text.lower())}


def literal_of(mention: Mention) -> str:
    """How a program writes a number of the question: two dozen are 2 * 12."""
    if mention.others[-1:] == (12.0,) and mention.value == mention.others[0] * 12 and mention.value != 12:
        return f"{_literal(mention.others[0])} * 12"
    return _literal(mention.value)


def _literal(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(round(value, 12))
