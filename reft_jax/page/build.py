"""Makes report.html: one file with style, script and compressed data, which asks the network for nothing.

Data are JSON, deflated, in base64: that alphabet has no `<`, so no completion can end the element that holds it. The
page's policy (Content-Security-Policy) runs our script, by its hash, and nothing else; it loads nothing.
"""

import base64
import hashlib
import json
import zlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from reft_jax.evaluation.intervals import wilson
from reft_jax.evaluation.report import cell, columns, compared, remarks, row_name, subject
from reft_jax.page.collect import (
    curves,
    question,
    read_answered,
    read_reports,
    summary,
)
from reft_jax.page.log import chosen, read_log, read_rollouts
from reft_jax.store import write_whole
from reft_jax.train.progress import remark
from reft_jax.types import InputError

PAGE = "report.html"
SCRIPTS = ("data.js", "code.js", "charts.js", "questions.js", "rollouts.js", "main.js")
PER_CHUNK = 400_000  # characters of JSON in a chunk, unless one question has more


class Chunks:
    """Compressed pieces of the page's data, by number."""

    def __init__(self):
        self.packed: list[str] = []

    def add(self, value: Any) -> int:
        """Packs one value and returns its number."""
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        return self._pack(text)

    def _pack(self, text: str) -> int:
        self.packed.append(base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii"))
        return len(self.packed) - 1

    def paged(self, values) -> list[list[int]]:
        """Packs values in chunks of about PER_CHUNK characters. Returns [[chunk, number of its values]]."""
        pages, texts, size = [], [], 0
        for value in values:
            texts.append(json.dumps(value, separators=(",", ":"), allow_nan=False))
            size += len(texts[-1])
            if size >= PER_CHUNK:
                pages.append([self._pack(f"[{','.join(texts)}]"), len(texts)])
                texts, size = [], 0
        return pages + ([[self._pack(f"[{','.join(texts)}]"), len(texts)]] if texts else [])


def write_page(workdir: Path, iterations: str = "") -> Path:
    """Writes report.html of a work directory, finished or not, and returns its path. InputError, SaveError.

    iterations: those whose rollouts it shows, as in `chosen`.
    """
    path = workdir / PAGE
    write_whole(path, page(workdir, iterations))
    return path


def try_page(workdir: Path) -> bool:
    """`write_page` at the end of a command whose results are there: prints one line if it cannot be made. SaveError.

    Returns whether it is written.
    """
    try:
        write_page(workdir)
    except InputError as error:
        remark(f"warning: {PAGE} is not written: {error}; then run `look`")
        return False
    return True


def page(workdir: Path, iterations: str = "") -> str:
    """The text of report.html."""
    reports, chunks = read_reports(workdir), Chunks()
    answers, sets = read_answered(workdir), []
    log = read_log(workdir, {one for answered in answers for one in answered.programs()})
    shown, left_out = chosen(log, iterations)
    for answered in answers:
        index = []

        def asked(answered=answered, index=index):
            for item in answered.items:
                one = question(answered, item, log.endings)
                index.append(summary(one))
                yield one

        pages = chunks.paged(asked())
        models = list(answered.files)
        sets.append({"name": answered.name, "models": models, "pages": pages, "index": chunks.add(index)})
    rollouts = read_rollouts(workdir, shown)
    told = [
        {"purpose": purpose, "iteration": number, "pages": chunks.paged(lines)}
        for (purpose, number), lines in rollouts.items()
    ]
    sampled = sorted({line["item_id"] for lines in rollouts.values() for line in lines})
    data = {"sets": sets, "iterations": told, "sampled": sampled, "charts": curves(workdir, reports)}
    main, folder = chunks.add(data), files(__package__)
    script = "\n".join([*_chart_library()[:1], *((folder / name).read_text("utf-8") for name in SCRIPTS)])
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return template.from_string((folder / "template.html").read_text("utf-8")).render(
        title=reports[0]["title"] if reports else workdir.absolute().name,
        reports=[_told(report) for report in reports],
        style=Markup("\n".join([*_chart_library()[1:], (folder / "style.css").read_text("utf-8")])),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        chunks=[Markup(one) for one in chunks.packed],
        main=main,
        left_out=left_out,
    )


def _chart_library() -> list[str]:
    """[script, style] of uPlot, which the extra `page` installs; empty without it: then charts are tables only."""
    spec = find_spec("uplot")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0]) / "static"
    return [(folder / name).read_text("utf-8").strip() for name in ("uPlot.iife.js", "uPlot.min.css")]


def _told(report: dict) -> dict[str, Any]:
    """A report as the template shows it."""
    heads = columns(report)
    return {
        "title": report["title"],
        "about": report.get("about", {}),
        "subject": subject(report),
        "heads": list(heads.values()),
        "rows": [(row_name(row, report), [_cell(row.get(key)) for key in heads]) for row in report["rows"]],
        "notes": [*compared(report), *remarks(report), *report["notes"]],
        "settings": report["settings"],
    }


def _cell(count: dict | None) -> tuple:
    """(share, interval, [low, share, width of the interval] in % or None), the last for a bar."""
    if count is None:
        return *cell(None), None
    low, high = wilson(count["correct"], count["total"])
    share = count["correct"] / count["total"]
    return *cell(count), [round(100 * part, 2) for part in (low, share, high - low)]
