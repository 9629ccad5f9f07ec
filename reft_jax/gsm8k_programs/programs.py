"""Writes programs from plans: `def solution()`, the question as docstring, one quantity or step per line, `result`."""

import re

from reft_jax.gsm8k_programs import naming
from reft_jax.gsm8k_programs.derivation import NAME, Plan, Planned
from reft_jax.gsm8k_programs.equations import plain_text
from reft_jax.gsm8k_programs.numbers import read_numbers
from reft_jax.gsm8k_programs.origins import literal_of, stated_literal
from reft_jax.gsm8k_programs.phrases import noun_phrase
from reft_jax.gsm8k_programs.words import MONEY, singular

MONEY_SIGN = re.compile(r"[$€£]\s*[\d.,]*$")
COMPARISON = re.compile(r"\b(?:more|fewer|less|older|younger|taller|longer|faster|difference)\b")
OPERATOR = re.compile(r" ([-+*/]) ")
AFFIX = re.compile(
    r"^(?:price|pay|dollars)_per_|^(?:total|initial|new|remaining|share_of)_|_(?:left|each|price|cost|needed|difference)$|_per_.*"
)
SHARES = ("discount", "tax", "taxes", "tip", "interest", "fee", "commission", "bonus", "loss", "profit", "increase")
PERCENTAGE = re.compile(r"s\d+ \* 100|(?:round|math\.\w+)\(s\d+ \* 100\)")
MULTIPLES = {"* 2": "double", "2 *": "double", "* 3": "triple", "3 *": "triple"}
MULTIPLES |= {"/ 2": "half_of", "/ 3": "third_of", "/ 4": "quarter_of", "* 0.5": "half_of", "0.5 *": "half_of"}
WEAK = set("money cost total_amount total_money dollars price minutes hours days people feet".split())


def write_program(question: str, answer: str, plan: Plan) -> str:
    """Writes the text of the program. A number of the question without a name is written where it is used.

    Raises naming.Unnameable.
    """
    lines = plain_text(answer).split("\n")
    proposals, fallbacks, meaning = {}, {}, {}
    for given in plan.givens:
        key, names = f"q{given.index}", naming.given_names(question, given.mention)
        if names:
            proposals[key], fallbacks[key] = names, names[-1]
        else:
            literal = stated_literal(given.mention)
            meaning[key] = f"({literal})" if " " in literal else literal
    stated = len(proposals)
    for planned in plan.steps:
        likely = fallbacks | {key: names[0] for key, names in proposals.items() if names}
        by_operation = _by_operation(planned.source, likely, lines[planned.step.line])
        names = _proposals(planned, lines[planned.step.line], question, planned is plan.steps[-1])
        if names and names[0] in WEAK:
            names = naming.unique([_stronger(names[0], planned.source, by_operation), *names])
        key = f"s{planned.index}"
        proposals[key], fallbacks[key] = names, by_operation
    chosen = naming.choose(list(proposals.values()), list(fallbacks.values()), stated)
    meaning |= dict(zip(proposals, chosen, strict=True))
    written = {f"q{given.index}": stated_literal(given.mention) for given in plan.givens}
    written |= {f"s{p.index}": NAME.sub(lambda match: meaning[match[0]], p.source) for p in plan.steps}
    body = [f"{meaning[key]} = {written[key]}" for key in proposals]
    body += [f"result = {meaning[f's{plan.steps[-1].index}']}", "return result"]
    return "\n".join([f'def solution():\n    """{question}"""', *(f"    {line}" for line in body)])


def _proposals(planned: Planned, line: str, question: str, last: bool) -> list[str]:
    """Proposes names for a step: from its definition, from its sentence and, for the last step, from the question."""
    step = planned.step
    if PERCENTAGE.fullmatch(planned.source) and last:
        return ["percentage" if re.search(r"%|percent", f"{question} {line}") else "cents"]
    money = MONEY_SIGN.search(line[: step.end].rstrip()) or re.match(r"\s*\$", line[step.end :])
    names = naming.subject_names(step.subject) if step.subject else []
    names += naming.step_names(line, step.start, step.end, step.value, bool(money))
    if last:
        weak = [name for name in names if name in WEAK]
        names = [name for name in names if name not in WEAK] + naming.question_names(question) + weak
    return naming.unique(_share_names(planned.source, question, not names or names[0] in WEAK) + names)


def _share_names(source: str, question: str, unnamed: bool) -> list[str]:
    """Proposes `discount` for 20 / 100 * price, if the question mentions a 20% discount.

    A word further away from the number counts only for a product without a better name.
    """
    names = []
    for mention in read_numbers(question):
        literals = f"{re.escape(literal_of(mention.value))} / 100|{re.escape(literal_of(mention.value / 100))}"
        if mention.kind != "percent" or not re.search(rf"(?<![\w.])(?:{literals})(?![\w.])", source):
            continue
        noun = noun_phrase(question[mention.end :])
        around = question[max(0, mention.start - 30) : mention.end + 40].lower()
        if noun.split("_")[-1] in SHARES:
            names.append(noun)
        elif unnamed and " * " in source:
            names += [word for word in SHARES if re.search(rf"\b{word}\b", around)]
    return names


def _stronger(name: str, source: str, by_operation: str) -> str:
    """Replaces a weak name: by `total_minutes`, `money_left` or a name made from the operands."""
    if name in ("money", "total_money", "dollars") and not by_operation.endswith(("_cost", "earnings", "difference")):
        return "money_left" if " - " in source else "total_money"
    converted = name not in MONEY and len(NAME.findall(source)) == 1  # hours * 60
    return f"total_{name}" if converted else by_operation


def _by_operation(source: str, names: dict[str, str], line: str) -> str:
    """A name from the operation and its operands: stickers / students is `stickers_per_student`."""
    if source.startswith("100 - "):
        return "remaining_percent"
    operands = [names[match[0]] for match in NAME.finditer(source) if match[0] in names]
    operator = OPERATOR.search(source)
    if operands and not operator and "(" in source:
        return f"rounded_{operands[0]}"
    if not operator or not operands:
        return "total_amount"
    nouns = [AFFIX.sub("", name) for name in operands]
    multiple = MULTIPLES.get(NAME.sub("", source).strip())
    if multiple:
        return f"{multiple}_{nouns[0]}"
    if operator[1] == "+":
        kinds = {name.split("_")[-1] for name in operands}
        return f"total_{kinds.pop() if len(kinds) == 1 else nouns[0]}"
    if operator[1] == "-":
        return f"{nouns[0]}_difference" if COMPARISON.search(line) else f"remaining_{nouns[0]}"
    if operator[1] == "*":
        if any(name.startswith("pay_per") for name in operands):
            return "earnings"
        goods = [re.sub(r"^price_per_|_price$", "", name) for name in operands if "price" in name]
        rates = [name.partition("_per_")[0] for name in operands if "_per_" in name]
        return f"{goods[0]}_cost" if goods else f"total_{(rates or nouns)[0]}"
    if (
        len(operands) == 2
        and not re.search("_per_|price|dollars|money|cost|pay|spent", operands[1])
        and len(nouns[1]) < 16
    ):
        what, each = singular(nouns[0]), singular(nouns[1])
        if not set(what.split("_")) & set(each.split("_")):
            return f"{nouns[0]}_per_{each}"
    return f"share_of_{nouns[0]}"
