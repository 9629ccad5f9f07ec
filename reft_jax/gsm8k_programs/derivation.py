"""Makes a plan from the equations of a worked solution: one expression per step, built from what the question states.

Every number of an equation is replaced by its origin (origins.py). A step with a number from nowhere is dropped. The
plan of a row holds the steps that its final answer needs, and no others.
"""

import ast
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.gsm8k_programs.algebra import solved_unknowns
from reft_jax.gsm8k_programs.equations import Step, close, evaluate, plain_text, read_steps
from reft_jax.gsm8k_programs.numbers import Mention, same
from reft_jax.gsm8k_programs.origins import Origins

OPERATION = re.compile(r"[-+*/(]")  # without an operation a step would only rename a quantity
NAME = re.compile(r"\b([sq])(\d+)\b")
ROUNDED = re.compile(r"\bround|\bwhole\b|\bnearest\b|\bcan(?:'|’)?(?:no)?t\b|\bneeds? to buy\b|\bat least\b|\bonly\b")
ROUNDINGS = (("round", round), ("math.ceil", math.ceil), ("math.floor", math.floor))
COMPARED = re.compile(r"\b(?:more|less|fewer|faster|slower|longer|older|total|altogether|difference|combined|in all)\b")


class Given(NamedTuple):
    """A number of the question that gets a name. `index` is its place among the question's numbers."""

    index: int
    mention: Mention


class Planned(NamedTuple):
    """One assignment. In its Python `source`, `s3` is the step of index 3 and `q5` the question's number of index 5."""

    index: int
    step: Step
    source: str


class Plan(NamedTuple):
    """The numbers of the question that get a name, and the assignments in order; the last one is the answer."""

    givens: list[Given]
    steps: list[Planned]


class Underivable(Exception):
    """There is no program; the message says why, in a few words."""


def derive(question: str, answer: str, target: float) -> Iterator[Plan]:
    """Yields plans that should end in `target`, the likely ones first. Raises Underivable if there is none."""
    steps = sorted(read_steps(answer) + solved_unknowns(answer), key=lambda step: (step.line, step.end))
    if not steps:
        raise Underivable("no equation in the solution")
    work = Derivation(question, answer, steps)
    plans = [work.plan([index]) for index in reversed(work.sources) if abs(steps[index].value - target) <= 1e-2]
    plans = plans or list(work.endings(target))
    if not plans:
        known = any(abs(step.value - target) <= 1e-2 for step in steps)
        raise Underivable("a number from nowhere" if known else "no equation gives the final answer")
    yield from plans


class Derivation:
    """The steps of one solution, in order; `sources` holds the expression of each step that has one, by index."""

    def __init__(self, question: str, answer: str, steps: list[Step]):
        self.steps = steps
        self.text = plain_text(answer)
        self.context = f"{question} {self.text}".lower()
        self.origins = Origins(question, self.text, steps)
        self.sources: dict[int, str] = {}
        for index, step in enumerate(steps):
            found = [self._expression(source, step) for source in step.expressions]
            good = [(-surety, order) for order, (source, surety, _) in enumerate(found) if OPERATION.search(source)]
            if good:
                source, _, keys = found[min(good)[1]]
                self.sources[index] = source
                self.origins.known.add(index)
                self.origins.used |= set(keys)

    def plan(self, last: list[int], ending: str = "", target: float = 0.0) -> Plan:
        """A plan of the steps that `last` need, in order, and of the question's numbers that these need.

        ending: source of a further assignment, whose value is `target`.
        """
        needed, waiting = set(), list(last)
        while waiting:
            index = waiting.pop()
            if index not in needed:
                needed.add(index)
                waiting += _indices("s", self.sources[index])
        steps = [Planned(index, self.steps[index], self.sources[index]) for index in sorted(needed)]
        if ending:
            lines = self.text.split("\n")
            end = Step((ending,), target, len(lines) - 1, len(lines[-1]), len(lines[-1]))
            steps.append(Planned(len(self.steps), end, ending))
        names = sorted({index for step in steps for index in _indices("q", step.source)})
        return Plan([Given(index, self.origins.mentions[index]) for index in names], steps)

    def endings(self, target: float) -> Iterator[Plan]:
        """Yields plans for an answer that no equation gives: a percentage, a rounded number, a last comparison."""
        for index in reversed(self.sources):
            if close(self.steps[index].value * 100, target):
                yield self.plan([index], f"s{index} * 100", target)
            exact = self._exact(index)
            if exact is not None and ROUNDED.search(self.context):
                for value, source in ((exact, f"s{index}"), (exact * 100, f"s{index} * 100")):
                    functions = [name for name, function in ROUNDINGS if function(value) == target]
                    if functions and not value.is_integer():
                        yield self.plan([index], f"{functions[0]}({source})", target)
        leaves = [index for index in self.sources if not self._serves(index)]
        if len(leaves) == 2 and COMPARED.search(self.text.split("\n")[-1]):
            (a, b), (first, second) = leaves, (self.steps[leaf].value for leaf in leaves)
            for found, source in (
                (first - second, f"s{a} - s{b}"),
                (second - first, f"s{b} - s{a}"),
                (first + second, f"s{a} + s{b}"),
            ):
                if same(found, target):
                    yield self.plan(leaves, source, target)

    def _serves(self, index: int) -> bool:
        """Whether another step needs this one."""
        return any(index in _indices("s", source) for source in self.sources.values())

    def _exact(self, index: int) -> float | None:
        """The value of a step's expression, computed without rounding in between."""

        def value(match: re.Match) -> str:
            number = int(match[2])
            found = self.origins.mentions[number].value if match[1] == "q" else self._exact(number)
            return "(1/0)" if found is None else repr(found)

        return evaluate(NAME.sub(value, self.sources[index]))

    def _expression(self, source: str, step: Step) -> tuple[str, float, list[str]]:
        """Replaces every number of an expression by its origin.

        Returns the new expression ("" if a number comes from nowhere), the score of its least certain origin, and the
        keys of its origins.
        """
        percent = self.origins.percent and not any(mention.states(0.01) for mention in self.origins.mentions)
        tree = ast.parse(source.replace("*0.01", "/100") if percent else source, mode="eval")
        replaced = self._ratios(tree, step)
        keys: list[str] = []
        surety = 10.0
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Constant)), key=lambda n: n.col_offset):
            if id(node) in replaced:
                continue
            unit = next((words for value, words in step.units if same(value, node.value)), "")
            origin = self.origins.find(float(node.value), step, unit, keys)
            if origin is None:
                return "", 0.0, []
            surety = min(surety, origin.score)
            keys.append(origin.key)
            replaced[id(node)] = ast.parse(origin.source, mode="eval").body
        return ast.unparse(_Replace(replaced).visit(tree)), surety, keys

    def _ratios(self, tree: ast.Expression, step: Step) -> dict[int, ast.expr]:
        """Finds divisions of two numbers that stand for one number; returns their replacements by id of the node.

        1/4 and 20/100 stay as they are if the question states the fraction, or 20%. A 2/3 that an earlier step computed
        becomes that step.
        """
        replaced: dict[int, ast.expr] = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
                continue
            top, bottom = node.left, node.right
            inner = isinstance(top, ast.BinOp) and isinstance(top.op, ast.Mult | ast.Div)  # 3 * 1 / 4 is (3 * 1) / 4
            top = top.right if inner else top
            if not (isinstance(top, ast.Constant) and isinstance(bottom, ast.Constant)) or not bottom.value:
                continue
            name = None if inner else self.origins.share(top.value / bottom.value, step)
            if name:
                replaced |= {id(node): ast.Name(name), id(top): top, id(bottom): bottom}
            elif bottom.value == 100 and self.origins.percent and not self.origins.is_plain(top.value, step):
                replaced[id(bottom)] = bottom
            elif any(_states_ratio(mention, top.value, bottom.value) for mention in self.origins.mentions):
                replaced |= {id(top): top, id(bottom): bottom}
        return replaced


class _Replace(ast.NodeTransformer):
    def __init__(self, replaced: dict[int, ast.expr]):
        self.replaced = replaced

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        return self.replaced.get(id(node)) or self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        operand = self.visit(node.operand)
        negated = isinstance(node.op, ast.USub) and isinstance(operand, ast.UnaryOp)
        return operand.operand if negated else ast.UnaryOp(node.op, operand)

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return self.replaced[id(node)]


def _states_ratio(mention: Mention, top: float, bottom: float) -> bool:
    """Whether this number of the question is the fraction top/bottom, or `top` percent if bottom is 100."""
    if mention.kind == "percent":
        return bottom == 100 and same(top, mention.value)
    stated = any(same(bottom, other) for other in mention.others)
    return mention.kind == "fraction" and stated and same(top / bottom, mention.value)


def _indices(kind: str, source: str) -> list[int]:
    return [int(match[2]) for match in NAME.finditer(source) if match[1] == kind]
