"""The material of the toy word problems: names, things and kinds of question. Only data, used by problems.py.

The slots of a template: `{Ann}`, `{Ben}`, `{Cleo}` are three people (`{ann}` ... their variables), `{she}` is Ann's
pronoun, `{things}` and `{others}` are two kinds of object, `{box}`/`{boxes}` a container, `{a}` to `{d}` the numbers.
In a step's sentence `{value}` is the step's value or its whole equation. All numbers are at least 2, so plurals are
correct. The vocabulary is small on purpose: a model of 0.2 million parameters learns it from scratch.
"""

from collections.abc import Callable
from typing import NamedTuple

PEOPLE = tuple((name, "she") for name in "Anna Emma Kate Lily Mia Nora Ruth Sara".split()) + tuple(
    (name, "he") for name in "Ben Dan Jack Leo Noah Paul Sam Tom".split()
)
THINGS = tuple("apples balls books cards coins cookies eggs hats keys marbles oranges pens shells stamps toys".split())
CONTAINERS = (("bag", "bags"), ("basket", "baskets"), ("box", "boxes"), ("jar", "jars"), ("pack", "packs"))

# Sentences with a number that the question does not need, and the range of that number.
DISTRACTORS = (
    ("{Ann} is {k} years old.", 8, 60),
    ("{Ann} has {k} cousins.", 2, 12),
    ("{Ann} has {k} {extras} at home.", 2, 40),
    ("{Ann} lives at number {k}.", 2, 60),
    ("The shop opens at {k}.", 7, 11),
    ("The trip took {k} minutes.", 5, 60),
    ("It is {k} degrees outside.", 10, 35),
)


class Step(NamedTuple):
    """One assignment `name = expression`, and `sentence`, which says the same in words (no capital, no full stop)."""

    name: str
    expression: str
    sentence: str


class Family(NamedTuple):
    """One kind of problem.

    numbers: `numbers(between)` draws a, b, ... with `between(low, high)`, both ends included. given: variable name of
    each number that the question states. steps, other_steps: one or two correct ways from these to `result`.
    """

    name: str
    numbers: Callable[[Callable[[int, int], int]], dict[str, int]]
    given: dict[str, str]
    questions: tuple[str, ...]
    steps: tuple[Step, ...]
    other_steps: tuple[Step, ...] = ()

    @property
    def solutions(self) -> tuple[tuple[Step, ...], ...]:
        """The ways to the result, all equally likely."""
        return (self.steps, self.other_steps) if self.other_steps else (self.steps,)


def _stock(between: Callable[[int, int], int]) -> int:
    """Draws a count; one in ten has three digits."""
    return between(100, 300) if between(1, 10) == 1 else between(5, 60)


FAMILIES = (
    Family(
        "gain",
        lambda between: {"a": _stock(between), "b": between(2, 40)},
        {"{things}": "a", "more": "b"},
        (
            "{Ann} has {a} {things}. {Ben} gives {Ann} {b} more. How many {things} does {Ann} have now?",
            "{Ann} found {a} {things} and then bought {b} more. How many {things} does {she} have in total?",
            "There were {a} {things} in the {box}. {Ann} puts {b} more in. How many {things} are in the {box} now?",
            "{Ben} gives {b} {things} to {Ann}, who had {a} at first. How many {things} does {Ann} have now?",
        ),
        (Step("result", "{things} + more", "there are {value} {things} now"),),
    ),
    Family(
        "loss",
        lambda between: {"a": (a := _stock(between)), "b": between(2, min(a - 2, 60))},
        {"{things}": "a", "gone": "b"},
        (
            "{Ann} has {a} {things} and gives {b} to {Ben}. How many {things} are left?",
            "{Ann} had {a} {things}. {She} lost {b} of them. How many {things} does {she} still have?",
            "Out of {a} {things}, {Ann} sold {b}. How many {things} are left?",
            "{Ben} took {b} {things} from {Ann}, who had {a}. How many {things} does {Ann} have left?",
        ),
        (Step("result", "{things} - gone", "{value} {things} are left"),),
    ),
    Family(
        "groups",
        lambda between: {"a": between(2, 12), "b": between(3, 20)},
        {"{boxes}": "a", "each": "b"},
        (
            "{Ann} has {a} {boxes} with {b} {things} in each. How many {things} does {she} have?",
            "There are {a} {boxes}. Each {box} holds {b} {things}. How many {things} are there in total?",
            "{Ann} puts {b} {things} in each of {a} {boxes}. How many {things} does {she} need?",
            "If one {box} holds {b} {things}, how many {things} do {a} {boxes} hold?",
        ),
        (Step("result", "{boxes} * each", "there are {value} {things} in total"),),
    ),
    Family(
        "share",
        lambda between: {"b": (b := between(2, 9)), "a": b * between(2, 12)},
        {"{things}": "a", "friends": "b"},
        (
            "{Ann} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
            "A group of {b} friends split {a} {things} equally. How many {things} does each friend get?",
            "{Ann} has {a} {things} for {b} friends. If all get the same, how many {things} does each friend get?",
            "There are {b} friends and {a} {things}. {Ann} shares them equally. How many does each friend get?",
        ),
        (Step("result", "{things} / friends", "each friend gets {value} {things}"),),
    ),
    Family(
        "groups_loss",
        lambda between: {"a": (a := between(2, 10)), "b": (b := between(4, 15)), "c": between(2, min(a * b - 2, 40))},
        {"{boxes}": "a", "each": "b", "gone": "c"},
        (
            "{Ann} has {a} {boxes} with {b} {things} in each, but {c} {things} get lost. How many {things} are left?",
            "There are {a} {boxes} of {b} {things}. {Ann} takes {c} {things} away. How many {things} are left?",
            "{Ann} buys {a} {boxes}, each with {b} {things}, and gives {c} {things} to {Ben}. "
            "How many {things} does {she} still have?",
            "{Ann} put {b} {things} in each of {a} {boxes} and then sold {c} {things}. How many {things} are left?",
        ),
        (
            Step("{things}", "{boxes} * each", "there are {value} {things} at first"),
            Step("result", "{things} - gone", "{value} {things} are left"),
        ),
    ),
    Family(
        "two_prices",
        lambda between: {"a": between(2, 12), "b": between(2, 9), "c": between(2, 12), "d": between(2, 9)},
        {"{things}": "a", "price": "b", "{others}": "c", "other_price": "d"},
        (
            "{Ann} buys {a} {things} for {b} dollars each and {c} {others} for {d} dollars each. What is the cost?",
            "The {things} cost {b} dollars each and the {others} cost {d} dollars each. "
            "{Ann} buys {a} {things} and {c} {others}. How much does {she} pay?",
            "How much does {Ann} pay if {c} {others} cost {d} dollars each and {a} {things} cost {b} dollars each?",
            "{Ann} buys {a} {things} at {b} dollars each and {c} {others} at {d} dollars each. What does {she} pay?",
        ),
        (
            Step("first", "{things} * price", "the {things} cost {value} dollars"),
            Step("second", "{others} * other_price", "the {others} cost {value} dollars"),
            Step("result", "first + second", "the total is {value} dollars"),
        ),
    ),
    Family(
        "change",
        lambda between: {"a": (a := between(2, 9)), "b": (b := between(2, 8)), "c": a * b + between(2, 40)},
        {"money": "c", "{things}": "a", "price": "b"},
        (
            "{Ann} has {c} dollars and buys {a} {things} for {b} dollars each. How many dollars are left?",
            "{Ann} pays for {a} {things} with {c} dollars. Each costs {b} dollars. How much change does {she} get?",
            "The {things} cost {b} dollars each. {Ann} had {c} dollars and bought {a} of them. "
            "How many dollars does {she} still have?",
            "How much change does {Ann} get from {c} dollars if {she} buys {a} {things} at {b} dollars each?",
        ),
        (
            Step("cost", "{things} * price", "the {things} cost {value} dollars"),
            Step("result", "money - cost", "{value} dollars are left"),
        ),
    ),
    Family(
        "wages",
        lambda between: {"a": between(4, 15), "b": between(2, 8), "c": between(2, 6)},
        {"pay": "a", "hours": "b", "days": "c"},
        (
            "{Ann} earns {a} dollars an hour and works {b} hours a day for {c} days. How much does {she} earn?",
            "For {c} days {Ann} works {b} hours a day at {a} dollars an hour. How much does {she} earn?",
            "{Ann} works {b} hours a day. The pay is {a} dollars an hour. How much does {she} earn in {c} days?",
            "How much does {Ann} earn if {she} works {b} hours on each of {c} days and gets {a} dollars an hour?",
        ),
        (
            Step("daily", "pay * hours", "{Ann} earns {value} dollars a day"),
            Step("result", "daily * days", "{Ann} earns {value} dollars in total"),
        ),
        (
            Step("total", "hours * days", "{Ann} works {value} hours"),
            Step("result", "total * pay", "{Ann} earns {value} dollars in total"),
        ),
    ),
    Family(
        "more_together",
        lambda between: {"a": between(3, 40), "b": between(2, 30)},
        {"{ann}": "a", "more": "b"},
        (
            "{Ann} has {a} {things}. {Ben} has {b} more {things} than {Ann}. How many {things} do they have together?",
            "{Ben} has {b} more {things} than {Ann}, who has {a}. How many {things} do both have in total?",
            "{Ann} found {a} {things} and {Ben} found {b} more than {Ann}. How many {things} did they find together?",
            "If {Ann} has {a} {things} and {Ben} has {b} more than that, how many {things} do they have together?",
        ),
        (
            Step("{ben}", "{ann} + more", "{Ben} has {value} {things}"),
            Step("result", "{ann} + {ben}", "together they have {value} {things}"),
        ),
        (
            Step("double", "{ann} * 2", "twice what {Ann} has is {value} {things}"),
            Step("result", "double + more", "together they have {value} {things}"),
        ),
    ),
    Family(
        "times_together",
        lambda between: {"a": between(3, 25), "b": between(2, 6)},
        {"{ann}": "a", "times": "b"},
        (
            "{Ann} has {a} {things}. {Ben} has {b} times as many. How many {things} do they have together?",
            "{Ben} has {b} times as many {things} as {Ann}, who has {a}. How many {things} do both have in total?",
            "{Ann} found {a} {things} and {Ben} found {b} times as many. How many {things} did they find together?",
            "If {Ann} has {a} {things} and {Ben} has {b} times that, how many {things} do they have together?",
        ),
        (
            Step("{ben}", "{ann} * times", "{Ben} has {value} {things}"),
            Step("result", "{ann} + {ben}", "together they have {value} {things}"),
        ),
        (
            Step("shares", "times + 1", "together they have {value} times what {Ann} has"),
            Step("result", "{ann} * shares", "together they have {value} {things}"),
        ),
    ),
    Family(
        "remove_share",
        lambda between: {"c": (c := between(2, 8)), "b": (b := between(2, 20)), "a": between(2, 9) * c + b},
        {"{things}": "a", "gone": "b", "{boxes}": "c"},
        (
            "{Ann} has {a} {things}. {She} sells {b} and puts the rest equally in {c} {boxes}. "
            "How many {things} are in each {box}?",
            "{Ann} gives {b} of {a} {things} to {Ben} and splits the rest equally among {c} {boxes}. "
            "How many {things} does each {box} hold?",
            "There were {a} {things}, but {b} got lost. {Ann} puts the rest equally in {c} {boxes}. "
            "How many {things} are in each {box}?",
            "If {Ann} takes {b} away from {a} {things} and the rest go equally in {c} {boxes}, "
            "how many {things} does each {box} hold?",
        ),
        (
            Step("left", "{things} - gone", "{value} {things} are left"),
            Step("result", "left / {boxes}", "each {box} holds {value} {things}"),
        ),
    ),
    Family(
        "half_then",
        lambda between: {"a": 2 * between(3, 40), "b": between(2, 30)},
        {"{things}": "a", "more": "b"},
        (
            "{Ann} has {a} {things}. {She} gives half to {Ben} and then buys {b} more. "
            "How many {things} does {Ann} have now?",
            "{Ann} had {a} {things}, sold half of them and then found {b} more. How many {things} does {she} have now?",
            "{Ann} had {a} {things}, but half got lost. {Ben} gives {Ann} {b}. How many {things} does {Ann} have now?",
            "{Ann} takes half of {a} {things} and {b} more. How many {things} does {she} take?",
        ),
        (
            Step("half", "{things} / 2", "half of the {things} is {value}"),
            Step("result", "half + more", "that makes {value} {things}"),
        ),
    ),
    Family(
        "same_price",
        lambda between: {"a": between(2, 20), "b": between(2, 20), "c": between(2, 9)},
        {"{ann}": "a", "{ben}": "b", "price": "c"},
        (
            "{Ann} buys {a} {things} and {Ben} buys {b}. Each costs {c} dollars. How much do they pay together?",
            "The {things} cost {c} dollars each. {Ann} buys {a} and {Ben} buys {b}. How much do both pay in total?",
            "At {c} dollars each, {Ann} sells {a} {things} and {Ben} sells {b}. How much do they get together?",
            "How much do {Ann} and {Ben} pay together if {Ann} buys {a} {things} and {Ben} {b}, at {c} dollars each?",
        ),
        (
            Step("{things}", "{ann} + {ben}", "there are {value} {things} in total"),
            Step("result", "{things} * price", "the total is {value} dollars"),
        ),
        (
            Step("first", "{ann} * price", "it is {value} dollars for {Ann}"),
            Step("second", "{ben} * price", "it is {value} dollars for {Ben}"),
            Step("result", "first + second", "the total is {value} dollars"),
        ),
    ),
    Family(
        "discount",
        lambda between: {"a": 20 * between(1, 9), "b": 5 * between(2, 12)},
        {"price": "a", "percent": "b"},
        (
            "The {things} cost {a} dollars. {Ann} gets {b} percent off. How much does {she} pay?",
            "{Ann} buys {things} for {a} dollars with {b} percent off. How much does {she} pay?",
            "{Ann} had {a} dollars and lost {b} percent of it. How many dollars does {she} still have?",
            "How much does {Ann} pay if the price of the {things} is {a} dollars and {she} gets {b} percent off?",
        ),
        (
            Step("off", "price * percent / 100", "{b} percent of it is {value} dollars"),
            Step("result", "price - off", "{value} dollars are left"),
        ),
        (
            Step("rest", "100 - percent", "the rest is {value} percent"),
            Step("result", "price * rest / 100", "{value} dollars are left"),
        ),
    ),
    Family(
        "minutes",
        lambda between: {"a": between(2, 9), "b": (3, 4, 5, 6, 10, 12, 15, 20)[between(0, 7)]},
        {"hours": "a", "each": "b"},
        (
            "{Ann} fills a {box} every {b} minutes. How many {boxes} does {she} fill in {a} hours?",
            "{Ann} needs {b} minutes to fill one {box}. How many {boxes} does {she} fill in {a} hours?",
            "In {a} hours, how many {boxes} does {Ann} sell if {she} sells one every {b} minutes?",
            "{Ann} works for {a} hours. {She} needs {b} minutes for each {box}. How many {boxes} does {she} fill?",
        ),
        (
            Step("minutes", "hours * 60", "{Ann} has {value} minutes"),
            Step("result", "minutes / each", "that is enough for {value} {boxes}"),
        ),
        (
            Step("hourly", "60 / each", "one hour is enough for {value} {boxes}"),
            Step("result", "hourly * hours", "{a} hours are enough for {value} {boxes}"),
        ),
    ),
    Family(
        "dozen",
        lambda between: {"a": (a := between(2, 9)), "b": between(2, min(12 * a - 2, 40))},
        {"dozen": "a", "gone": "b"},
        (
            "{Ann} has {a} dozen {things} and gives {b} to {Ben}. How many {things} are left?",
            "{Ann} buys {a} dozen {things}. {She} sells {b} of them. How many {things} does {she} still have?",
            "There were {a} dozen {things} in the {box}, but {Ben} took {b}. How many {things} are left?",
            "After {Ann} lost {b} {things} out of {a} dozen, how many {things} does {she} still have?",
        ),
        (
            Step("{things}", "dozen * 12", "there are {value} {things} at first"),
            Step("result", "{things} - gone", "{value} {things} are left"),
        ),
    ),
    Family(
        "twice_fewer",
        lambda between: {"a": (a := between(4, 30)), "b": between(2, a)},
        {"{ann}": "a", "fewer": "b"},
        (
            "{Ann} has {a} {things}. {Ben} has twice as many. {Cleo} has {b} fewer than {Ben}. "
            "How many {things} do they have together?",
            "{Ann} found {a} {things}, {Ben} found twice as many and {Cleo} found {b} fewer than {Ben}. "
            "How many {things} did they find together?",
            "{Ben} has twice as many {things} as {Ann}. {Cleo} has {b} fewer than {Ben}. "
            "If {Ann} has {a} {things}, how many do they have together?",
            "If {Ann} has {a} {things}, {Ben} twice that and {Cleo} {b} fewer than {Ben}, "
            "how many {things} do they have in total?",
        ),
        (
            Step("{ben}", "{ann} * 2", "{Ben} has {value} {things}"),
            Step("{cleo}", "{ben} - fewer", "{Cleo} has {value} {things}"),
            Step("result", "{ann} + {ben} + {cleo}", "together they have {value} {things}"),
        ),
    ),
    Family(
        "quarter_sold",
        lambda between: {"a": between(2, 8), "b": 4 * between(1, 4), "c": between(2, 6)},
        {"{boxes}": "a", "each": "b", "price": "c"},
        (
            "{Ann} has {a} {boxes} of {b} {things}. A quarter of the {things} get lost. "
            "{She} sells the rest for {c} dollars each. How much does {she} get?",
            "{Ann} sells {things} for {c} dollars each. {She} had {a} {boxes} of {b} {things}, but a quarter got lost. "
            "How much does {she} get?",
            "There are {a} {boxes} with {b} {things} in each. {Ann} keeps a quarter and sells the rest "
            "at {c} dollars each. How much does {she} earn?",
            "If {Ann} has {a} {boxes} of {b} {things}, keeps a quarter and sells the rest for {c} dollars each, "
            "how much does {she} earn?",
        ),
        (
            Step("{things}", "{boxes} * each", "there are {value} {things} at first"),
            Step("quarter", "{things} / 4", "a quarter of them is {value}"),
            Step("left", "{things} - quarter", "{value} {things} are left"),
            Step("result", "left * price", "{Ann} gets {value} dollars"),
        ),
        (
            Step("{things}", "{boxes} * each", "there are {value} {things} at first"),
            Step("left", "{things} * 3 / 4", "{value} {things} are left"),
            Step("result", "left * price", "{Ann} gets {value} dollars"),
        ),
    ),
)
