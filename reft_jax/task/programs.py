"""Programs from plans: `def solution()`, the question as docstring, one named quantity or step a line, `result`."""

import re

from reft_jax.task import naming
from reft_jax.task.derivation import Plan, Planned, _literal, literal_of
from reft_jax.task.equations import MARK
from reft_jax.task.numbers import read_numbers

MONEY_SIGN = re.compile(r"[$€£]\s*[\d.,]*$")
DISCOUNTS = {"discount", "tax", "tip", "interest", "fee", "commission", "raise", "bonus", "loss", "profit", "increase"}


def write_program(question: str, answer: str, plan: Plan) -> str:
    """The text of the program. A number of the question that no name fits stands where it is used."""
    lines = MARK.sub("", answer).split("\n")
    givens = [(given, naming.given_names(question, given.mention)) for given in plan.givens]
    named = [(given, names) for given, names in givens if names]
    proposals = {f"q{given.index}": names for given, names in named}
    fallbacks = {f"q{given.index}": names[-1] for given, names in named}
    for planned in plan.steps:
        key = f"s{planned.index}"
        fallbacks[key] = _by_operation(planned.source, {**fallbacks, **{k: v[0] for k, v in proposals.items() if v}})
        proposals[key] = _proposals(planned, lines, question, planned is plan.steps[-1])
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
        weak = [name for name in names if name in ("money", "cost", "total_amount", "total_cost", "total_money")]
        names = [name for name in names if name not in weak] + asked + weak
    for mention in read_numbers(question):
        noun = naming.noun_phrase(question[mention.end :]) if mention.kind == "percent" else ""
        if noun.split("_")[-1] in DISCOUNTS and re.search(rf"\b{re.escape(_literal(mention.value))} / 100|{_literal(mention.value / 100)}\b", planned.source):
            names.insert(0, noun)
    return naming.unique(names)


def _by_operation(source: str, names: dict[str, str]) -> str:
    """A name from what is done with the operands: apples - eaten is `apples_left`."""
    operands = [names.get(name, "") for name in re.findall(r"\b[qs]\d+\b", source)]
    first = re.sub(r"^total_|_left$|_per_.*", "", operands[0]) if operands else ""
    operator = re.search(r" ([-+*/]) ", source)
    if not operator or not first:
        return "amount"
    if operator[1] == "+":
        return f"total_{first}"
    if operator[1] == "-":
        return f"{first}_left"
    rates = [name.partition("_per_")[0] for name in operands if "_per_" in name]
    if operator[1] == "*":
        return f"total_{rates[0]}" if rates else f"total_{first}"
    return f"share_of_{first}"
