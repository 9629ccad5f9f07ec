"""The lenient reading: the one number, or the one letter, that a careful person reads in a text; None if there is none.

A text with two numbers ("3, 4", "2 or 3", "7:30") is no answer, and neither is one whose number may be read in two ways
("1,5"). What surrounds a number does not matter: currency, a unit, "about", bold type, the end of a LaTeX formula.
"""

import math
import re
import unicodedata

SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹"
# In this order: LaTeX that is arithmetic, signs of one meaning, and then what is only markup or currency.
SAME = [
    (r"\\[dt]?frac\s*{([^{}]*)}\s*{([^{}]*)}", r"(\1)/(\2)"),
    (r"\\sqrt\s*{([^{}]*)}", r"sqrt(\1)"),
    (r"√\s*", "sqrt "),
    (r"\\(?:times|cdot)\b|[×·]", "*"),
    (r"(?<=\d)\s*x\s*(?=10\^)", "*"),
    (r"\\pi\b", "π"),
    (r"\\(?:approx|sim)\b|[≈~]", "="),
    (r"[−–—]", "-"),
    (r"(\.\d+)\.\.\.", r"\1…"),
    (r"(?<=\d)\s*\*\*\s*(?=\d)", "^"),
    (r"\\(?:boxed|text|textbf|mathrm|mathbf|left|right)\b|\\[,;! ]|</?[a-zA-Z|][^<>]*>", " "),
    (r"<([^<>]*)>", r" \1 "),
    (r"(?<!\S)\*+(?=\S)|(?<=\S)\*+(?!\S)|[`\"“”‘’#$€£¥¢₹{}\\]|^'|'$", " "),
]
LEAD = re.compile(
    r"(?:(?:(?:the |my |final )*(?:answer|total|result|sum)|it|approximately|approx\.?|about|around|roughly|nearly"
    r"|almost|exactly|only|is|usd?|eur|gbp|rs\.?|a total of)(?![a-z])(?:\s*:|'s)?\s*)+",
    re.IGNORECASE,
)
WHOLE = r"(?:[1-9]\d{0,2}(?:[ ,'_]\d{3})+|[1-9]\d?(?:,\d\d)+,\d{3}|\d+)(?![,'_]?\d)"  # 1,080; 12,34,567; 1080
EUROPEAN = r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|0,\d+"  # 1.080,50; after a lone 0 the comma is a decimal one
NUMBER = rf"(?:{EUROPEAN}|\d*\.\d+…|(?:{WHOLE}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
TERM = rf"(?:(sqrt)\s*)?\(?\s*({NUMBER}|π)\s*\)?(?:\s*\^\s*\(?([+-]?\d+)\)?)?"
MIXED = re.compile(r"([+-]?)\s*(\d+)\s+(\d+)/(\d+)")
SUM = re.compile(rf"([+-]?)\s*({TERM}(?:\s*[+*/]\s*{TERM})*)")
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
SCALE = re.compile(rf"\s*(?:(?i:({'|'.join(SCALES)}))|(k)|(M))\b")
ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: n for n, word in enumerate(f"zero {ONES} eighteen nineteen".split())}
WORDS |= {word: 10 * n for n, word in enumerate(TENS.split(), 2)}
BELOW_100 = rf"(?:(?:{TENS.replace(' ', '|')})(?:[ -](?:{'|'.join(ONES.split()[:9])}))?|{'|'.join(WORDS)})\b"
SPELLED = re.compile(rf"(?:(a|{BELOW_100})\s+({'|'.join(SCALES)})\b(?:\s+and\b)?\s*)?({BELOW_100})?", re.I)
# After a number: what makes it another number, a range or a condition.
UNSURE_WORDS = "or and to than plus minus times of not if b bn trillion lakh crore half".split()
UNSURE = re.compile(rf"\d|[=+*^<>:]|\b(?:{'|'.join([*UNSURE_WORDS, *SCALES, *WORDS])})\b", re.IGNORECASE)


def number(raw: float | str) -> float | None:
    """The number that a person reads in `raw`; finite."""
    text = plain(str(raw))
    left, equals, text = text.rpartition("=")
    if equals and re.search(r"[,;]|\b(?:and|or)\b", left):  # x = 3, y = 4
        return None
    text = text.strip().rstrip(" .,;:!?。")
    if lead := LEAD.match(text):
        text = text[lead.end() :]
    if inside := re.fullmatch(r"\(([^()]*)\)", text):
        text = inside[1].strip()
    try:
        value, rest = _leading(text)
    except (ArithmeticError, ValueError):
        return None
    if value is None or UNSURE.search(rest):
        return None
    return value if math.isfinite(value) else None


def letter(raw: float | str) -> str | None:
    """The letter a to e that a person reads: "(B)", "b) 38 apples", "**b**", "option b"."""
    text = re.sub(r"^(?:option|choice|answer)\b:?", "", plain(str(raw)).strip(" '"), flags=re.IGNORECASE)
    found = re.fullmatch(r"\s*(?:\(([a-eA-E])\)|([a-eA-E])\s*[).:])(?:\s+.*)?|\s*([a-eA-E])\s*", text)
    return next(filter(None, found.groups())).lower() if found else None


def after(text: str, phrase: str) -> tuple[str, str, str]:
    """The text parted where its answer begins, as by `rpartition`: at the last `phrase`, else \\boxed{, else ####."""
    marks = (phrase.strip(), "\\boxed{", "####")
    return text.rpartition(next((mark for mark in marks if mark in text), phrase))


def plain(text: str) -> str:
    """The first line that is not blank, in ASCII digits and signs, without markup and currency."""
    text = "".join(" " if c == "\t" else c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))
    text = next((line for line in text.split("\n") if line.strip()), "")
    text = re.sub(rf"(?<=[\d)])[{SUPERSCRIPT}]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(rf"(?<=[^\W\d])[{SUPERSCRIPT}]+", "", text)  # m²
    text = re.sub("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in text)
    for old, new in SAME:
        text = re.sub(old, new, text)
    return text.strip()


def _leading(text: str) -> tuple[float | None, str]:
    """(the number at the beginning, the rest of the text)."""
    if found := MIXED.match(text):
        whole, above, below = map(int, found.groups()[1:])
        value = (whole + above / below) * (-1 if found[1] == "-" else 1)
    elif found := SUM.match(text):
        value = _evaluated(found[1], found[2])
    else:
        return _spelled(text)
    rest = text[found.end() :]
    if scale := SCALE.match(rest):
        name = scale[1] or ("thousand" if scale[2] else "million")
        value, rest = value * SCALES[name.lower()], rest[scale.end() :]
    return value, rest


def _evaluated(sign: str, text: str) -> float:
    """The value of numbers with powers, roots, *, / and + between them. At most one / is a fraction and no date."""
    if len(re.findall(r"/", text)) > 1:
        raise ValueError(text)
    total, product = 0.0, None
    for operator, root, digits, power in re.findall(rf"([+*/]?)\s*{TERM}", text):
        term = math.pi if digits == "π" else _number(digits)
        term = (math.sqrt(term) if root else term) ** int(power or 1)
        if product is None:
            product = -term if sign == "-" else term
        elif operator == "+":
            total, product = total + product, term
        else:
            product = product * term if operator == "*" else product / term
    return total + product


def _number(digits: str) -> float:
    """The value of one NUMBER. In 0.1666… the digit that is repeated at the end never ends."""
    if digits.endswith("…"):
        shown = digits[:-1]
        places = len(shown) - shown.index(".") - 1
        tail = int(shown[-1]) / 9 / 10**places if shown[-2:] == 2 * shown[-1] else 0.0
        return float(shown) + tail
    if re.fullmatch(EUROPEAN, digits):
        return float(digits.replace(".", "").replace(",", "."))
    return float(re.sub("[ ,'_]", "", digits))


def _spelled(text: str) -> tuple[float | None, str]:
    """(the number in words at the beginning, the rest): "eighteen", "a dozen", "one hundred and five"."""
    found = SPELLED.match(text)
    if not found[0].strip():
        return None, text
    times, scale, more = (part and part.lower() for part in found.groups())
    value = (1 if times == "a" else _below_100(times)) * SCALES[scale] if scale else 0
    return float(value + _below_100(more)), text[found.end() :]


def _below_100(words: str | None) -> int:
    return sum(WORDS[word] for word in re.split("[ -]", words)) if words else 0
