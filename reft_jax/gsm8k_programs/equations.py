"""Reads the equations of a worked solution: those in calculator marks and those written in its text.

`48/2 = <<48/2=24>>24 clips` holds the same equation twice: once for the calculator, and once with its units for the
reader. Both are read and become one `Step`, in which the mark's expression comes first. "Half is 48/2 = 24", without a
mark, is also read, with units between numbers and operators ("3 boxes * $5 per box = $15").
"""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from reft_jax.gsm8k_programs.numbers import DIGITS, same

UNKNOWN = "ξ"  # stands for the unknown's letter in text that algebra.py hands over
MARK = re.compile(r"<<(.*?)>>")
DIVISOR = re.compile(r"/(\d+/\d+)")  # "60 / 3/4 = 80"
STATED = re.compile(r"(?:[$€£]?\s*[\d,]*\.?\d+%?)?")  # the value that follows a mark
TOKEN = re.compile(
    rf"""(?P<number>(?:\d+\s+(?:and\s+)?\d/\d(?![\d/])|\d{{1,3}}(?:\ 000)+\b|{DIGITS})(?:\s?%|\s?percent\b)?[¼½¾]?)
    |(?P<op>[-+*/×÷–−](?=[\s$€£]*[\d.(ξ])|(?<=[\s\d)ξ])[-+*×÷–−/](?=\s))
    |(?P<times>(?<=[\s\d)])[xX](?=[\s$\d.(ξ])|\b(?:times|plus|minus|divided\sby|multiplied\sby)(?=\s[\d$.]))
    |(?P<unknown>ξ)|(?P<open>[(\[])|(?P<close>[)\]])|(?P<equals>[<>]?=|≥|\bequals\b)
    |(?P<word>[A-Za-z'’]+|[$€£¢#/°³²-])|(?P<stop>[^\s])""",
    re.VERBOSE,
)
OPERATORS = {"×": "*", "÷": "/", "–": "-", "−": "-", "x": "*", "X": "*", "times": "*"}
OPERATORS |= {"plus": "+", "minus": "-", "divided by": "/", "multiplied by": "*"}
SOURCE = {"open": "(", "close": ")", "unknown": UNKNOWN}
OPERANDS = ("number", "unknown")
SIGNS = {"¼": 0.25, "½": 0.5, "¾": 0.75}
MAX_UNIT = 6  # words between a number and the operator after it
ARTICLES = {"the", "his", "her", "their", "its", "a", "these", "those", "that", "this", "$"}


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    end: int


class Step(NamedTuple):
    """One equation of the solution.

    expressions: Python sources with plain numbers, which all give `value`; that of the mark comes first. line, start,
    end: the written equation is text[start:end] of this line. units: pairs of a number's value and the words after it
    in the written equation. subject: what the value is, in words, if the text defines an unknown.
    """

    expressions: tuple[str, ...]
    value: float
    line: int
    start: int
    end: int
    units: tuple[tuple[float, str], ...] = ()
    subject: str = ""


def plain_text(answer: str) -> str:
    """The solution without calculator marks and without its last line "#### 18"."""
    return MARK.sub("", answer.rpartition("####")[0]).strip()


def evaluate(expression: str) -> float | None:
    """The value of an arithmetic expression; None if it is not plain arithmetic, or divides by zero."""
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError("not plain arithmetic")


def close(a: float, b: float) -> bool:
    """Whether two numbers are equal up to the rounding of a person who writes a number down."""
    return abs(a - b) <= max(1e-2, 1e-6 * abs(b)) and (abs(b) >= 0.05 or abs(a - b) <= 0.05 * abs(b) + 1e-9)


def read_steps(answer: str) -> list[Step]:
    """Reads all steps of an official answer, in the order of the text. Equations that do not hold are left out."""
    steps = []
    for number, line in enumerate(answer.rpartition("####")[0].split("\n")):
        marks, text, at = [], "", 0
        for match in MARK.finditer(line):
            text += line[at : match.start()]
            marks.append((len(text), match[1]))
            at = match.end()
        text += line[at:]
        steps += _line_steps(text, marks, number)
    return steps


def _line_steps(text: str, marks: list[tuple[int, str]], line: int) -> list[Step]:
    written = written_equations(text, line)
    steps = []
    for place, mark in marks:
        left, _, right = mark.rpartition("=")
        expression, value = to_python(left), evaluate(to_python(right) or "")
        near = [step for step in written if step.start <= place <= step.end + 2]
        start, end = (near[0].start, near[0].end) if near else (place, STATED.match(text, place).end())
        if value is None:
            continue
        trivial = expression is None or not re.search(r"[-+*/]", expression[1:])
        right_value = evaluate(expression) if expression else None
        good = [] if trivial or right_value is None or not close(right_value, value) else [expression]
        others = [e for step in near if close(step.value, value) for e in step.expressions]
        units = tuple(unit for step in near for unit in step.units)
        if good or others:
            if any(step.value == value and step.start == start for step in steps):
                continue
            steps.append(Step(tuple(dict.fromkeys(good + others)), value, line, start, end, units))
    covered = [(step.start, step.end) for step in steps]
    steps += [step for step in written if not any(step.start < end and start < step.end for start, end in covered)]
    return sorted(steps, key=lambda step: step.end)


def to_python(text: str) -> str | None:
    """The whole of `text` as Python arithmetic; None if it is not an expression."""
    tokens = tokenize(text)
    return _join(tokens) if tokens and all(t.kind not in ("stop", "equals") for t in tokens) else None


def tokenize(text: str) -> list[Token]:
    """Splits text into numbers, operators, words and other signs."""
    tokens = []
    for match in TOKEN.finditer(text):
        kind = match.lastgroup
        if kind == "times":
            kind = "op" if tokens and tokens[-1].kind in ("number", "close", "word") else "word"
        if kind == "stop" and match[0] == "." and tokens and tokens[-1].kind == "op":
            continue
        tokens.append(Token(kind, match[0], match.start(), match.end()))
    return tokens


def written_equations(text: str, line: int) -> list[Step]:
    """Reads the equations written in a line of text. In a chain `a * b = c = d` all expressions have one value."""
    tokens = tokenize(text)
    steps = []
    for left, right, start, end in equation_sides(tokens):
        found, value = evaluate(left), evaluate(right)
        if value is not None and found is not None and not close(found, value):
            left = DIVISOR.sub(r"/(\1)", left)
            found = evaluate(left)
        if not re.search(r"[-+*/]", left[1:]) or value is None or found is None or not close(found, value):
            continue
        steps.append(Step((left,), value, line, start, end, _units(tokens)))
    return sorted(_chained(steps) + _without_equals(tokens, line), key=lambda step: step.start)


def _without_equals(tokens: list[Token], line: int) -> list[Step]:
    """Reads expressions without "=" whose value the same line states ("21 because 3 x 7")."""
    stated = {evaluate(_number(token.text)) for token in tokens if token.kind == "number"}
    steps, at = [], 0
    while at < len(tokens):
        best = at
        if tokens[at].kind in ("number", "open") and (not at or tokens[at - 1].kind not in ("op", "equals", "close")):
            for end in range(at + 1, len(tokens) + 1):
                if tokens[end - 1].kind in ("stop", "equals"):
                    break
                if tokens[end - 1].kind in ("number", "close") and _join(tokens[at:end]) is not None:
                    best = end
        if best - at >= 3 and not (best < len(tokens) and tokens[best].kind == "equals"):
            expression = _join(tokens[at:best])
            value = evaluate(expression)
            if any(number is not None and same(number, value) for number in stated):
                start, end = tokens[at].start, tokens[best - 1].end
                steps.append(Step((expression,), value, line, start, end, _units(tokens)))
        at = max(best, at + 1)
    return steps


def equation_sides(tokens: list[Token]) -> Iterator[tuple[str, str, int, int]]:
    """Yields (left, right, start, end) of every equation between two expressions, which may hold UNKNOWN."""
    places = [index for index, token in enumerate(tokens) if token.kind == "equals"]
    for number, place in enumerate(places):
        before = places[number - 1] if number else -1
        after = places[number + 1] if number + 1 < len(places) else len(tokens)
        left = _suffix(tokens[before + 1 : place])
        right = _prefix(tokens[place + 1 : after])
        if left and right:
            yield _join(left), _join(right), left[0].start, right[-1].end


def _chained(steps: list[Step]) -> list[Step]:
    """Keeps only the first equation of a chain a = b = c, extended to the end of the chain."""
    chains: list[Step] = []
    for step in steps:
        last = chains[-1] if chains else None
        if last and step.start < last.end and close(step.value, last.value):
            chains[-1] = last._replace(end=step.end, value=step.value)
        else:
            chains.append(step)
    return chains


def _suffix(tokens: list[Token]) -> list[Token]:
    """The longest end of `tokens` that is an expression; empty if no end is one."""
    best: list[Token] = []
    for start in range(len(tokens) - 1, -1, -1):
        if tokens[start].kind == "stop":
            break
        if tokens[start].kind in (*OPERANDS, "open") or (tokens[start].text == "-" and tokens[start].kind == "op"):
            if _join(tokens[start:]) is not None:
                best = tokens[start:]
    return best


def _prefix(tokens: list[Token]) -> list[Token]:
    """The shortest beginning of `tokens` that ends in a number and is a whole expression."""
    best: list[Token] = []
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1].kind == "stop" or (tokens[end - 1].kind == "word" and best):
            break
        if tokens[end - 1].kind in (*OPERANDS, "close") and _join(tokens[:end]) is not None:
            best = tokens[:end]
    return best


def _units(tokens: list[Token]) -> tuple[tuple[float, str], ...]:
    units = []
    for index, token in enumerate(tokens):
        words = ["$"] if index and tokens[index - 1].text in "$€£" else []
        for following in tokens[index + 1 : index + 1 + MAX_UNIT]:
            if following.kind != "word":
                break
            words.append(following.text.lower())
        if token.kind == "number" and words:
            value = evaluate(_number(token.text))
            units.append((value, " ".join(words)))
    return tuple(units)


def _join(tokens: list[Token]) -> str | None:
    """Python source of the expression that the tokens make, or None. Words are units between number and operator.

    "20% of 50" and "2(3)" are products. Two numbers with only words between them are not an expression.
    """
    parts: list[str] = []
    previous, words, depth = "", [], 0
    for token in tokens:
        if token.kind == "word":
            words.append(token.text.lower())
            if len(words) > MAX_UNIT:
                return None
            continue
        begins, behind = token.kind in (*OPERANDS, "open"), previous in (*OPERANDS, "close")
        if begins and behind:
            if words and not (words[0] == "of" and set(words[1:]) <= ARTICLES):
                return None
            if not words and token.kind == "number" and previous == "number":
                return None
            parts.append("*")
        elif begins and not previous and set(words) - {"$", "€", "£"}:
            return None
        elif token.kind in ("stop", "equals") or (token.kind == "op" and not behind and token.text not in "-–−"):
            return None
        depth += (token.kind == "open") - (token.kind == "close")
        if depth < 0:
            return None
        if token.kind == "number":
            parts.append(_number(token.text))
        else:
            parts.append(SOURCE.get(token.kind) or OPERATORS.get(token.text, token.text))
        previous, words = token.kind, []
    source = "".join(parts)
    if depth or previous not in (*OPERANDS, "close") or evaluate(source.replace(UNKNOWN, "1.5")) is None:
        return None
    return source


def _number(text: str) -> str:
    """Python source of a number: 1,000; 80 000; 20%; 1 1/2 and 1 and 1/4; ½."""
    mixed = re.match(r"(\d+)\s+(?:and\s+)?(\d)/(\d)", text)
    if mixed and mixed[3] != "0":
        value = int(mixed[1]) + int(mixed[2]) / int(mixed[3])
    else:
        match = re.match(DIGITS, re.sub(r" (?=000)", "", text))
        value = float(match[0].replace(",", "")) + SIGNS.get(text[-1], 0)
    source = str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return f"({source}/100)" if "%" in text or "percent" in text else source
