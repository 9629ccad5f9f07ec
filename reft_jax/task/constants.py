"""Numbers that a program may contain although the question does not state them: what people know.

60 minutes are an hour, a dozen is 12, a spider has 8 legs. Each constant goes with words; without one of them in the
question or the solution it is not known, it is a number from nowhere.
"""

CONSTANTS = {
    2000: "ton",
    1000: "kilo kg gram thousand km meter metre liter litre ml mm gallon milli pound ton",
    5280: "mile feet",
    3600: "second hour",
    1440: "day minute",
    360: "degree circle angle",
    365: "day year",
    366: "leap",
    180: "triangle degree angle",
    168: "hour week",
    144: "inch feet gross",
    128: "ounce gallon",
    100: "percent % cent dollar meter metre cm century number probability",
    90: "right degree corner angle",
    64: "ounce",
    60: "minute second hour",
    52: "week year card",
    48: "hour",
    36: "inch yard",
    32: "ounce quart",
    31: "day month january march may july august october december",
    30: "day month april june september november",
    29: "leap february",
    28: "day february week",
    26: "letter alphabet week",
    25: "quarter cent",
    24: "hour day dozen",
    21: "week",
    20: "score finger nickel decade",
    18: "adult",
    16: "ounce pound",
    15: "minute quarter",
    14: "week fortnight",
    12: "month year dozen inch feet foot hour",
    10: "dime decade cent finger toe mm cm",
    9: "baseball yard",
    8: "spider octopus octopuses ounce pint legs",
    7: "day week",
    6: "die dice cube insect hexagon",
    5: "weekday week nickel finger toe pentagon school work friday",
    4: "leg wheel season quarter square side corner week",
    3: "yard triangle tricycle",
    2: "leg feet eye wheel bicycle bike wing ear hand arm parent side weekend saturday couple twin average",
    50: "half",
    0.25: "quarter",
    0.1: "dime",
    0.05: "nickel",
    0.01: "penny pennies cent",
}
COUNTS = range(0, 5)  # people and things that are listed, not counted: "Ann and her mother", "each side"


def is_known(number: float, text: str) -> bool:
    """Whether `number` is a constant that goes with a word of `text` (lower case)."""
    return number in CONSTANTS and any(word in text for word in CONSTANTS[number].split())
