"""Names quantities after the sentence in which they occur: `clips_sold_in_may`, `price_per_box`.

`given_names` proposes names for a number of the question and `step_names` for the result of a step, the best name
first. `choose` gives every quantity of a program a different name.
"""

import re
from collections.abc import Sequence

from reft_jax.gsm8k_programs.numbers import Mention, read_numbers
from reft_jax.gsm8k_programs.phrases import (
    carried_noun,
    circumstances,
    having,
    is_person,
    last_noun,
    noun_phrase,
    noun_span,
    owner,
    passive_of,
    per,
    sentence_of,
    slug,
    subject_of,
    verb_of,
)
from reft_jax.gsm8k_programs.words import (
    ABBREVIATIONS,
    MEASURES,
    MONEY,
    MONTHS,
    NOUN_LIKE,
    PARTICIPLES,
    RESERVED,
    TIME,
    singular,
)

LONGEST = 36
UNITS_OF_MEASURE = TIME | set(
    """centimeters millimeters kilometers kilograms grams milligrams milliliters feet foot pounds ounces miles meters
    liters inches yards gallons degrees acres tons percent points calories""".split()
)
MEASURED = re.compile(
    r"weight|height|length|width|depth|distance|age|time|speed|temperature|area|volume|average|record|score"
)
MONEY_NOUNS = tuple(
    """profit salary earnings income revenue rent discount tax tip fee bill savings budget change debt expenses payment
    pay wage allowance interest loan insurance fine deposit tips share refund spending cost price total money""".split()
)
MONEY_VERBS = ("spent", "earned", "saved", "paid")
TRADED = {"cost", "sold", "bought", "purchased", "ordered"}
COINS = re.compile(r"\s*(?:dollars?|cents?|euros?|bucks)\b")
LEFT = re.compile(r"\b(?:left|remain(?:s|ing|ed)?|leftover|leaving|leaves)\b", re.IGNORECASE)
TOTAL = re.compile(r"\b(?:total|altogether|in all|combined|all together|sum|overall)\b", re.IGNORECASE)
MORE = re.compile(r"\b(?:more|extra|longer|taller|older|further|additional|difference)\b", re.IGNORECASE)
MEASURE = re.compile(r"\s*(?:[a-z]+\s+)?(tall|high|long|wide|deep|old|away|thick)\b")
NO_NOUN_BEHIND = re.compile(
    r"\s*(?:$|[,.?!)]|and\b|of (?:them|these|those|the|his|her|their)|in\b|on\b|are\b|for\b|to\b)"
)
IN_A_LIST = re.compile(r"(?:\s*,?\s*(?:and |or )?\d[\d.,]*(?=[\s,]))+\s*")  # "9, 10, and 11 students"
OF_THE = re.compile(r"^\s*of (?:the|these|those|his|her|their)\b")
BEFORE_STATED = re.compile(r"[,;]|\b(?:and|if|while|that|when|but)\b", re.IGNORECASE)
STATED_SUBJECT = re.compile(  # "the rope is 20 feet"
    r"^\s*(.+?)\s+(?:is|was|are|were|weighs?|takes?|lasts?)\s+(?:about |only |exactly )?$", re.IGNORECASE
)
BEFORE_COMPUTED = re.compile(r"[,;]|\b(?:so|then|that|thus|means|hence|therefore|if)\b", re.IGNORECASE)
COMPUTED_SUBJECT = re.compile(  # "so the total cost is 5*2 = 10", "Total hours = 12 + 4"
    r"^\s*(.*?)\s*(?:\b(is|was|are|were|will be|would be|equals?|costs?|will cost|would cost|weighs?|comes? to|totals?"
    r"|has|have|had)\b|[=:])\s*(?:a total of |then |only |equal to |about |also |now |therefore |thus )*[\s$€£(]*$",
    re.IGNORECASE,
)
OPENING = re.compile(  # first words of an introductory part of a sentence, which ends at a comma
    r"\s*(?:in|on|for|after|with|if|since|when|because|as|thus|so|then|at|during|by|therefore|finally|hence|now|to|this"
    r"|that|once|while|however)\b",
    re.IGNORECASE,
)
GOODS = re.compile(  # "a burger for $5"
    r"\b([a-z]+(?: [a-z]+)?)\s+(?:for|at|costs?|costing|is|are|was|were|priced at)\s*(?:only |about |just )?\s*$",
    re.IGNORECASE,
)
COSTLY = re.compile(r"\b(?:cost|costs|costing|price|priced|worth|is|are|was|were|charges?)\b[^,]*$")
OF_MONEY = re.compile(r"\s*(?:of|in|as|for)\s+(?:the |his |her |their |a )?([a-z]+)")


ASKED = (  # the words that follow "how much (money)", and the name of such an answer
    ("left|remain|remaining|have now", "money_left"),
    ("change", "change"),
    ("need|needs|needed", "money_needed"),
    ("spend|spends|spent", "total_spent"),
    ("earn|earns|earned|make|makes|made", "total_earnings"),
    ("pay|pays|paid", "total_paid"),
    ("save|saves|saved", "money_saved"),
    ("cost|costs", "total_cost"),
)


class Unnameable(Exception):
    """More quantities want this name than there are ways to tell them apart."""


def given_names(question: str, mention: Mention) -> list[str]:
    """Proposes names for a number of the question; an empty list if its sentence suggests none."""
    begin, end = sentence_of(question, mention.start)
    before, after = question[begin : mention.start], question[mention.end : end]
    if mention.kind == "money" or COINS.match(after):
        return unique(_prices(before, COINS.sub("", after, count=1) if COINS.match(after) else after, question))
    if re.match(r"-[a-z]", after):
        return unique(_compound(before, after))
    if re.match(r"\s*times\b", after):
        return unique(_qualified("times", before, after.lstrip()[5:])[1:])
    if measure := MEASURE.match(after):
        what, subject = MEASURES[measure[1]], subject_of(before)
        return unique([f"{subject}_{what}", f"{owner(before)}_{what}", what])
    noun, width = noun_span(after)
    if not noun and (more := re.match(r"\s*(more|fewer|less)\b", after)):
        noun = carried_noun(question, mention)
        noun = noun and f"{'extra' if more[1] == 'more' else 'fewer'}_{noun}"
    elif not noun and (listed := IN_A_LIST.match(after)):
        noun = noun_phrase(after[listed.end() :]) or carried_noun(question, mention)
    elif not noun and re.search(r"\ban?\s$", before):  # "Patty earned an 85"
        return (
            unique([f"{owner(before)}_score"])
            if owner(before) and re.search(r"test|exam|score|grade", question)
            else []
        )
    elif not noun and NO_NOUN_BEHIND.match(after):
        stated = STATED_SUBJECT.match(BEFORE_STATED.split(before)[-1])
        if stated and not is_person(stated[1]) and (subject := slug(stated[1])):
            return unique([subject])
        noun = noun_phrase(OF_THE.sub("", after)) or carried_noun(question, mention)
    return unique(_rates(noun, before, after[width:]) + _qualified(noun, before, after[width:])) if noun else []


def _compound(before: str, after: str) -> list[str]:
    """Proposes names for the number of a "16-mile road" or a "12-pack of soda"."""
    unit, head = noun_phrase(after[1:], 1), noun_phrase(re.sub(r"^-[a-z]+(?: of)?", "", after), 2)
    if unit in ("pack", "packs", "piece"):
        return [f"{head}_per_{unit}", f"{unit}_size"]
    unit = unit if not unit or unit in ("foot", "feet") or unit.endswith("s") else f"{unit}s"
    return [f"{head}_{unit}" if head else unit, *_qualified(unit, before, "")]


def _rates(noun: str, before: str, rest: str) -> list[str]:
    """Proposes names for a rate or a measure: `pages_per_day`, `average_weight`."""
    unit, each = noun.split("_")[-1], per(rest)
    stated = STATED_SUBJECT.match(BEFORE_STATED.split(before)[-1])
    if stated and unit in UNITS_OF_MEASURE and not is_person(stated[1]) and (subject := slug(stated[1], 3)):
        return [subject if MEASURED.search(subject) else f"{subject}_{unit}"]
    if each == "each":
        subject = singular(subject_of(before).split("_")[-1])
        subject = "" if subject == owner(before) else subject
        return [f"{noun}_per_{subject}" if subject and subject != singular(noun) else f"{noun}_each"]
    return [f"{noun}_per_{each}"] if each else []


def step_names(line: str, start: int, end: int, value: float, money: bool) -> list[str]:
    """Proposes names for the result `value` of the equation line[start:end]. money: whether it has a currency sign."""
    begin, stop = sentence_of(line, start, end)
    before, after = line[begin:start], line[end:stop]
    because = line.find(" because ", 0, start)
    if because >= 0 or not (noun_phrase(after) or money):  # "He collects 25 leaves because 12 + 13 = 25"
        for mention in read_numbers(line[: because if because >= 0 else start]):
            counted = mention.kind == "money" or noun_phrase(line[mention.end : start])
            if mention.value == value and (counted or because >= 0):
                begin, stop = sentence_of(line, mention.start)
                stop = min(stop, because if because >= 0 else start)
                before, after, money = line[begin : mention.start], line[mention.end : stop], mention.kind == "money"
                break
    noun, width = noun_span(after)
    if COINS.match(after):
        money, noun, width = True, "", COINS.match(after).end()
    elif re.match(r"\s*times\b", after) and not money:
        noun, width = "times", after.index("times") + 5
    names = [name for name in _computed_subject(before) if not noun or name not in UNITS_OF_MEASURE]
    if line[start:end].endswith("%") or after.lstrip().startswith("%"):
        names = [name if "percent" in name else f"{name}_percent" for name in names] + ["percentage"]
    elif money:
        names += _amounts(before, after[width:])
    elif noun:
        names += _results(noun, before, after[width:])
    return unique(names)


def _computed_subject(before: str) -> list[str]:
    """Names from the subject that `before`, the text before an equation, equates with it: "the total cost is"."""
    clause = BEFORE_COMPUTED.split(before)[-1]
    match = COMPUTED_SUBJECT.match(clause)
    if not match or (before.removesuffix(clause).endswith(",") and not OPENING.match(before)):
        return []  # after the last comma of a list
    subject, verb = slug(match[1]), (match[2] or "").lower()
    if not subject or subject == owner(match[1]):
        return []
    if "cost" in verb or verb.startswith("weigh"):
        return [f"{subject}_{'cost' if 'cost' in verb else 'weight'}"]
    return [] if verb.startswith("ha") or is_person(match[1]) else [subject]


def subject_names(text: str) -> list[str]:
    """Proposes names for an unknown, from the words that define it ("the number of hens", "Ann's age")."""
    words = re.sub(r"\b(?:number|amount|quantity) of\b", "", text)
    return unique([slug(words, 3), slug(words, 4), slug(text, 4)])


def question_names(question: str) -> list[str]:
    """Proposes names for the answer, from what the question asks."""
    match = re.search(r"\b[Hh]ow (?:many|much)\b([^?]*)", question)
    if not match:
        return []
    noun = noun_phrase(match[1])
    if not noun or noun in ("money", "dollars"):
        return [name for word, name in ASKED if re.search(rf"\b(?:{word})\b", match[1])][:1]
    head = "total_" if TOTAL.search(match[1]) else ""
    return unique([f"{head}{noun}", *_qualified(noun, match[1], "")])


def choose(wanted: Sequence[Sequence[str]], fallbacks: Sequence[str], stated: int) -> list[str]:
    """Chooses one name from each list of proposals, all different. If two lists want one name, both take their next.

    fallbacks: one per list, used if the list is empty or others have taken all its names. stated: how many of the
    lists, the first ones, are for numbers of the question. Raises Unnameable.
    """
    lists = [list(proposals) or [fallback] for proposals, fallback in zip(wanted, fallbacks, strict=True)]
    names = [proposals[0] for proposals in lists]
    while True:
        moves = {}
        for index, name in enumerate(names):
            if names.count(name) > 1:
                later = lists[index][lists[index].index(name) + 1 :]
                moves[index] = next((other for other in later if other not in names), None)
        if not any(moves.values()):
            break
        for index, name in moves.items():
            names[index] = name or names[index]
    taken: set[str] = set()
    for index, name in enumerate(names):
        options = [name, *(other for other in lists[index] if other not in names), fallbacks[index]]
        prefixes = ("initial", "other", "further", "last") if index < stated else ("new", "updated", "final", "last")
        options += [f"{prefix}_{base}" for base in (name, fallbacks[index]) for prefix in prefixes]
        free = [option for option in options if option not in taken and option not in names[index + 1 :]]
        if not free:
            raise Unnameable(name)
        names[index] = free[0]
        taken.add(names[index])
    return names


def _qualified(noun: str, before: str, rest: str) -> list[str]:
    """Proposes the noun alone, then combined with what it has, its verb, its circumstance and its owner."""
    if not noun:
        return []
    verb = passive_of(rest) or verb_of(before, 4)
    who, where, what = owner(before), circumstances(before, rest), having(rest)
    names = [noun] + ([f"{noun}_with_{what}"] if what else [])
    if verb and not noun.endswith(verb):
        names.append(f"{noun}_{verb}")
    names += [f"{noun}_{place}" for place in where]
    if who and who not in noun:
        names += [f"{who}_{noun}"] + ([f"{who}_{noun}_{verb}"] if verb else [])
    subject = subject_of(before)
    if subject and subject != who and singular(subject) != singular(noun):
        names.append(f"{subject}_{noun}")
    return names + [f"{noun}_{verb}_{place}" for place in where if verb]


def _results(noun: str, before: str, rest: str) -> list[str]:
    """Proposes names for a number of things that a step computes."""
    if re.fullmatch(r"years?", noun) and re.match(r"\s*old", rest):
        prefix = f"{owner(before)}_" if owner(before) else ""
        return [f"{prefix}age", f"{prefix}later_age"]
    names, each = [], per(rest)
    if re.search(r"\b(?:remain(?:s|ing)?|left)\b", before + rest[:16]) or LEFT.match(rest.lstrip()):
        names.append(f"{noun.removeprefix('remaining_')}_left")
    if TOTAL.search(before) or TOTAL.search(rest):
        names.append(f"total_{noun}")
    if each and each != "each":
        names.append(f"{noun}_per_{each}")
    alone, *qualified = _qualified(noun, before, rest)
    return [*names, *qualified, alone] if noun in UNITS_OF_MEASURE | {"people"} else [*names, alone, *qualified]


def _prices(before: str, after: str, question: str) -> list[str]:
    """Proposes names for an amount of money that the question states."""
    verb, who, where = verb_of(before, 4), owner(before), circumstances(before, after)
    subject, goods, each = subject_of(before), _goods(before), per(after)
    names = []
    if each == "each":
        unit = singular(goods or last_noun(before))
        names += [f"price_per_{unit}"] if unit else []
    elif each:
        of_time = f"{each}s" in TIME
        pay = of_time and verb in ("earned", "paid", "made", "worked")
        names.append(f"{'pay' if pay else 'dollars' if of_time else 'price'}_per_{each}")
    costly = COSTLY.search(before)
    things = [goods, noun_phrase(after, 2)]
    if costly and subject.split("_")[-1] not in (who, *MONEY):
        things.append(subject)
    names += [_price_of(thing) for thing in things if thing]
    for place in where:
        preposition, _, what = place.partition("_")
        if preposition in ("for", "on") and what not in MONTHS and what.split("_")[0] not in TIME:
            joint = "on" if verb == "spent" else "for"
            if verb in MONEY_VERBS:
                names.append(f"{verb}_{joint}_{what}")
            elif not verb or verb in TRADED:
                names.append(f"{what}_price")
    money = "dollars" if "$" in question or "dollar" in question else "cents" if "cent" in question else "amount"
    paid = f"{money}_{verb}" if verb and verb not in TRADED else ""
    names += [paid, *(f"{paid}_{place}" for place in where)] if paid else []
    names += [f"{who}_{money}"] + ([f"{who}_{paid}"] if paid else []) if who else []
    names += [f"{subject}_{money}"] if subject else []
    return [*names, *(f"{money}_{place}" for place in where), "price" if costly else money, f"price_in_{money}"]


def _price_of(thing: str) -> str:
    return thing if thing.split("_")[-1] in MONEY_NOUNS or "gift" in thing else f"{thing}_price"


def _goods(before: str) -> str:
    """The thing that an amount of money is the price of, from the words before it: "a burger for"."""
    match = GOODS.search(before)
    if not match:
        return ""
    goods = noun_phrase(match[1], 2) or noun_phrase(match[1].split()[-1], 1)
    verb = goods in PARTICIPLES and goods not in NOUN_LIKE and goods not in MONEY_NOUNS
    return "" if verb or goods in MONEY or goods in TIME else goods


def _amounts(before: str, rest: str) -> list[str]:
    """Proposes names for an amount of money that a step computes."""
    verb, who, where = verb_of(before), owner(before), circumstances(before, rest)
    noun, each, of = noun_phrase(rest, 2), per(rest).replace("each", ""), OF_MONEY.match(rest)
    total = "total_" if TOTAL.search(f"{before} {rest}") else ""
    said = [word for word in MONEY_NOUNS[:-3] if re.search(rf"\b{word}\b", before.lower())]
    said = [of[1]] if of and of[1] in MONEY_NOUNS else said
    kind = said[0] if said else verb if verb in MONEY_VERBS else "revenue" if verb == "sold" else ""
    names = [f"{total}{noun}"] if noun.split("_")[-1] in MONEY_NOUNS else []
    if LEFT.search(f"{before} {rest}"):
        names.append("money_left")
    if MORE.search(rest[:20]):
        names.append("extra_money" + (f"_{verb}" if verb else ""))
    if each and kind:
        names.append(f"{'money_' if kind in MONEY_VERBS else ''}{kind}_per_{each}")
    if kind in MONEY_VERBS:
        names += [f"{total}{kind}_{place}" for place in where if place.startswith(("on_", "for_", "from_", "in_"))]
        names.append(f"total_{kind}" if total else f"money_{kind}")
    elif kind:
        names += [f"{total}{kind}", *(f"{kind}_{place}" for place in where)]
    elif verb and verb not in TRADED:
        names += [f"{total}money_{verb}", *(f"{total}money_{verb}_{place}" for place in where)]
    if "cost" in before or verb == "cost":
        names += [f"{total}cost", *(f"cost_{place}" for place in where)]
    names += [f"{who}_{kind or 'money'}"] if who else []
    return [*names, *(f"{total}money_{place}" for place in where), f"{total}amount" if total else "money"]


def unique(names: list[str]) -> list[str]:
    """Keeps the proposals that can be names, with units written out, each once."""
    good = []
    for name in names:
        words = [word for word in name.replace("é", "e").lower().split("_") if word]
        words = [word for short in words for word in ABBREVIATIONS.get(short, short).split("_")]
        words = [word for index, word in enumerate(words) if not index or word != words[index - 1]]
        name = "_".join(words)
        fits = re.fullmatch(r"[a-z][a-z_]+", name) and len(name) <= LONGEST and name not in RESERVED
        if fits and words[0] not in ("of", "per") and len(words[-1]) > 1 and len(set(words)) == len(words):
            good.append(name)
    return list(dict.fromkeys(good))
