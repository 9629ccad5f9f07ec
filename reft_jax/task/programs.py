"""Programs from plans: `def solution()`, the question as docstring, one named quantity or step a line, `result`."""

import re

from reft_jax.task import naming
from reft_jax.task.derivation import Plan, Planned, _literal, literal_of
from reft_jax.task.equations import MARK
from reft_jax.task.numbers import read_numbers
from reft_jax.task.phrases import noun_phrase
from reft_jax.task.words import singular

MONEY_SIGN = re.compile(r"[$€£]\s*[\d.,]*$")
COMPARISON = re.compile(r"\b(?:more|fewer|less|older|younger|taller|longer|faster|difference)\b")
DISCOUNTS = ("discount", "tax", "taxes", "tip", "interest", "fee", "commission", "bonus", "loss", "profit", "increase")
WEAK = {"money", "cost", "total_amount", "total_money", "dollars", "price", "minutes", "hours", "days", "people", "feet"}


def write_program(question: str, answer: str, plan: Plan) -> str:
    """The text of the program. A number of the question that no name fits stands where it is used."""
    lines = MARK.sub("", answer).split("\n")
    givens = [(given, naming.given_names(question, given.mention)) for given in plan.givens]
    named = [(given, names) for given, names in givens if names]
    proposals = {f"q{given.index}": names for given, names in named}
    fallbacks = {f"q{given.index}": names[-1] for given, names in named}
    for planned in plan.steps:
        key = f"s{planned.index}"
        known = {**fallbacks, **{other: names[0] for other, names in proposals.items() if names}}
        by_operation = _by_operation(planned.source, known, lines[planned.step.line])
        names = _proposals(planned, lines, question, planned is plan.steps[-1])
        if names and names[0] in WEAK:
            names = list(dict.fromkeys([*naming.unique([by_operation]), *names]))
        proposals[key], fallbacks[key] = names, by_operation
    meaning = dict(zip(proposals, naming.choose(list(proposals.values()), list(fallbacks.values()), len(named)), strict=True))
    meaning |= {f"q{given.index}": literal_of(given.mention) for given, names in givens if not names}
    body = [f"{meaning[f'q{given.index}']} = {literal_of(given.mention)}" for given, _ in named]
    for planned in plan.steps:
        source = re.sub(r"\b[qs]\d+\b", lambda match: meaning[match[0]], planned.source)
        body.append(f"{meaning[f's{planned.index}']} = {source}")
    body += [f"result = {meaning[f's{plan.steps[-1].index}']}", "return result"]
    return "\n".join([f'def solution():\n    """{question.strip()}"""', *(f"    {line}" for line in body)])


def _proposals(planned: Planned, lines: list[str], question: str, last: bool) -> list[str]:
    step = planned.step
    line = lines[step.line]
    money = bool(MONEY_SIGN.search(line[: step.end].rstrip())) or bool(re.match(r"\s*\$", line[step.end :]))
    names = naming.subject_names(step.subject) if step.subject else []
    names += naming.step_names(line, step.start, step.end, step.value, money)
    if last or not names:
        asked = naming.question_names(question) if last else []
        weak = [name for name in names if name in WEAK]
        names = [name for name in names if name not in weak] + asked + weak
    for mention in read_numbers(question):
        literals = f"{re.escape(_literal(mention.value))} / 100|{re.escape(_literal(mention.value / 100))}"
        if mention.kind == "percent" and re.search(rf"(?<![\w.])(?:{literals})(?![\w.])", planned.source):
            noun = noun_phrase(question[mention.end :])
            around = question[max(0, mention.start - 30) : mention.end + 40].lower()
            said = [word for word in DISCOUNTS if re.search(rf"\b{word}\b", around)]
            if noun.split("_")[-1] in DISCOUNTS:
                names.insert(0, noun)
            elif said and (not names or names[0] in WEAK) and " * " in planned.source:
                names.insert(0, said[0])
    return naming.unique(names)


def _by_operation(source: str, names: dict[str, str], line: str) -> str:
    """A name from what is done with the operands: stickers / students is `stickers_per_student`."""
    operands = [names[name] for name in re.findall(r"\b[qs]\d+\b", source) if name in names]
    operator = re.search(r" ([-+*/]) ", source)
    if source.startswith("100 - "):
        return "remaining_percent"
    if not operator or not operands:
        return "total_amount"
    nouns = [re.sub(r"^(?:total|initial|new)_|_(?:left|each|price|cost|needed)$|_per_.*|^(?:price|pay|dollars)_per_", "", name) for name in operands]
    first = nouns[0]
    if operator[1] == "+":
        kinds = {name.split("_")[-1] for name in operands}
        return f"total_{kinds.pop()}" if len(kinds) == 1 else f"total_{first}"
    if operator[1] == "-":
        return f"{first}_difference" if COMPARISON.search(line) else f"remaining_{first}"
    if operator[1] == "*":
        if any(name.startswith("pay_per") for name in operands):
            return "earnings"
        goods = [re.sub(r"^price_per_|_price$", "", name) for name in operands if "price" in name]
        rates = [name.partition("_per_")[0] for name in operands if "_per_" in name]
        return f"{goods[0]}_cost" if goods else f"total_{rates[0]}" if rates else f"total_{first}"
    if len(operands) == 2 and not re.search("_per_|price|dollars|money", operands[1]) and len(nouns[1]) < 16:
        what, each = singular(first), singular(nouns[1])
        if not set(what.split("_")) & set(each.split("_")):
            return f"{first}_per_{each}"
    return f"share_of_{first}"
