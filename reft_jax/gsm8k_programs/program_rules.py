"""Checks the rules that a converted program must keep, on its finished text.

This module shares no code with the modules that write programs: it parses the program again and reads numbers with its
own reader, so that it finds mistakes of the others. It does not check the result: programs are executed elsewhere.
"""

import ast
import builtins
import keyword
import re

from reft_jax.gsm8k_programs.constants import COUNTS, is_known, stems
from reft_jax.gsm8k_programs.words import ABBREVIATIONS, PARTICIPLES, singular

NUMERALS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
} | {"thirty": 30, "forty": 40, "fourty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
SCALES = {"dozen": 12, "dozens": 12, "hundred": 100, "thousand": 1000, "k": 1000, "million": 10**6, "billion": 10**9}
PARTS = "half:2 third:3 quarter:4 fourth:4 fifth:5 sixth:6 seventh:7 eighth:8 ninth:9 tenth:10 twelfth:12 twentieth:20"
DENOMINATORS = {name: int(value) for name, _, value in (part.partition(":") for part in PARTS.split())}
DENOMINATORS |= {f"{name}s": value for name, value in DENOMINATORS.items()} | {"halves": 2}
FACTORS = {
    1: set("once first single".split()),
    2: set("twice double doubled doubles doubling pair pairs couple twin twins both halved second".split()),
    3: set("thrice triple tripled triples triplets".split()),
    4: set("quadruple quadrupled quadruples".split()),
}
ARTICLES = ("a", "an", "one")
TOKEN = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+|[a-z]+|[%/¢¼½¾]")
MARKED = re.compile(r"=\s*(-?[\d,]*\.?\d+)(?=>>)")
WRITTEN = re.compile(r"=\s*[$€£]?\s*(-?\d[\d,]*\d(?:\.\d+)?|-?\d(?:\.\d+)?|\.\d+)(?!\s*[-+*/x×\d]\s*[\d(])")
FRACTION_SIGNS = {"¼": 0.25, "½": 0.5, "¾": 0.75}
# Words that a name may contain although neither question nor solution has them: they say what kind a quantity is.
JOINING = set(
    """total left per extra fewer more initial other new updated final next last further each of in on at from for to
    with during by after before price cost pay money dollars cents amount share result size age height length
    width depth distance thickness weight years older younger later remaining half third quarter double triple
    rounded needed percent percentage score tax revenue difference spent earned earnings saved paid""".split()
)
MEANINGLESS = set("step steps value values var variable temp tmp num number res answer quantity unknown".split())


def broken_rules(program: str, question: str, answer: str) -> list[str]:
    """Lists the rules that a program made from an official row breaks; empty if it keeps all.

    question, answer: the fields of the row; the answer with its calculator marks and its last line "#### 18".
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError) as error:
        return [f"not Python: {error}"]
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].name != "solution":
        return ["not one function `solution`"]
    function = tree.body[0]
    if ast.get_docstring(function, clean=False) != question.strip():
        return ["the docstring is not the question"]
    *assignments, last = function.body[1:]
    if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == "result"):
        return ["does not end in `return result`"]
    simple = all(
        isinstance(a, ast.Assign) and len(a.targets) == 1 and isinstance(a.targets[0], ast.Name) for a in assignments
    )
    if not simple or not assignments or assignments[-1].targets[0].id != "result":
        return ["not one assignment per step with `result` as the last"]
    names = [assignment.targets[0].id for assignment in assignments]
    problems = _name_problems(names, f"{question} {answer}") + _use_problems(assignments, names)
    return problems + _literal_problems(assignments, question, answer)


def _name_problems(names: list[str], text: str) -> list[str]:
    words = {word.lower().replace("é", "e") for word in re.findall(r"[A-Za-zé]+", text)}
    said = words | {singular(word) for word in words} | {PARTICIPLES[word] for word in words if word in PARTICIPLES}
    written_out = {part for word in words for part in ABBREVIATIONS.get(word, "").split("_")}
    said |= {f"{word}s" for word in words} | written_out | {singular(word) for word in written_out}
    problems = []
    for name in names[:-1]:
        parts = name.split("_")
        if not re.fullmatch(r"[a-z]+(_[a-z]+)*", name) or hasattr(builtins, name) or keyword.iskeyword(name):
            problems.append(f"`{name}` is not a valid name for a quantity")
        elif MEANINGLESS & set(parts) and MEANINGLESS & set(parts) - said or len(max(parts, key=len)) < 3:
            problems.append(f"`{name}` means nothing")
        elif not set(parts) <= said | JOINING:
            problems.append(f"`{name}` is not from the text")
    if len(set(names)) != len(names):
        problems.append("a name is assigned twice")
    return problems


def _use_problems(assignments: list[ast.Assign], names: list[str]) -> list[str]:
    problems, known, used = [], set(), {"result"}
    for assignment, name in zip(assignments, names, strict=True):
        read = {node.id for node in ast.walk(assignment.value) if isinstance(node, ast.Name)} - {"math", "round"}
        problems += [f"`{other}` is used before it is assigned" for other in sorted(read - known)]
        known.add(name)
        used |= read
    if not any(isinstance(node, ast.Name) for node in ast.walk(assignments[-1].value)):
        problems.append("`result` is not computed")
    return problems + [f"`{name}` is never used" for name in names if name not in used]


def _literal_problems(assignments: list[ast.Assign], question: str, answer: str) -> list[str]:
    stated = stated_numbers(question)
    results = _results(answer)
    introduced = stated_numbers(re.sub(r"<<(.*?)=[^=]*>>", r" \1 ", answer.rpartition("####")[0]))
    words = stems(f"{question} {answer}")
    problems = []
    for assignment in assignments:
        for node in ast.walk(assignment.value):
            if not isinstance(node, ast.Constant):
                continue
            number = node.value
            if isinstance(number, bool) or not isinstance(number, int | float):
                problems.append(f"{number!r} is not a number")
            elif number in (0, 1, 100) or _among(number, stated) or is_known(number, words):
                continue
            elif _among(number, results):
                problems.append(f"{number} is a result, and the question does not state it")
            elif number not in COUNTS or not _among(number, introduced):
                problems.append(f"{number} is neither in the question nor a well-known constant")
    return problems


def _among(number: float, numbers: set[float]) -> bool:
    return any(abs(number - other) <= 1e-9 * max(1.0, abs(other)) for other in numbers)


def _results(answer: str) -> set[float]:
    """The results of the solution: right sides of its equations, those in marks included, and the final answer."""
    text, _, final = answer.rpartition("####")
    found = MARKED.findall(text) + WRITTEN.findall(re.sub(r"<<.*?>>", "", text)) + [final.strip()]
    return {float(number.replace(",", "")) for number in found if re.fullmatch(r"-?[\d,]*\.?\d+", number)}


def stated_numbers(text: str) -> set[float]:
    """Finds every number that `text` states, in digits or words.

    25% states 25 and 0.25; "half" states 0.5 and 2; "two dozen" states 2, 12 and 24; "four and a half" states 4.5.
    """
    numbers: set[float] = set()
    tokens = TOKEN.findall(text.lower().replace("-", " "))
    previous: float | None = None
    for index, token in enumerate(tokens):
        if token == "and" and previous is not None and previous >= 100:
            continue  # a hundred and five
        value = None
        if token[-1].isdigit():
            value = float(token.replace(",", ""))
            numbers |= _fractions(tokens[max(0, index - 4) : index], value)
        elif token in NUMERALS:
            value = float(NUMERALS[token])
            if previous is not None and (previous >= 100 or (previous >= 20 and previous % 10 == 0 and value < 10)):
                numbers.add(value)
                value += previous
        elif token in SCALES:
            numbers.add(float(SCALES[token]))
            value = SCALES[token] * (1.0 if previous is None else previous)
        elif token in FRACTION_SIGNS:
            value = FRACTION_SIGNS[token] + (previous or 0.0)
        elif token in ("%", "percent", "cent", "cents", "¢") and previous is not None:
            numbers.add(previous / 100)
        elif token in DENOMINATORS:
            numbers |= {float(DENOMINATORS[token]), (previous or 1.0) / DENOMINATORS[token]}
        numbers |= {float(factor) for factor, words in FACTORS.items() if token in words}
        behind = [other for other in tokens[index + 1 : index + 4] if other not in ARTICLES]
        if behind[:1] == ["and"] and behind[1:] and behind[1] in DENOMINATORS:
            one = index and tokens[index - 1] in ARTICLES  # an hour and a half
            numbers |= {
                base + 1 / DENOMINATORS[behind[1]] for base in (value, 1.0 if one else None) if base is not None
            }
        if value is not None:
            numbers.add(value)
        previous = value
    return numbers


def _fractions(before: list[str], bottom: float) -> set[float]:
    """Values of fractions such as 1/2, 2 1/2, "2 and 1/2": `before` are the tokens before the denominator `bottom`."""
    if before[-1:] != ["/"] or len(before) < 2 or not before[-2][-1].isdigit() or not bottom:
        return set()
    part = float(before[-2].replace(",", "")) / bottom
    wholes = [token for token in before[:-2][-2:] if token != "and"][-1:]
    return {part} | {float(whole.replace(",", "")) + part for whole in wholes if whole[-1].isdigit()}
