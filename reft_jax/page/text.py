"""The terminal twin of the page: one question and what each model answered, as plain text."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

from reft_jax.config import nearest
from reft_jax.page.collect import question, read_answered
from reft_jax.page.log import read_log
from reft_jax.types import InputError

MOST = 4000  # characters of a completion that are printed


def item_text(workdir: Path, item: str) -> str:
    """The answers to one question in every set that has it. InputError if none has."""
    sets = read_answered(workdir)
    asked = [answered for answered in sets if item in answered.items]
    if not asked:
        known = [one for answered in sets for one in answered.items]
        hint = f"; did you mean {nearest(item, known)}?" if known else "; run `sample` or `evaluate` first"
        raise InputError(f"--item: no model in {workdir} has answered {item!r}{hint}")
    endings = read_log(workdir, {one for answered in asked for one in answered.programs(item)}).endings
    return "\n".join("\n".join(_lines(question(answered, item, endings), answered)) for answered in asked)


def _lines(one: dict, answered) -> Iterator[str]:
    yield f"{one['item']} ({answered.name})"
    yield textwrap.fill(plain(one["question"]), 100)
    yield f"answer: {plain(one['answer'])}"
    for name, model in zip(answered.files, one["models"], strict=True):
        for kind in ("greedy", "samples") if model else ():
            if model[kind]:
                yield from _answers(f"{name}, {kind}", model[kind])


def _answers(title: str, answers: dict) -> Iterator[str]:
    rows = answers["rows"]
    right = f": {sum(bool(row[2]) for row in rows)} of {len(rows)} right" if len(rows) > 1 else ""
    yield f"\n== {title}{right}"
    times: dict[int, list] = {}
    for row in rows:
        times.setdefault(row[0], []).append(row)
    for place, same in times.items():
        _, value, correct, outcome, reward, parts, _, probability = same[0]
        verdict = "no answer" if value is None else f"{plain(value)}, {'right' if correct else 'wrong'}"
        known = {"outcome": outcome, "reward": reward, "reranker": probability} | (parts or {})
        told = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
        share = f"{len(same)} of {len(rows)}: " if len(rows) > 1 else ""
        yield f"\n-- {share}{verdict}" + (f"; {told}" if told else "")
        text = plain(answers["prefix"] + answers["texts"][place])
        yield text[:MOST] + (f"\n… {len(text) - MOST} more characters" if len(text) > MOST else "")


def plain(text: str) -> str:
    """The text with control characters and bidirectional marks escaped: a completion may not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in str(text))
