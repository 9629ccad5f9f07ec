"""Numbers from common knowledge, which a program may contain although the question does not state them.

For example: an hour has 60 minutes, a dozen is 12, a spider has 8 legs. Each constant has a list of words. If neither
the question nor the solution contains one of them, the number does not count as known: it is a number from nowhere.
"""

import re

from reft_jax.gsm8k_programs.words import singular

CONSTANTS = {
    1000000: "million",
    5280: "mile",
    3600: "second",
    2000: "ton",
    1440: "minute",
    1000: "kilo kilogram kg gram thousand kilometer km meter metre liter litre milliliter ml mm kilowatt kw watt",
    366: "leap",
    365: "year",
    360: "degree circle angle",
    180: "triangle degree angle",
    168: "week",
    144: "gross",
    128: "gallon",
    100: "percent % cent dollar meter metre centimeter cm century probability",
    90: "angle degree",
    64: "gallon",
    60: "minute second hour",
    52: "year card",
    50: "half",
    36: "yard",
    32: "quart",
    31: "january march may july august october december",
    30: "month april june september november",
    29: "leap",
    28: "february",
    26: "letter alphabet",
    25: "quarter",
    24: "hour",
    20: "finger toe nickel",
    18: "adult",
    16: "ounce oz",
    15: "quarter",
    14: "fortnight",
    12: "month year dozen inch foot ft",
    10: "dime decade centimeter cm finger toe mm",
    9: "baseball",
    8: "spider octopus octopuse ounce pint",
    7: "day week weekly daily",
    6: "die dice cube insect ant hexagon saturday",
    5: "weekday week friday nickel finger toe pentagon",
    4: "leg wheel season quarter square side corner week month",
    3: "yard triangle tricycle",
    2: "leg foot eye wheel bicycle bike wing ear hand arm parent side weekend saturday couple twin average",
    0.25: "quarter",
    0.1: "dime",
    0.05: "nickel",
    0.01: "penny cent",
}
COUNTS = range(0, 5)  # numbers of people and things that a text lists but does not count: "Ann and her mother"


def stems(text: str) -> set[str]:
    """The set of words of a text, in the singular, with "%" as a word."""
    return {singular(word) for word in re.findall(r"[a-z]+|%", text.lower())}


def is_known(number: float, words: set[str]) -> bool:
    """Whether `number` is a constant for which one of `words` (stems) is listed."""
    return number in CONSTANTS and not words.isdisjoint(CONSTANTS[number].split())
