"""Solves linear equations in one unknown, as worked solutions write them: "x + (x + 55) = 215" is (215 - 55) / 2."""

import ast
import re
from collections.abc import Iterator

from reft_jax.gsm8k_programs.equations import MARK, UNKNOWN, Step, close, equation_sides, evaluate, tokenize
from reft_jax.gsm8k_programs.numbers import read_numbers

LETTER = re.compile(r"(?<![A-Za-z'’])([A-Za-z])(?![A-Za-z'’])")
DEFINED = r"[^.\n]*?\b{letter}\b[\"']?\s+(?:be|is|represents?|equals?|stands? for|denotes?|=)\s+(?:equal to )?"
ONES = "ones"  # kind of the coefficients of x and of x + x, which are added up; x + 2 x keeps its 1 + 2
Side = tuple[ast.expr | None, ast.expr | None]  # coefficient of the unknown, constant; None is zero


def solved_unknowns(answer: str) -> list[Step]:
    """One step per unknown that an equation of the answer determines and whose value the text states."""
    text = MARK.sub("", answer.rpartition("####")[0])
    stated = [number.value for number in read_numbers(answer)]
    steps, known = [], set()
    for line, content in enumerate(text.split("\n")):
        for letter in sorted(set(LETTER.findall(content)) - known):
            if not (_meaning(text, letter) or re.search(rf"(?<![\w)] ){letter}\s*=|=\s*{letter}(?![A-Za-z])", text)):
                continue  # an article ("a"), or the sign of a multiplication ("x")
            for source, value, start, end in _solutions(content, letter):
                if any(close(value, number) for number in stated):
                    steps.append(Step((source,), value, line, start, end, subject=_meaning(text, letter)))
                    known.add(letter)
                    break
    return steps


def _meaning(text: str, letter: str) -> str:
    """The meaning of the unknown, from a text such as "Let x be the number of hens"; "" if none is given."""
    after = re.search(rf"\b(?:[Ll]et|[Ii]f|[Ss]ay|[Aa]ssume)\b{DEFINED.format(letter=letter)}([^.\n;=+*]+)", text)
    if after:
        return after[1]
    before = re.search(rf"\b(?:[Ll]et|[Ss]ay|[Ii]f)\s+(?:us say )?([^.\n;=+*]+?)\s+(?:be|is|=|as)\s+{letter}\b", text)
    return before[1] if before else ""


def _solutions(line: str, letter: str) -> Iterator[tuple[str, float, int, int]]:
    """Yields (Python source of the unknown's value, value, start, end) for each equation of the line that gives one."""
    times = r"(?!\s*[\d$(])" if letter in "xX" else ""
    either = letter if letter in "aAiI" else f"[{letter.lower()}{letter.upper()}]"  # "Let J be ..., 3(j - 11)"
    text = re.sub(rf"(?<![A-Za-z'’]){either}(?![A-Za-z'’]){times}", UNKNOWN, line)
    for left, right, start, end in equation_sides(tokenize(text)):
        if UNKNOWN not in left + right:
            continue
        try:
            (a, b), (c, d) = (
                _linear(ast.parse(side.replace(UNKNOWN, "unknown"), mode="eval").body) for side in (left, right)
            )
            over, under = _minus(d, b), _minus(a, c)
            if under is not None and _number(under) < 0:
                over, under = _minus(b, d), _minus(c, a)
            if over is None or under is None:
                continue
            source = ast.unparse(over if _number(under) == 1 else ast.BinOp(over, ast.Div(), under))
        except (SyntaxError, ValueError):
            continue
        value = evaluate(source)
        if value is not None and re.search(r"[-+*/]", source[1:]):
            yield source, value, start, end


def _number(node: ast.expr) -> float:
    value = evaluate(ast.unparse(node))
    if value is None:
        raise ValueError("not a number")
    return value


def _linear(node: ast.expr) -> Side:
    if isinstance(node, ast.Name):
        return ast.Constant(1, ONES), None
    if isinstance(node, ast.Constant):
        return None, node if node.value else None
    if isinstance(node, ast.UnaryOp):
        a, b = _linear(node.operand)
        return _minus(None, a), _minus(None, b)
    if not isinstance(node, ast.BinOp):
        raise ValueError("not plain arithmetic")
    (a, b), (c, d) = _linear(node.left), _linear(node.right)
    if isinstance(node.op, ast.Add):
        return _plus(a, c), _plus(b, d)
    if isinstance(node.op, ast.Sub):
        return _minus(a, c), _minus(b, d)
    if isinstance(node.op, ast.Mult) and a is None:
        return _times(b, c), _times(b, d)
    if c is None and d is not None and isinstance(node.op, ast.Mult):
        return _times(a, d), _times(b, d)
    if c is None and d is not None and isinstance(node.op, ast.Div):
        return tuple(part and ast.BinOp(part, ast.Div(), d) for part in (a, b))
    raise ValueError("not linear")


def _plus(a: ast.expr | None, b: ast.expr | None) -> ast.expr | None:
    if a is None or b is None:
        return a or b
    if getattr(a, "kind", None) == getattr(b, "kind", None) == ONES:
        return ast.Constant(a.value + b.value, ONES)
    return ast.BinOp(a, ast.Add(), b)


def _minus(a: ast.expr | None, b: ast.expr | None) -> ast.expr | None:
    if b is None:
        return a
    if a is None:
        return ast.UnaryOp(ast.USub(), b)
    if isinstance(b, ast.UnaryOp):
        return _plus(a, b.operand)
    if ast.dump(a) == ast.dump(b):
        return None
    return ast.BinOp(a, ast.Sub(), b)


def _times(a: ast.expr | None, b: ast.expr | None) -> ast.expr | None:
    if a is None or b is None:
        return None
    if isinstance(a, ast.Constant) and a.value == 1:
        return b
    if isinstance(b, ast.Constant) and b.value == 1:
        return a
    return ast.BinOp(a, ast.Mult(), b)
