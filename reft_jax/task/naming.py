"""Names for quantities, taken from the sentence each of them stands in: `clips_sold_in_may`, `price_per_box`.

`given_names` proposes names for a number of the question, `step_names` for what a step of the solution computes, the
best first; `choose` gives every quantity of a program a name of its own.
"""

import re
from collections.abc import Sequence

from reft_jax.task.numbers import NUMBER, Mention, read_numbers
from reft_jax.task.words import (
    ABBREVIATIONS,
    EMPTY,
    FUNCTION_WORDS,
    MEASURES,
    MONEY,
    MONTHS,
    NOUN_LIKE,
    PARTICIPLES,
    RESERVED,
    TIME,
    WEAK,
    singular,
)

WORD = re.compile(r"[A-Za-zé]+(?:['’]s\b)?")
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.?!;:](?:\s|$)|\n")
PER = re.compile(r"\s*(?:(?:per\b|/|for (?:each|every|one|an?)\b|every\b|in (?:each|every)\b)\s*([A-Za-z]+)?|,?\s*each\b\s*([A-Za-z]+)?|(?:an?)\s+([a-z]+)\b)")
NEXT_WORD = re.compile(r"\s*(?:-\s*)?([A-Za-zé]+)(['’]s?\b)?")
OF_SOMETHING = re.compile(r"\s+of\s+(?!(?:the|his|her|their|them|each|these|those|its|that|a|it)\b)")
MORE_OR_LESS = {"more", "additional", "extra", "fewer", "less"}
SKIPPED = {"total", "different", "new", "other", "whole", "full", "remaining", "separate"}
NO_NOUN = {"left", "respectively", "total", "long"}
ADVERB = re.compile(r"(?:ally|ently|antly|ately|ingly|ously|ively|edly|iginally|usly)$")
PLACES = set("in on at from with after before during if that which who when where while of for to by left than as".split())
LEADING = r"^\s*(?:then|so|and|next|finally|also|thus|therefore|now)?,?\s*"
LONGEST = 36
UNITS_OF_MEASURE = TIME | set(
    "centimeters millimeters kilometers kilograms grams milligrams milliliters feet foot pounds ounces miles meters liters "
    "inches yards gallons degrees acres tons percent points calories".split()
)
MEASURE_NOUNS = r"weight|height|length|width|depth|distance|age|time|speed|temperature|area|volume|average|record|score"
MONEY_NOUNS = set(
    "cost price profit salary earnings income revenue rent discount tax tip fee bill savings budget change debt expenses "
    "payment pay wage allowance interest loan insurance fine deposit tips money share refund spending total".split()
)
AUXILIARIES = set("to will can could must should would may he she it they who we you i and does did do also".split())
TRADED = {"cost", "sold", "bought", "purchased", "ordered"}
LEFT = re.compile(r"\b(?:left|remain(?:s|ing|ed)?|leftover|leaving|leaves)\b", re.IGNORECASE)
TOTAL = re.compile(r"\b(?:total|altogether|in all|combined|all together|sum|overall)\b", re.IGNORECASE)
MORE = re.compile(r"\b(?:more|extra|longer|taller|older|further|additional|difference)\b", re.IGNORECASE)


class Unnameable(Exception):
    """More quantities want this name than there are ways to tell them apart."""


def _per(text: str) -> str:
    """X of "per X", "each X", "an hour" at the beginning of `text`; "each" if there is no X, "" if nothing is there."""
    match = PER.match(text)
    if not match or (match[3] and match[3] not in TIME):
        return ""
    position = max(match.start(group) for group in (1, 2, 3))
    noun = noun_phrase(text[position:], 2) if position >= 0 else ""
    return singular(noun) if noun else "each" if "each" in match[0] else ""


def given_names(question: str, mention: Mention) -> list[str]:
    """Names for a number of the question; none if the sentence offers none."""
    begin, end = sentence_of(question, mention.start)
    before, after = question[begin : mention.start], question[mention.end : end]
    if mention.kind == "money" or re.match(r"\s*(?:dollars?|cents?|euros?|bucks)\b", after):
        return unique(_prices(before, re.sub(r"^\s*(?:dollars?|cents?|euros?|bucks)\b", "", after), question))
    noun = noun_phrase(after)
    if re.match(r"-[a-z]", after):
        noun, head = noun_phrase(after[1:], 1), noun_phrase(re.sub(r"^-[a-z]+", "", after), 2)
        if noun in ("pack", "packs", "piece"):
            return unique([f"{head}_per_{noun}", f"{noun}_size"])
        noun = noun if noun in ("foot", "feet") or noun.endswith("s") else f"{noun}s" if noun else ""
        return unique([f"{head}_{noun}" if head else noun, *_qualified(noun, before, "")])
    if re.match(r"\s*times\b", after):
        return unique(_qualified("times", before, after[6:])[1:])
    measure = re.match(r"\s*(?:[a-z]+\s+)?(tall|high|long|wide|deep|old|away|thick)\b", after)
    if measure:
        what, subject = MEASURES[measure[1]], subject_of(before)
        return unique([f"{subject}_{what}" if subject else what, f"{owner(before)}_{what}", what])
    if not noun and re.match(r"\s*(?:more|fewer|less)\b", after):
        noun = noun_phrase(re.sub(r"^\s*(?:more|fewer|less)", "", after)) or carried_noun(question, mention)
        noun = f"{'extra' if 'more' in after[:8] else 'fewer'}_{noun}" if noun else ""
    elif not noun and re.match(r"\s*(?:$|[,.?!)]|and\b|of (?:them|these|those|the)|in\b|on\b|are\b|for\b|to\b)", after):
        noun = noun_phrase(re.sub(r"^\s*of (?:the|these|those|his|her|their)\b", "", after)) or carried_noun(question, mention)
    if not noun:
        return []
    rest = after[noun_span(after)[1] :]
    per, names = _per(rest), []
    copula = re.search(r"(?:^|[,;]|\b(?:and|if|while|that|when|but)\b)\s*([^,;]+?)\s+(?:is|was|are|were|weighs?|takes?|lasts?)\s+"
                       r"(?:about |only |exactly )?$", before, re.I)
    if copula and noun.split("_")[-1] in UNITS_OF_MEASURE and not _is_name(copula[1]) and slug(copula[1], 3):
        subject = slug(copula[1], 3)
        names = [subject if re.search(MEASURE_NOUNS, subject) else f"{subject}_{noun.split('_')[-1]}"]
    elif per == "each":
        subject = singular(subject_of(before).split("_")[-1])
        names = [f"{noun}_per_{subject}"] if subject and subject != singular(noun) else [f"{noun}_each"]
    elif per:
        names = [f"{noun}_per_{per}"]
    return unique([*names, *_qualified(noun, before, rest)])


def step_names(line: str, start: int, end: int, value: float, money: bool) -> list[str]:
    """Names for what line[start:end], an equation, computes. `money`: a sign of currency stands in it."""
    begin, stop = sentence_of(line, start, end)
    before, after = line[begin:start], line[end:stop]
    noun = noun_phrase(after)
    because = re.search(r"\bbecause\b", line[:start])
    if because or not (noun or money):  # "He collects 25 leaves because 12 + 13 = 25"
        for mention in read_numbers(line[: because.start() if because else start]):
            if mention.value == value and (mention.kind == "money" or noun_phrase(line[mention.end : start]) or because):
                begin, stop = sentence_of(line, mention.start)
                stop = min(stop, because.start()) if because else min(stop, start)
                before, after = line[begin : mention.start], line[mention.end : stop]
                noun, money = noun_phrase(after), mention.kind == "money"
                break
    if re.match(r"\s*times\b", after) and not money:
        noun, after = "times", re.sub(r"^\s*times", "", after)
    if re.match(r"\s*(?:dollars?|cents?)\b", after):
        money, after = True, re.sub(r"^\s*(?:dollars?|cents?)\b", "", after)
        noun = ""
    rest = after[noun_span(after)[1] :]
    names = []
    copula = re.search(
        r"(?:^|[,;]|\b(?:so|then|that|thus|means|hence|therefore|and|if)\b)\s*([^,;]*?)\s*(?:\b(is|was|are|were|will be|"
        r"would be|equals?|costs?|cost|will cost|would cost|weighs?|comes? to|totals?|has|have|had)\b|[=:])\s*(?:a total of |then |only |"
        r"equal to |about |also |now |therefore |thus )*[\s$€£(]*$",
        before,
        re.IGNORECASE,
    )
    subject = slug(copula[1]) if copula else ""
    verb = (copula[2] or "").lower() if copula else ""
    if copula and copula.start(1) and not re.match(r"\s*(?:in|on|for|after|with|if|since|when|because|as|thus|so|then|at|during|by|"
                                                     r"therefore|finally|hence|now|to|this|that|once|while|however)\b", before, re.IGNORECASE):
        subject = subject if "," not in before[: copula.start(1)][-2:] else ""
    if subject and "cost" in verb:
        names.append(f"{subject}_cost")
    elif subject and verb.startswith("weigh"):
        names.append(f"{subject}_weight")
    elif subject and not verb.startswith("ha") and not _is_name(copula[1]):
        names.append(subject)
    if money:
        names += _amounts(before, rest)
    elif noun:
        names += _results(noun, before, rest, line)
    return unique(names)


def subject_names(text: str) -> list[str]:
    """Names for an unknown, from the words that define it ("the number of hens", "Ann's age")."""
    words = re.sub(r"\b(?:number|amount|quantity) of\b", "", text)
    return unique([slug(words, 3), slug(words, 4), slug(text, 4)])


def question_names(question: str) -> list[str]:
    """Names for the answer, from what the question asks."""
    match = re.search(r"\b[Hh]ow (?:many|much)\b([^?]*)", question)
    if not match:
        return []
    noun = noun_phrase(match[1])
    if not noun or noun in ("money", "dollars"):
        return unique([f"total_{w}" for w in ("cost", "earnings") if w[:4] in question.lower()] or [noun])
    head = "total_" if TOTAL.search(match[1]) else ""
    return unique([f"{head}{noun}", *_qualified(noun, match[1], "")])


def choose(wanted: Sequence[Sequence[str]], fallbacks: Sequence[str], stated: int) -> list[str]:
    """One name for each list of proposals, all different: where two want the same, both take their next one.

    fallbacks: for each list the name for when it is empty or all its names are taken by others. The first `stated` are
    numbers of the question.
    """
    lists = [list(proposals) or [fallback] for proposals, fallback in zip(wanted, fallbacks, strict=True)]
    names = [proposals[0] for proposals in lists]
    for _ in range(40):
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
        prefixes = ("initial", "other", "further", "last") if index < stated else ("new", "updated", "final", "next", "last")
        options += [f"{prefix}_{base}" for base in (name, fallbacks[index]) for prefix in prefixes]
        free = [option for option in options if option not in taken and option not in names[index + 1 :]]
        if not free:
            raise Unnameable(name)
        names[index] = free[0]
        taken.add(names[index])
    return names


def sentence_of(text: str, start: int, end: int | None = None) -> tuple[int, int]:
    """Where the sentence around text[start:end] begins and ends."""
    begin = max((match.end() for match in SENTENCE_END.finditer(text[:start])), default=0)
    match = SENTENCE_END.search(text, start if end is None else end)
    return begin, match.start() if match else len(text)


def noun_phrase(text: str, longest: int = 3) -> str:
    """The noun at the very beginning of `text`, with adjectives and "of ...": "boxes_of_apples"; "" if there is none."""
    return noun_span(text, longest)[0]


def noun_span(text: str, longest: int = 3) -> tuple[str, int]:
    """A noun phrase (see noun_phrase) and where it ends."""
    words: list[str] = []
    position = 0
    while len(words) < longest:
        match = NEXT_WORD.match(text, position)
        if not match or match[2]:
            break
        word = match[1].lower()
        if word in MORE_OR_LESS | SKIPPED and not words:
            following, end = noun_span(text[match.end() :], longest - (word in MORE_OR_LESS))
            prefix = "" if word in SKIPPED else "fewer_" if word in ("fewer", "less") else "extra_"
            return (prefix + following, match.end() + end) if following else ("", 0)
        if (word in FUNCTION_WORDS and word not in ("second", "seconds")) or word in NO_NOUN:
            break
        if words and (word in PARTICIPLES or word.endswith(("ing", "ly"))) and not word.endswith("s"):
            break
        if words and word in PARTICIPLES and words[-1].endswith("s"):
            break
        if match[1][0].isupper() and (words or word in MONTHS):
            break
        words.append(word)
        position = match.end()
        if word in TIME or (word.endswith("s") and not word.endswith("ss") and not text[position:].startswith(" of ")):
            break
    words = [ABBREVIATIONS.get(word, word) for word in words]
    if not words or len(words[-1]) < 3:
        return "", 0
    of = OF_SOMETHING.match(text, position)
    if of and len(words) < 3:
        what, end = noun_span(text[of.end() :], 2)
        if what and "_of_" not in what:
            return f"{'_'.join(words)}_of_{what}", of.end() + end
    return "_".join(words), position


def slug(text: str, longest: int = 4) -> str:
    """The words of a phrase that carry meaning, joined: "the total area of the walls" is `total_area_of_walls`."""
    words, capital = [], ""
    for match in WORD.finditer(text):
        word = re.sub(r"['’]s$", "", match[0].lower())
        capital = word if match[0][0].isupper() and match.start() else capital
        if word in PLACES - {"of", "for"} and words:
            break
        if word == "total" or word == "of" and words and words != ["total"]:
            words.append(word)
        elif ADVERB.search(word) or word in FUNCTION_WORDS and word not in ("first", "second", "third", "least") or word in EMPTY:
            continue
        elif words and word in PARTICIPLES and word not in NOUN_LIKE and singular(word) not in NOUN_LIKE:
            break
        else:
            words.append(word)
    while words and words[-1] == "of":
        words.pop()
    if len(words) > 1 and words[-1] == capital and words[-2] != "of":
        words = [words.pop(), *words]  # "the problems Ann solved" are ann_problems
    if len([word for word in words if word != "of"]) > longest or words in (["total"], ["number"], ["amount"], ["first"], ["second"]):
        return ""
    return "_".join(words)


def owner(before: str) -> str:
    """The person or thing with a capital letter that was named last, or ""."""
    for match in reversed(list(WORD.finditer(before))):
        word = re.sub(r"['’]s$", "", match[0])
        if word[0].isupper() and len(word) > 1 and word.lower() not in FUNCTION_WORDS | MONTHS and match.start():
            return word.lower()
    match = WORD.match(before.lstrip())
    if match:
        word = re.sub(r"['’]s$", "", match[0])
        if word[0].isupper() and len(word) > 1 and word.lower() not in FUNCTION_WORDS | MONTHS | set(PARTICIPLES):
            return word.lower()
    return ""


def subject_of(before: str) -> str:
    """What a sentence is about, from its words before the number: the noun before the first verb."""
    if re.match(r"\s*(?:how|what|if)\b", before, re.I) and "," not in before:
        before = re.sub(r"^\s*if\b", "", before, flags=re.I) if before.lower().lstrip().startswith("if") else ""
    clause = re.split(r",|\b(?:and|but|if|while|when|because|that|which|who)\b", before)[-1]
    words = []
    for match in WORD.finditer(clause):
        word = re.sub(r"['’]s$", "", match[0].lower())
        if word in ("is", "are", "was", "were", "has", "have", "had", "will", "can", "at", "for", "with") or word in PARTICIPLES:
            if words:
                break
        elif words and word in PLACES:
            break
        elif word not in FUNCTION_WORDS and word not in EMPTY:
            words.append(word)
    return "_".join(words[-2:])


def carried_noun(question: str, mention: Mention) -> str:
    """The noun of the number before this one: "12 apples on Monday and 8 on Tuesday"."""
    for earlier in reversed([m for m in read_numbers(question[: mention.start]) if m.kind == "number"]):
        noun = noun_phrase(question[earlier.end : mention.start])
        if noun:
            return noun
    return ""


def _verb(text: str, within: int = 99) -> str:
    """The participle of the last verb in `text`, not more than `within` words from its end, that says something."""
    words = [match[0] for match in WORD.finditer(re.split(r"[,;:]", text)[-1])]
    for index in range(len(words) - 1, max(-1, len(words) - 1 - within), -1):
        word = words[index].lower()
        participle = PARTICIPLES.get(word)
        if not participle or participle in WEAK:
            continue
        previous = words[index - 1] if index else ""
        acts = previous.lower() in AUXILIARIES or previous[:1].isupper()
        if (word in NOUN_LIKE or word.rstrip("s") in NOUN_LIKE) and word != participle and not acts and not word.endswith("ing"):
            continue
        return participle
    return ""


def _circumstance(before: str, rest: str) -> list[str]:
    """`in_may`, `on_monday`, `for_dress`: what follows the number, or stands before it."""
    found = []
    for lead, text in ((r"\b", re.split(r"[,;]| and ", rest)[0]), (LEADING, before)):
        for match in re.finditer(rf"{lead}(in|on|at|from|for|to|with|during|by|after|before)\s+((?:\w+['’]?s?\s*){{1,4}})", text, re.I):
            words = []
            if match[1] == "to" and not re.match(r"(?:the|his|her|their|a|an|each)\b|[A-Z]", match[2]):
                continue
            for word in match[2].split():
                if word.lower() in PARTICIPLES and word.lower() not in NOUN_LIKE:
                    break
                if word.lower() in FUNCTION_WORDS and word.lower() not in ("first", "second", "third", "next"):
                    if words:
                        break
                    continue
                if not word.isalpha():
                    break
                words.append(word.lower())
                if len(words) == 2:
                    break
            if words:
                found.append("_".join([match[1].lower(), *words]))
        if found:
            break
    return found


def _qualified(noun: str, before: str, rest: str) -> list[str]:
    """A noun alone, then with its verb, its circumstance and its owner."""
    if not noun:
        return []
    verb, who, where = _verb(before, 4), owner(before), _circumstance(before, rest)
    passive = re.match(r"\s*(?:(?:are|were|was|is|have been|has been|had been|that were|which were)\s+)?([a-z]+)", rest)
    if passive and PARTICIPLES.get(passive[1]) == passive[1] and passive[1] not in WEAK | {"left"}:
        verb = passive[1]
    names = [noun]
    having = re.match(r"\s*(?:in [a-z ]+?)?\s*\b(?:have|has|had|with)\s+", rest)
    what = noun_phrase(rest[having.end() :], 2) if having else ""
    if what and what.split("_")[0] not in PARTICIPLES:
        names.append(f"{noun}_with_{what}")
    if verb and not noun.endswith(verb):
        names.append(f"{noun}_{verb}")
    names += [f"{noun}_{place}" for place in where]
    if who and who not in noun:
        names += [f"{who}_{noun}", f"{who}_{noun}_{verb}" if verb else noun]
    subject = subject_of(before)
    if subject and subject != noun and subject != who:
        names += [f"{subject}_{noun}"]
    names += [f"{noun}_{verb}_{place}" for place in where if verb]
    return names


def _prices(before: str, after: str, question: str) -> list[str]:
    """Names for an amount of money that the question states."""
    verb, who, where = _verb(before, 4), owner(before), _circumstance(before, after)
    per, names = _per(after), []
    sold = re.search(r"\b([a-z]+(?: [a-z]+)?)\s+(?:for|at|costs?|costing|is|are|was|were|priced at)\s*(?:only |about |just )?\s*$", before, re.I)
    goods = noun_phrase(sold[1], 2) if sold else ""
    if sold and not goods:
        goods = noun_phrase(sold[1].split()[-1], 1)
    if goods in MONEY | TIME or goods in PARTICIPLES and goods not in NOUN_LIKE | MONEY_NOUNS:
        goods = ""
    if per == "each":
        unit = goods or _last_noun(before)
        names = [f"price_per_{singular(unit)}"] if unit else []
    elif per:
        pay = verb in ("earned", "paid", "made", "worked", "charged") and per in {singular(unit) for unit in TIME}
        names = [f"pay_per_{per}"] if pay else [f"dollars_per_{per}"] if per + "s" in TIME else [f"price_per_{per}"]
    if goods:
        names.append(goods if goods.split("_")[-1] in MONEY_NOUNS else f"{goods}_price")
    noun = noun_phrase(after, 2)
    if noun and noun not in ("each", "more"):
        names.append(noun if noun.split("_")[-1] in MONEY_NOUNS or "gift" in noun else f"{noun}_price")
    target = [place.removeprefix("for_").removeprefix("on_") for place in where if place.startswith(("for_", "on_"))]
    subject = subject_of(before)
    costly = re.search(r"\b(?:cost|costs|costing|price|priced|worth|is|are|was|were|charges?)\b[^,]*$", before)
    if costly and subject and subject.split("_")[-1] != who and subject.split("_")[-1] not in MONEY:
        names.append(subject if subject.split("_")[-1] in MONEY_NOUNS else f"{subject}_price")
    for what in target:
        if what not in MONTHS and what.split("_")[0] not in TIME:
            names.append(f"{what}_price" if verb not in ("earned", "spent", "saved", "paid") else f"{verb}_{'on' if verb == 'spent' else 'for'}_{what}")
    money = "dollars" if "$" in question or "dollar" in question else "cents" if "cent" in question else "amount"
    if verb and verb not in TRADED:
        names.append(f"{money}_{verb}")
        names += [f"{money}_{verb}_{place}" for place in where]
    verb = "" if verb in TRADED else verb
    if who:
        names += [f"{who}_{money}", f"{who}_{money}_{verb}" if verb else f"{who}_{money}"]
    if subject:
        names.append(f"{subject}_{money}")
    return [*names, *(f"{money}_{place}" for place in where), "price" if costly else money, f"price_in_{money}"]


def _last_noun(text: str) -> str:
    for match in reversed(list(WORD.finditer(text))):
        word = match[0].lower()
        if word not in FUNCTION_WORDS and word not in PARTICIPLES and word not in MONEY and not NUMBER.match(word):
            return re.sub(r"['’]s$", "", word)
    return ""


def _amounts(before: str, rest: str) -> list[str]:
    """Names for an amount of money that a step computes."""
    verb, who, where = _verb(before), owner(before), _circumstance(before, rest)
    whole = f"{before} {rest}"
    noun = noun_phrase(rest, 2)
    total = "total_" if TOTAL.search(whole) else ""
    names = []
    if noun and noun.split("_")[-1] in MONEY_NOUNS:
        names.append(f"{total}{noun}")
    unit = _per(rest).replace("each", "")
    of = re.match(r"\s*(?:of|in|as|for)\s+(?:the |his |her |their |a )?([a-z]+)", rest)
    word = of[1] if of and of[1] in MONEY_NOUNS else next((w for w in MONEY_NOUNS if re.search(rf"\b{w}\b", before.lower()) and w not in ("total", "money")), "")
    if LEFT.search(whole):
        names.append("money_left")
    if MORE.search(rest[:20]):
        names.append("extra_money" + (f"_{verb}" if verb else ""))
    kind = word or {"spent": "spent", "earned": "earned", "saved": "saved", "paid": "paid"}.get(verb, "")
    if unit and (word or kind):
        names.append(f"{word or 'money_' + kind}_per_{unit}")
    if kind in ("spent", "earned", "saved", "paid"):
        on = [place for place in where if place.startswith(("on_", "for_", "from_", "in_"))]
        names += [f"{total}{kind}_{place}" for place in on]
        names.append(f"{total}money_{kind}" if not total else f"total_{kind}")
    elif kind:
        names.append(f"{total}{kind}")
        names += [f"{kind}_{place}" for place in where]
    elif verb == "sold":
        names += [f"{total}revenue", *(f"revenue_{place}" for place in where)]
    elif verb and verb not in TRADED:
        names += [f"{total}money_{verb}", *(f"{total}money_{verb}_{place}" for place in where)]
    if "cost" in before or verb == "cost":
        names += [f"{total}cost", *(f"cost_{place}" for place in where)]
    names += [f"{who}_{kind or 'money'}"] if who else []
    return [*names, *(f"{total}money_{place}" for place in where), f"{total}amount" if total else "money"]


def _results(noun: str, before: str, rest: str, line: str) -> list[str]:
    """Names for a number of things that a step computes."""
    names = []
    per = _per(rest)
    if LEFT.match(rest.lstrip()) or re.search(r"\b(?:remain(?:s|ing)?|left)\b", before + rest[:16]):
        names.append(f"{noun.removeprefix('remaining_')}_left")
    if TOTAL.search(before) or TOTAL.search(rest):
        names.append(f"total_{noun}")
    if per and per != "each":
        names.append(f"{noun}_per_{per}")
    age = re.match(r"years?$", noun) and re.match(r"\s*old", rest)
    if age:
        who = owner(before)
        names = [f"{who}_age" if who else "age", f"{who}_later_age" if who else "later_age"]
    qualified = _qualified(noun, before, rest)
    return [*names, *(qualified[1:] + qualified[:1] if noun in TIME | {"miles", "feet", "people"} else qualified)]


def _is_name(text: str) -> bool:
    """Whether a subject is a person, and not a thing: "Ann" or "she"."""
    words = text.split()
    return bool(words) and words[-1][0].isupper() and not words[-1].isupper()


def unique(names: list[str]) -> list[str]:
    """The proposals that can be names, each once."""
    good = []
    for name in names:
        name = re.sub(r"_+", "_", name.replace("é", "e").lower()).strip("_")
        parts = [word for part in name.split("_") for word in ABBREVIATIONS.get(part, part).split("_")]
        parts = [part for index, part in enumerate(parts) if not index or part != parts[index - 1]]
        name = "_".join(parts)
        if re.fullmatch(r"[a-z][a-z_]+", name) and len(name) <= LONGEST and name not in RESERVED and parts[0] not in ("of", "per") and len(parts[-1]) > 1 and (
            len(set(parts)) == len(parts)
        ):
            good.append(name)
    return list(dict.fromkeys(good))
