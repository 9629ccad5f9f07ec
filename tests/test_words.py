"""Plain English: phrases that may not come back, and prose that wraps at 100 characters (CONTRIBUTING.md, "Words")."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DOCS = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    REPO / "benchmarks" / "README.md",
    *sorted(REPO.glob("docs/**/*.md")),
]
# Whole files: identifiers and data are read too, which costs nothing while none of them contains a phrase.
SOURCES = sorted(
    path
    for folder, pattern in (
        *((name, "*.py") for name in ("reft_jax", "configs", "docs", "benchmarks")),
        ("launch", "*"),
    )
    for path in (REPO / folder).rglob(pattern)
    if path.is_file() and "__pycache__" not in path.parts
)

# phrase: what to write instead. A space matches a line break too, with the comment mark or the quotes around it.
PHRASES = {
    "that is none": "NaN or infinite",
    "that are none": "NaN or infinite",
    "is no text": "is not text",
    "decision, something": "say what the value is",
    "anew": "again; starts over",
    "goes on": "resumes; continues",
    "go on": "resume; continue",
    "better away": "better without it",
    "cannot but": "the minimum",
    "dearest": "the most expensive",
    "dearer": "more expensive",
    "hungry": "waiting",
    "rightly": "correctly",
    "likewise": "also",
    "whom there is": "that have a free …",
    "for whom": "for which host",
    "for want of": "because … is missing",
    "comes of": "results from",
    "come of": "result from",
    "came of": "resulted from",
    "at hand": "available",
    "just so": "the same way",
    "broke down": "failed",
    "broken off": "cut short; stopped",
    "what is beside": "what else is in memory",
    # *Program* is only what a model writes.
    "compiled program": "compiled function",
    "compiled programs": "compiled functions",
    "jitted program": "compiled function",
    "jitted programs": "compiled functions",
    # *Engine* is only the rollout engine.
    "python engine": "answer format python",
    "`python` engine": "answer format `python`",
    "nl engine": "answer format nl",
    "`nl` engine": "answer format `nl`",
    "the other engine": "the other answer format",
    "the engine is": "data.format is",
    "of that engine": "of that answer format",
}
# In documents only: the code refuses an old name and says the new one.
OLD_NAMES = {
    "--out-dir": "--out_dir",
    "--max-len": "--max_len",
    "data.engine": "data.format",
    "config.ppo": "config.rl",
    "ppo.prompts": "rl.questions",
}
PER = re.compile(
    r"\b(?:tokens|rows|samples|completions|questions|answers|updates|iterations|lines) an?\s+"
    r"(?:second|row|question|prompt|update|iteration|epoch|token|step|device|host|slot|pass)\b",
    re.IGNORECASE,
)
GAP = r"""\s*["']?\s+(?:\#\s*|f?["'])?\s*"""


def pattern(phrase: str) -> re.Pattern:
    return re.compile(r"(?<!\w)" + GAP.join(map(re.escape, phrase.split())) + r"(?!\w)", re.IGNORECASE)


def found(text: str, phrases: dict[str, str]) -> list[tuple[int, str]]:
    """(line, what to write instead of what) for every phrase in the text."""
    hits = [
        (text.count("\n", 0, match.start()) + 1, f"{phrase!r}: write {instead!r}")
        for phrase, instead in phrases.items()
        for match in pattern(phrase).finditer(text)
    ]
    hits += [
        (text.count("\n", 0, match.start()) + 1, f"{match.group()!r}: write 'per', not 'a'")
        for match in PER.finditer(text)
    ]
    return sorted(hits)


def problems(paths: Iterable[Path], phrases: dict[str, str]) -> list[str]:
    return [
        f"{path.relative_to(REPO)}:{line}: {problem}"
        for path in paths
        for line, problem in found(path.read_text(encoding="utf-8"), phrases)
    ]


def too_long(text: str) -> list[int]:
    """Lines of prose over 100 characters: not tables, code, what a script writes between marks, or one long link."""
    lines, code, marked = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            code = not code
        elif line.startswith("<!-- "):
            marked = not line.startswith("<!-- end")
        elif len(line) > 100 and not (code or marked or line.startswith("|") or " " not in line.lstrip("-* ")):
            lines.append(number)
    return lines


def test_documents_keep_to_plain_words():
    assert len(DOCS) >= 12 and all(path.is_file() for path in DOCS)
    assert "\n".join(problems(DOCS, PHRASES | OLD_NAMES)) == ""


def test_code_keeps_to_plain_words():
    assert len(SOURCES) > 100
    assert "\n".join(problems(SOURCES, PHRASES)) == ""


def test_prose_wraps_at_100_characters():
    long = [f"{path.relative_to(REPO)}:{line}" for path in DOCS for line in too_long(path.read_text(encoding="utf-8"))]
    assert long == []


@pytest.mark.parametrize("phrase", [*PHRASES, *OLD_NAMES])
def test_every_phrase_is_found(phrase):
    assert found(f"One line.\nHere: {phrase.capitalize()}, and more.\n", {phrase: "x"}) == [
        (2, f"{phrase!r}: write 'x'")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "A number that is\nnone ends the run.",
        "def f():\n    # a number that is\n    # none ends the run\n",
        'raise E("a number that "\n    "is none")',
        "raise E('a number that is '\n    f'none')",
        "A NUMBER THAT IS NONE",
        "180 tokens a second",
        "samples a\nquestion",
        "32 questions an iteration",
    ],
)
def test_a_planted_line_is_found(text):
    assert len(found(text, PHRASES)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "if value is None: the manewal",
        "became of it; cargo on board; categories online",
        "tokens per second, samples per question",
        "the engine decodes; a program that a model wrote",
    ],
)
def test_plain_lines_pass(text):
    assert found(text, PHRASES | OLD_NAMES) == []


def test_a_long_line_of_prose_is_found():
    words = "words " * 20
    assert too_long(f"short\n{words}\n") == [2]
    assert (
        too_long(f"```\n{words}\n```\n| {words} |\n<!-- a: by b.py -->\n{words}\n<!-- end of a -->\n- {'x' * 120}\n")
        == []
    )
    assert too_long(f"<!-- end of a -->\n{words}\n") == [2]
