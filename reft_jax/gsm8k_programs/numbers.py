"""Finds the numbers that an English word problem states, each with its place in the text.

It reads digits (1,000; $2.50; .5; 2 1/2), percentages, fractions, number words ("thirty-five"), factors ("twice",
"half"), "dozen" and "million". One mention may state several values: 25% is 25 and 0.25; "half" is 0.5 and 2.
"""

import re
from functools import lru_cache
from typing import NamedTuple

UNITS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split(),
        range(20),
        strict=True,
    )
)
TENS = dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
TENS["fourty"] = 40  # a spelling in official rows
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12, "dozens": 12, "k": 1000}
PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "twentieth": 20}
PARTS |= {f"{part}s": number for part, number in PARTS.items() if part not in ("half", "halves")}
FACTORS = {"twice": 2, "double": 2, "doubled": 2, "doubles": 2, "doubling": 2, "thrice": 3, "triple": 3, "tripled": 3}
FACTORS |= {"triples": 3, "quadruple": 4, "quadrupled": 4, "quadruples": 4, "couple": 2, "pair": 2, "pairs": 2}
FACTORS |= {"twins": 2, "twin": 2, "both": 2, "halved": 2, "first": 1, "second": 2, "once": 1, "triplets": 3}
FIRST = {*UNITS, *TENS, *SCALES, *PARTS, *FACTORS, *"¼½¾", "a"}  # words that a number may begin with
SIGNS = {"¼": 0.25, "½": 0.5, "¾": 0.75}

AND_A_PART = re.compile(r"\s+and\s+(?:an?\s+|one[\s-]+)?(half|quarter|third)\b(\s+dozen)?", re.IGNORECASE)
ONE_AND_A_HALF = re.compile(r"\b(?:an?|one)\s+[a-z]+\s+and\s+a\s+half\b", re.IGNORECASE)  # "an hour and a half"
DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+"
NUMBER = re.compile(
    rf"""(?P<money>[$€£]\s?)?
    (?:(?P<whole>\d+)(?:\s+and\s+|\s+|-)(?=\d+/\d))?           # 2 1/2
    (?P<digits>{DIGITS})
    (?:\s?/\s?(?P<divisor>\d+)(?![\d.]*[%\d])(?:th|rd|nd)?s?)?
    (?P<sign>[¼½¾])?
    (?P<ordinal>(?:st|nd|rd|th)\b)?
    (?P<percent>\s?%|\s?-?percent\b)?
    (?P<cents>\s?¢|\s?-?cents?\b)?
    (?:[\s-]?(?P<scale>hundred|thousand|million|billion|dozens?|k)\b)?""",
    re.VERBOSE | re.IGNORECASE,
)
WORD = re.compile(r"[A-Za-z]+|[¼½¾]")


class Mention(NamedTuple):
    """One number in a text: text[start:end] states `value` and also `others`.

    kind: "number", "money", "percent", "fraction", "factor" ("twice") or "ordinal" ("the third", "12th"). The first two
    kinds get a name; numbers of the other kinds are written where they are used.
    """

    value: float
    others: tuple[float, ...]
    start: int
    end: int
    kind: str

    def states(self, value: float) -> bool:
        """Whether this mention states `value`."""
        return any(same(value, stated) for stated in (self.value, *self.others))


def same(a: float, b: float) -> bool:
    """Whether two numbers are equal up to float rounding."""
    return abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


@lru_cache(maxsize=1024)
def read_numbers(text: str) -> tuple[Mention, ...]:
    """Reads all numbers in `text`, in order."""
    found = [_from_digits(match) for match in NUMBER.finditer(text)]
    ends = {mention.start: mention.end for mention in found}
    words, taken = [], 0
    for match in WORD.finditer(text):
        taken = max(taken, max((ends.pop(start) for start in list(ends) if start <= match.start()), default=0))
        if match.start() >= taken:
            words.append(match)
    index = 0
    while index < len(words):
        used, mention = _from_words(text, words[index : index + 12]) if words[index][0].lower() in FIRST else (1, None)
        if mention:
            found.append(mention)
        index += used
    found += [Mention(1.5, (), m.start(), m.end(), "fraction") for m in ONE_AND_A_HALF.finditer(text)]
    return tuple(sorted((_with_part(text, mention) for mention in found), key=lambda mention: mention.start))


def _with_part(text: str, mention: Mention) -> Mention:
    """The number together with an "and a half" that follows it."""
    part = AND_A_PART.match(text, mention.end) if mention.kind == "number" else None
    if not part:
        return mention
    value = mention.value + 1 / PARTS[part[1].lower()]
    end = part.end()
    if part[2]:
        return Mention(value * 12, (value, 12.0), mention.start, end, "number")
    return Mention(value, (mention.value, *mention.others), mention.start, end, "number")


def _from_digits(match: re.Match) -> Mention:
    value = float(match["digits"].replace(",", ""))
    kind, others = ("money" if match["money"] else "number"), []
    if match["divisor"] and float(match["divisor"]):
        others = [value, float(match["divisor"])]
        value /= float(match["divisor"])
        kind = "fraction"
        if match["whole"]:
            value, others = value + float(match["whole"]), [*others, float(match["whole"])]
            kind = "number"
    if match["ordinal"] and kind == "number":
        kind = "ordinal"
    if match["sign"]:
        value += SIGNS[match["sign"]]
    if match["percent"]:
        others = [*others, value / 100]
        kind = "percent"
    elif match["cents"]:
        others = [*others, value / 100]
    elif match["scale"]:
        scale = SCALES[match["scale"].lower()]
        others = [*others, value, float(scale)]
        value *= scale
    return Mention(value, tuple(others), match.start(), match.end(), kind)


def _from_words(text: str, words: list[re.Match]) -> tuple[int, Mention | None]:
    """Reads a number from the first of `words`; returns how many words were read, and what they state."""
    total, current, used, parts = 0.0, None, 0, []
    for index, match in enumerate(words):
        word = match[0].lower()
        gap = text[words[index - 1].end() : match.start()] if index else " "
        if index and gap not in (" ", "-", " - ", "  "):
            break
        if word in UNITS or word in TENS:
            number = float(UNITS.get(word, TENS.get(word, 0)))
            if current is not None and not (current >= 20 and current % 10 == 0 and number < 10) and current < 100:
                break
            current = number if current is None else current + number
        elif word in SCALES and word != "k" and (current is not None or not index):
            parts += [current] if current else []
            parts.append(float(SCALES[word]))
            current = (current or 1.0) * SCALES[word]
            if SCALES[word] >= 1000:
                total, current = total + current, 0.0
        elif word == "and" and current and current % 100 == 0 and index + 1 < len(words):
            following = words[index + 1][0].lower()
            if following not in UNITS and following not in TENS:
                break
            continue
        elif word == "a" and index == 0 and len(words) > 1 and words[1][0].lower() in ("hundred", "thousand", "dozen"):
            continue
        else:
            break
        used = index + 1
    first, end = words[0], words[max(used, 1) - 1].end()
    after = words[used] if used < len(words) and text[end : words[used].start()] in (" ", "-") else None
    if used and after and after[0].lower() in PARTS:  # two-thirds
        value = total + current
        part = PARTS[after[0].lower()]
        return used + 1, Mention(value / part, (value, float(part)), first.start(), after.end(), "fraction")
    if used and after and after[0].lower() == "percent":
        value = total + current
        return used + 1, Mention(value, (value / 100,), first.start(), after.end(), "percent")
    if used and after and after[0].lower() in ("cent", "cents"):
        value = total + current
        return used + 1, Mention(value, (value / 100,), first.start(), after.end(), "number")
    if used:
        kind = "factor" if used == 1 and first[0].lower() in SCALES else "number"  # "a dozen" gets no name
        return used, Mention(total + (current or 0.0), tuple(parts), first.start(), end, kind)
    word = first[0].lower()
    if word in PARTS:
        value, ordinal = float(PARTS[word]), _is_ordinal(text, first, words[1:])
        kind, stated = ("ordinal", (value, 1 / value)) if ordinal else ("fraction", (1 / value, value))
        return 1, Mention(stated[0], stated[1:], first.start(), first.end(), kind)
    if word in SIGNS:
        return 1, Mention(SIGNS[word], (), first.start(), first.end(), "fraction")
    if word in FACTORS:
        kind = "ordinal" if word in ("first", "second") else "factor"
        return 1, Mention(float(FACTORS[word]), (), first.start(), first.end(), kind)
    return 1, None


def _is_ordinal(text: str, word: re.Match, following: list[re.Match]) -> bool:
    """Whether a word such as "third" is an ordinal ("the third day"), not a fraction ("a third", "third of")."""
    if word[0].lower() in ("half", "halves", "quarter", "quarters") or word[0].endswith("s"):
        return False
    of = following and following[0][0].lower() == "of"
    return not of and not re.search(r"\b(?:an?|one|by)[\s-]$", text[: word.start()], re.IGNORECASE)
