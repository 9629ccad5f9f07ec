"""Lists of paths on the command line, with `,`, `=` and `+` between; a path may contain these characters too."""

from collections.abc import Callable
from os.path import exists

from reft_jax.types import InputError


def listed(text: str, is_there: Callable[[str], bool] = exists) -> list[str]:
    """The entries of a list with commas; a comma inside an existing path does not divide it."""
    entries, words = [], text.split(",")
    while words:
        size = next((n for n in range(1, len(words) + 1) if is_there(",".join(words[:n]))), 1)
        entries.append(",".join(words[:size]))
        del words[:size]
    return entries


def named(entry: str) -> tuple[str, str]:
    """(NAME, rest) of `[NAME=]rest`, NAME "" if there is none. The first `=` divides, unless a `/` comes before it."""
    name, equals, rest = entry.partition("=")
    if not equals or "/" in name or (exists(entry) and not exists(rest)):
        return "", entry
    return name, rest


def with_reranker(folders: str) -> tuple[str, str]:
    """(FOLDER, RERANKER) of `FOLDER[+RERANKER]`, RERANKER "" if there is none. InputError if that is ambiguous."""
    pairs = [(folders[:i], folders[i + 1 :]) for i, letter in enumerate(folders) if letter == "+"]
    if exists(folders) or not pairs:
        return folders, ""
    there = [pair for pair in pairs if all(map(exists, pair))] or [pair for pair in pairs if exists(pair[0])]
    if len(there or pairs) > 1:
        raise InputError(f"--models: {folders!r} has more than one '+'; write [NAME=]FOLDER[+RERANKER]")
    [pair] = there or pairs
    if not all(pair):
        raise InputError(f"--models: {folders!r} names no folder on one side of '+'; write [NAME=]FOLDER[+RERANKER]")
    return pair


def is_checkpoint(entry: str) -> bool:
    """Whether the folders of `[NAME=]FOLDER[+RERANKER]` exist."""
    try:
        folder, reranker = with_reranker(named(entry)[1])
    except InputError:
        return False
    return exists(folder) and (not reranker or exists(reranker))


def is_data(entry: str) -> bool:
    """Whether the file of `[NAME=]FILE` exists."""
    return exists(named(entry)[1])
