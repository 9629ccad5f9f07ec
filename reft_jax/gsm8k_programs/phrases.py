"""Turns phrases of English sentences into parts of variable names: `boxes_of_apples`, `on_monday`.

It does not parse grammar. Word lists (words.py) and the position of a word decide. That is correct often enough for
names, and a bad name cannot make a program wrong.
"""

import re

from reft_jax.gsm8k_programs.numbers import Mention, read_numbers
from reft_jax.gsm8k_programs.words import (
    ABBREVIATIONS,
    EMPTY,
    FUNCTION_WORDS,
    MONEY,
    MONTHS,
    NOUN_LIKE,
    PARTICIPLES,
    TIME,
    WEAK,
    singular,
)

WORD = re.compile(r"[A-Za-zé]+(?:['’]s\b)?")
NEXT_WORD = re.compile(r"\s*(?:-\s*)?([A-Za-zé]+)(['’]s?\b)?")
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)[.?!;:](?:\s|$)|\n")
PER = re.compile(
    r"\s*(?:(?:per\b|/|for (?:each|every|one|an?)\b|every\b|in (?:each|every)\b)\s*([A-Za-z]+)?"
    r"|,?\s*each\b(?! (?:of which|having|with|contain|cost|hold|has|have|weigh))\s*([A-Za-z]+)?|an?\s+([a-z]+)\b)"
)
OF_SOMETHING = re.compile(r"\s+of\s+(?!(?:the|his|her|their|them|each|these|those|its|that|a|it)\b)")
PASSIVE = re.compile(r"\s*(?:(?:are|were|was|is|have been|has been|had been|that were|which were)\s+)?([a-z]+)")
HAVING = re.compile(r"\s*(?:in [a-z ]+?)?\s*\b(?:have|has|had|with)\s+")
CIRCUMSTANCE = r"(in|on|at|from|for|to|with|during|by|after|before)\s+((?:\w+['’]?s?\s*){1,4})"
AT_ONCE = re.compile(rf"\b{CIRCUMSTANCE}", re.IGNORECASE)
LEADING = re.compile(rf"^\s*(?:then|so|and|next|finally|also|thus|therefore|now)?,?\s*{CIRCUMSTANCE}", re.IGNORECASE)
DETERMINED = re.compile(r"(?:the|his|her|their|a|an|each)\b|[A-Z]")
CLAUSE = re.compile(r",|\b(?:and|but|if|while|when|because|that|which|who)\b")
MORE_OR_LESS = {"more": "extra_", "additional": "extra_", "extra": "extra_", "fewer": "fewer_", "less": "fewer_"}
SKIPPED = {"same", "even", "total", "different", "new", "other", "whole", "full", "remaining", "separate"}
NO_NOUN = {"left", "respectively", "total", "long"}
ORDINALS = {"first", "second", "third", "next", "least"}
ADVERB = re.compile(r"(?:ally|ently|antly|ately|ingly|ously|ively|edly|usly)$")
PLACES = set(
    "in on at from with after before during if that which who when where while of for to by left than as".split()
)
LINKING = {"is", "are", "was", "were", "has", "have", "had", "will", "can", "at", "for", "with"}
AUXILIARIES = set("to will can could must should would may he she it they who we you i and does did do also".split())


def sentence_of(text: str, start: int, end: int | None = None) -> tuple[int, int]:
    """Returns the start and end of the sentence around text[start:end]."""
    begin = max((match.end() for match in SENTENCE_END.finditer(text[:start])), default=0)
    match = SENTENCE_END.search(text, start if end is None else end)
    return begin, match.start() if match else len(text)


def noun_phrase(text: str, longest: int = 3) -> str:
    """The noun at the start of `text`, with adjectives and "of ...": `boxes_of_apples`; "" if there is none."""
    return noun_span(text, longest)[0]


def noun_span(text: str, longest: int = 3) -> tuple[str, int]:
    """Returns a noun phrase (see noun_phrase) and where it ends."""
    words: list[str] = []
    position = 0
    while len(words) < longest:
        match = NEXT_WORD.match(text, position)
        if not match or match[2]:
            break
        word = match[1].lower()
        if not words and (word in MORE_OR_LESS or word in SKIPPED):
            following, end = noun_span(text[match.end() :], longest - (word in MORE_OR_LESS))
            return (MORE_OR_LESS.get(word, "") + following, match.end() + end) if following else ("", 0)
        if _ends_phrase(match[1], words):
            break
        words.append(word)
        position = match.end()
        plural = word != singular(word) and not text[position:].startswith(" of ")
        if word in TIME or plural:
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


def _ends_phrase(written: str, words: list[str]) -> bool:
    """Whether a word cannot belong to the noun phrase that begins with `words`."""
    word = written.lower()
    if word in NO_NOUN or (word in FUNCTION_WORDS and word not in ("second", "seconds")):
        return True
    if written[0].isupper() and (words or word in MONTHS):
        return True
    if not words:  # "the last 2 contain ..."
        acts = word in PARTICIPLES and PARTICIPLES[word] != word and not word.endswith(("ing", "s"))
        return acts and word not in NOUN_LIKE
    verb = word in PARTICIPLES or word.endswith(("ing", "ly"))
    return (verb and not word.endswith("s")) or (word in PARTICIPLES and words[-1].endswith("s"))


def slug(text: str, longest: int = 4) -> str:
    """Joins the words of a phrase that carry meaning: "the total area of the walls" is `total_area_of_walls`.

    Returns "" if there are none, or more than `longest`.
    """
    words, capital = [], ""
    for match in WORD.finditer(text):
        word = bare(match[0])
        capital = word if match[0][0].isupper() and match.start() else capital
        if word in PLACES - {"of", "for"} and words:
            break
        if word == "total" or (word == "of" and words and words != ["total"]):
            words.append(word)
        elif ADVERB.search(word) or word in EMPTY or (word in FUNCTION_WORDS and word not in ORDINALS):
            continue
        elif word in PARTICIPLES and word not in NOUN_LIKE and singular(word) not in NOUN_LIKE:
            if words:
                break
        else:
            words.append(word)
    while words and words[-1] == "of":
        words.pop()
    if len(words) > 1 and words[-1] == capital and words[-2] != "of":
        words = [words.pop(), *words]  # "the problems Ann solved" becomes ann_problems
    meaning = [word for word in words if word != "of"]
    return (
        "_".join(words) if len(meaning) <= longest and meaning not in ([word] for word in ("total", *ORDINALS)) else ""
    )


def bare(word: str) -> str:
    """The word in lower case, without a possessive 's."""
    return re.sub(r"['’]s$", "", word.lower())


def owner(before: str) -> str:
    """The last word with a capital letter that names a person or thing, or ""."""
    for match in reversed(list(WORD.finditer(before))):
        word, first = bare(match[0]), not before[: match.start()].strip()
        if match[0][0].isupper() and len(word) > 1 and word not in FUNCTION_WORDS and word not in MONTHS:
            if not first or word not in PARTICIPLES:
                return word
    return ""


def is_person(subject: str) -> bool:
    """Whether the subject ends in a person's name: "Ann", "Mr. Stone"."""
    words = subject.split()
    return bool(words) and words[-1][0].isupper() and not words[-1].isupper()


def subject_of(before: str) -> str:
    """The subject of a sentence, from its words before the number: at most two words before the first verb."""
    if re.match(r"\s*(?:how|what)\b", before, re.IGNORECASE) and "," not in before:
        return ""
    words = []
    for match in WORD.finditer(CLAUSE.split(before)[-1]):
        word = bare(match[0])
        if words and (word in LINKING or word in PARTICIPLES or word in PLACES):
            break
        if not (
            word in LINKING or word in PARTICIPLES or word in FUNCTION_WORDS or word in EMPTY or ADVERB.search(word)
        ):
            words.append(word)
    return "_".join(words[-2:])


def carried_noun(question: str, mention: Mention) -> str:
    """The noun of the number before this one: "12 apples on Monday and 8 on Tuesday"."""
    for earlier in reversed([m for m in read_numbers(question[: mention.start]) if m.kind == "number"]):
        noun = noun_phrase(question[earlier.end : mention.start])
        if noun:
            return noun.removeprefix("extra_").removeprefix("fewer_")
    return ""


def last_noun(text: str) -> str:
    """The last word of `text` that may be a noun, or ""."""
    for match in reversed(list(WORD.finditer(text))):
        word = bare(match[0])
        if word not in FUNCTION_WORDS and word not in PARTICIPLES and word not in MONEY:
            return word
    return ""


def verb_of(text: str, within: int = 99) -> str:
    """The participle of the last meaningful verb in `text`, at most `within` words from its end; or ""."""
    words = [match[0] for match in WORD.finditer(re.split(r"[,;:]", text)[-1])]
    for index in range(len(words) - 1, max(-1, len(words) - 1 - within), -1):
        word = words[index].lower()
        participle = PARTICIPLES.get(word)
        if not participle or participle in WEAK:
            continue
        previous = words[index - 1] if index else ""
        acts = previous.lower() in AUXILIARIES or previous[:1].isupper() or word.endswith("ing") or word == participle
        if acts or not (word in NOUN_LIKE or word.rstrip("s") in NOUN_LIKE):
            return participle
    return ""


def passive_of(rest: str) -> str:
    """The participle directly after a noun ("books are brought back", "apples left"), or ""."""
    match = PASSIVE.match(rest)
    found = match and PARTICIPLES.get(match[1]) == match[1] and match[1] not in WEAK | {"left"}
    return match[1] if found else ""


def having(rest: str) -> str:
    """What the noun before `rest` has: `brown_eyes` for "(people) in the theater have brown eyes"; or ""."""
    match = HAVING.match(rest)
    what = noun_phrase(rest[match.end() :], 2) if match else ""
    return "" if what.split("_")[0] in PARTICIPLES else what


def circumstances(before: str, rest: str) -> list[str]:
    """Circumstances such as `in_may` or `for_dress`: from the text after the number, else from the sentence's start."""
    found = [_circumstance(match) for match in AT_ONCE.finditer(re.split(r"[,;]| and ", rest)[0])]
    if not any(found):
        found = [_circumstance(match) for match in LEADING.finditer(before)]
    return [place for place in found if place]


def _circumstance(match: re.Match) -> str:
    if match[1] == "to" and not DETERMINED.match(match[2]):
        return ""  # "to finish"
    words: list[str] = []
    for written in match[2].split():
        word = written.lower()
        skipped = word in FUNCTION_WORDS and word not in ORDINALS
        if not word.isalpha() or (word in PARTICIPLES and word not in NOUN_LIKE) or (skipped and words):
            break
        if not skipped:
            words.append(word)
        if len(words) == 2:
            break
    return "" if ORDINALS.issuperset(words) else "_".join([match[1].lower(), *words])


def per(text: str) -> str:
    """The X of "per X", "each X" or "an X" (for a time) at the start of `text`.

    Returns "each" if "each" comes without an X, and "" if there is no such phrase.
    """
    match = PER.match(text)
    if not match or (match[3] and match[3] not in TIME):
        return ""
    position = max(match.start(group) for group in (1, 2, 3))
    if match[2] and (match[2] in PARTICIPLES or match[2] in LINKING):
        return ""  # "3 cats each eat"
    noun = noun_phrase(text[position:], 2) if position >= 0 else ""
    return singular(noun) if noun else "each" if "each" in match[0] else ""
