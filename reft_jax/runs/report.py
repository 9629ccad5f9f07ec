"""The result of a run as a table: in the terminal, in report.md and, for programs, in report.json.

A report is a dict of plain JSON values. Counts are counts, differences are fractions; percentages exist only in print.

    title            str
    n                samples a question, for the voting and rerank columns
    test_questions   int
    chosen_on        which data chose the checkpoints: "third split", or "test file, as the paper did"
    rows             [{"model": "ReFT", "top1": {"correct": 309, "total": 500}, "voting": the same or None, "rerank",
                     "upper_bound"}]
    comparison       None or {"a": "ReFT", "b": "SFT", "difference", "low", "high"}: top-1, `intervals.paired_bootstrap`
    notes            [str]
    settings         {name: value}
    seconds          {stage: seconds}
"""

import json
import os
import textwrap
from datetime import timedelta
from pathlib import Path

from reft_jax.task.intervals import wilson

NOTHING = "–"


def markdown_table(report: dict) -> str:
    """The rows as a Markdown table, cells like `61.8 % (309/500) [57.5, 66.0]`; columns without any entry left out."""
    columns = _columns(report)
    lines = [["Model", *columns.values()], ["---"] * (1 + len(columns))]
    for row in report["rows"]:
        lines.append([row["model"], *(" ".join(_cell(row.get(key))).strip() for key in columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_report(workdir: Path, report: dict) -> None:
    """Writes report.md and report.json into `workdir`, each replaced in one go: a reader never sees half a file."""
    for name, text in (
        ("report.md", _markdown(report)),
        ("report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n"),
    ):
        whole = workdir / f"{name}.tmp"
        whole.write_text(text, encoding="utf-8")
        os.replace(whole, workdir / name)


def print_table(report: dict) -> None:
    """Prints the report without its settings and times, each interval under its share.

    At most 110 characters wide while totals have up to 4 digits and models' names up to 20 characters.
    """
    columns = _columns(report)
    lines = [["model", *columns.values()]]
    for row in report["rows"]:
        cells = [_cell(row.get(key)) for key in columns]
        lines.append([row["model"], *(share for share, _ in cells)])
        lines.append(["", *(interval for _, interval in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    remarks = [_subject(report), *_remarks(report)]
    print(f"\n{report['title']}\n")
    print("\n".join([table[0], "─" * max(map(len, table)), *table[1:]]) + "\n")
    print("\n".join(textwrap.fill(remark, width=100, subsequent_indent="  ") for remark in remarks))


def _markdown(report: dict) -> str:
    parts = [f"# {report['title']}", _subject(report), markdown_table(report).rstrip()]
    if remarks := _remarks(report):
        parts.append("\n".join(f"- {remark}" for remark in remarks))
    times = {stage: _clock(seconds) for stage, seconds in report["seconds"].items()}
    for heading, name, entries in (("Time", "stage", times), ("Settings", "setting", report["settings"])):
        if entries:
            rows = "".join(f"\n| {key} | {value} |" for key, value in entries.items())
            parts.append(f"## {heading}\n\n| {name} | |\n| --- | --- |{rows}")
    return "\n\n".join(parts) + "\n"


def _columns(report: dict) -> dict[str, str]:
    """{key in a row: heading} of the columns that have an entry, in the paper's order."""
    n = report["n"]
    headings = {"top1": "top-1", "voting": f"voting@{n}", "rerank": f"rerank@{n}", "upper_bound": "upper bound"}
    return {key: heading for key, heading in headings.items() if any(row.get(key) for row in report["rows"])}


def _cell(count: dict | None) -> tuple[str, str]:
    """`61.8 % (309/500)` and `[57.5, 66.0]`."""
    if count is None:
        return NOTHING, ""
    correct, total = count["correct"], count["total"]
    low, high = wilson(correct, total)
    return f"{100 * correct / total:.1f} % ({correct}/{total})", f"[{100 * low:.1f}, {100 * high:.1f}]"


def _subject(report: dict) -> str:
    samples = f", {report['n']} samples each" if len(_columns(report)) > 1 else ""
    return (
        f"{report['test_questions']} test questions{samples}; checkpoints chosen on: {report['chosen_on']}. "
        "Brackets: 95 % intervals."
    )


def _remarks(report: dict) -> list[str]:
    """The comparison in words, then the notes."""
    comparison = report["comparison"]
    if comparison is None:
        return report["notes"]
    difference, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    verdict = "the interval contains 0: no difference is shown" if low <= 0 <= high else "the interval excludes 0"
    return [
        f"{comparison['a']} minus {comparison['b']}, top-1: {difference:+.1f} points [{low:+.1f}, {high:+.1f}] "
        f"(paired bootstrap over questions); {verdict}.",
        *report["notes"],
    ]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
