"""Writes the results of a run or a sweep as tables: in the terminal, in Markdown and in JSON.

A report is about one data file. It is a dict of plain JSON values: counts are integers, shares and differences are
fractions; percentages are only printed. A run has one report, a sweep has one per data file.

    title            str
    about            {name: what made the report: "made" (date), "with" (versions), "model", "data", "curves" (file)}
    n                samples per question, for the voting and rerank columns: the largest number that a model has; a
                      row may have its own "n", 0 without samples
    test_questions   int
    chosen_on        which data chose the checkpoints: "third split", "test file, as the paper did"; "" if not known
    rows             [{"model": "ReFT", "top1": {"correct": 309, "total": 500}, "voting": the same or None, "rerank",
                     "upper_bound", "curve": [{"k": 1, "voting": 0.31, "rerank": 0.33, "upper_bound": 0.31}, …],
                     "no_answer": {"greedy": {"none": 8, "total": 500}, "samples": the same},
                     "rerank_minus_voting": {"difference", "low", "high", "p"}}]
    comparisons      [{"a": "ReFT", "b": "SFT", "column": "top1", "difference", "low", "high", "p"}]
    readings         [{"model", "column", "strict": {"correct": 309, "total": 500}, "lenient": the same, "difference",
                     "low", "high", "p"}]: the same completions read in two ways; only if asked for
    notes            [str]
    settings         {name: value}
    checksums        {name under models/: checksum of that model at the time}; not in a sweep
    seconds          {stage: seconds}
"""

import json
import textwrap
from datetime import timedelta
from pathlib import Path

from reft_jax.evaluation.intervals import wilson
from reft_jax.store import write_whole

NOTHING = "–"
HOW_COMPARED = (
    "Intervals: paired bootstrap over questions. p: McNemar's exact test. Neither is corrected for the number of pairs."
)
SAMPLED = {"voting": "voting@{}", "rerank": "rerank@{}", "upper_bound": "upper bound"}


def markdown_table(report: dict) -> str:
    """The rows as a Markdown table, with cells like `61.8 % (309/500) [57.5, 66.0]`. Empty columns are left out."""
    heads = columns(report)
    rows = [[row_name(row, report), *(" ".join(cell(row.get(key))).strip() for key in heads)] for row in report["rows"]]
    return _markdown(["Model", *heads.values()], rows)


def markdown_curves(report: dict) -> str:
    """One table each for voting, rerank and upper bound: models by number of samples. Empty without samples."""
    parts = []
    for key, heading in SAMPLED.items():
        curves = {row["model"]: [p for p in row.get("curve", []) if key in p] for row in report["rows"]}
        ks = sorted({p["k"] for curve in curves.values() for p in curve})
        lines = []
        for model, curve in curves.items():
            shares = {p["k"]: _share(p[key], report["test_questions"]) for p in curve}
            if shares:
                lines.append([model, *(shares.get(k, NOTHING) for k in ks)])
        if lines:
            parts.append(_markdown([heading.format("k") + ", by samples per question", *map(str, ks)], lines))
    return "\n".join(parts)


def markdown_comparisons(report: dict) -> str:
    """A table with one row per pair of models and cells like `+11.6 [+9.1, +14.1], p 0.0002`."""
    heads = columns(report)
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for found in report["comparisons"]:
        cells = pairs.setdefault((found["a"], found["b"]), {})
        cells[found["column"]] = f"{difference(found)}, p {found['p']:.2g}"
    used = [key for key in heads if any(key in cells for cells in pairs.values())]
    lines = [[f"{a} − {b}", *(cells.get(key, NOTHING) for key in used)] for (a, b), cells in pairs.items()]
    return _markdown(["points", *(heads[key] for key in used)], lines) if lines else ""


def markdown_readings(report: dict) -> str:
    """A table with one row per model and column: the share in either reading, and lenient minus strict."""
    heads, lines = columns(report), []
    for one in report.get("readings", []):
        shares = [" ".join(cell(one[reading])) for reading in ("strict", "lenient")]
        name = f"{one['model']}, {heads[one['column']]}"
        lines.append([name, *shares, f"{difference(one)}, p {one['p']:.2g}"])
    return _markdown(["the same completions", "read strictly", "read leniently", "points"], lines) if lines else ""


def write_report(folder: Path, report: dict) -> None:
    """Writes report.md and report.json into `folder`, each in one go: a reader never sees half a file."""
    _write(folder / "report", markdown(report), report)


def write_sweep(folder: Path, reports: list[dict]) -> None:
    """Writes sweep.md and sweep.json, with the reports one after another, in the same way."""
    _write(folder / "sweep", "\n".join(map(markdown, reports)), reports)


def print_report(report: dict) -> None:
    """Prints the report without curves, settings and times, with each interval under its share.

    It is at most 110 characters wide if totals have up to 4 digits and model names up to 21 characters.
    """
    heads = columns(report)
    lines = [["model", *heads.values()]]
    for row in report["rows"]:
        cells = [cell(row.get(key)) for key in heads]
        lines.append([row_name(row, report), *(share for share, _ in cells)])
        lines.append(["", *(interval for _, interval in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    told = [subject(report), *compared(report), *remarks(report), *report["notes"]]
    print(f"\n{report['title']}\n")
    print("\n".join([table[0], "─" * max(map(len, table)), *table[1:]]) + "\n")
    print("\n".join(textwrap.fill(remark, width=100, subsequent_indent="  ") for remark in told))
    if readings := markdown_readings(report):
        print(f"\n{readings}", end="")


def markdown(report: dict) -> str:
    """The whole report in Markdown, without empty parts. The long list of settings is folded away."""
    notes = _bullets([*remarks(report), *report["notes"]])
    parts = [f"# {report['title']}", _about(report), subject(report), markdown_table(report), notes]
    if report["comparisons"]:
        parts += ["## Differences", markdown_comparisons(report), _bullets([*compared(report), HOW_COMPARED])]
    if curves := markdown_curves(report):
        parts += ["## By number of samples", curves]
    if readings := markdown_readings(report):
        parts += ["## Strict and lenient reading", readings]
    times = {stage: _clock(seconds) for stage, seconds in report["seconds"].items()}
    if times:
        parts += ["## Time", _pairs("stage", times)]
    if settings := report["settings"]:
        summary = f"<details>\n<summary>{len(settings)} settings</summary>"
        parts += ["## Settings", summary, _pairs("setting", settings), "</details>"]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _write(path: Path, text: str, data) -> None:
    for suffix, content in ((".md", text), (".json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")):
        write_whole(path.with_suffix(suffix), content)


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *lines))


def _pairs(name: str, entries: dict) -> str:
    return _markdown([name, ""], [[key, str(value)] for key, value in entries.items()])


def columns(report: dict) -> dict[str, str]:
    """{key in a row: heading} of the columns that are not empty, in the paper's order."""
    n = report["n"] if len(_sizes(report)) < 2 else "n"
    headings = {"top1": "top-1"} | {key: heading.format(n) for key, heading in SAMPLED.items()}
    return {key: heading for key, heading in headings.items() if any(row.get(key) for row in report["rows"])}


def _sizes(report: dict) -> set[int]:
    """The numbers of samples per question that its rows have."""
    return {row["n"] for row in report["rows"] if row.get("n")}


def row_name(row: dict, report: dict) -> str:
    """The model's name, with its number of samples if the rows differ in it."""
    return f"{row['model']} (n={row['n']})" if row.get("n") and len(_sizes(report)) > 1 else row["model"]


def cell(count: dict | None) -> tuple[str, str]:
    """`61.8 % (309/500)` and `[57.5, 66.0]`."""
    if count is None:
        return NOTHING, ""
    correct, total = count["correct"], count["total"]
    return f"{100 * correct / total:.1f} % ({correct}/{total})", _interval(correct, total)


def _share(share: float, questions: int) -> str:
    """`61.8 [57.5, 66.0]`."""
    return f"{100 * share:.1f} {_interval(share * questions, questions)}"


def _interval(correct: float, total: int) -> str:
    low, high = wilson(correct, total)
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def difference(found: dict) -> str:
    difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
    return f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def subject(report: dict) -> str:
    each = " or ".join(map(str, sorted(_sizes(report)))) or report["n"]
    samples = f", {each} samples each" if len(columns(report)) > 1 else ""
    chosen = f"; checkpoints chosen on: {report['chosen_on']}" if report["chosen_on"] else ""
    return f"{report['test_questions']} test questions{samples}{chosen}. Brackets: 95 % intervals."


def _about(report: dict) -> str:
    """Date, versions, model, data and a link to the curves, one line each."""
    about = report.get("about", {})
    links = {"curves": "[{0}]({0})"}
    return _bullets([f"{name}: {links.get(name, '{0}').format(text)}" for name, text in about.items()])


def remarks(report: dict) -> list[str]:
    """Remarks on the rows: shares without an answer, and rerankers that are worse than voting."""
    without, kinds = [], {"greedy": "greedy answers", "samples": "samples"}
    for row in report["rows"]:
        found = row.get("no_answer", {})
        shares = [f"{100 * n['none'] / n['total']:.1f} % of {kinds[kind]}" for kind, n in found.items()]
        without += [f"{row['model']} {' and '.join(shares)}"] if shares else []
    remarks = [f"Without an answer: {'; '.join(without)}."] if without else []
    for row in report["rows"]:
        gap = row.get("rerank_minus_voting")
        if gap and gap["difference"] < 0:
            told = f"{difference(gap)} points, p {gap['p']:.2g}"
            remarks.append(f"{row['model']}: the reranker chooses worse than voting does: {told}.")
    return remarks


def compared(report: dict) -> list[str]:
    """The last model's top-1 compared with that of every other model, in words."""
    lines = []
    for found in report["comparisons"]:
        if found["column"] == "top1" and found["a"] == report["rows"][-1]["model"]:
            none = found["low"] <= 0 <= found["high"]
            verdict = "the interval contains 0: no difference is shown" if none else "the interval excludes 0"
            what = f"{found['a']} minus {found['b']}, top-1"
            lines.append(f"{what}: {difference(found)} points, p {found['p']:.2g}; {verdict}.")
    return lines


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
