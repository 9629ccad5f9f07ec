"""The command `evaluate --samples`: grades every stored answer again, without a model and without an accelerator."""

import os
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from reft_jax import executor
from reft_jax.evaluation.provenance import ASIDE
from reft_jax.evaluation.records import GREEDY, RERANK, regrade
from reft_jax.evaluation.report import print_report, write_sweep
from reft_jax.evaluation.results import Answers, by_item, read_answers, table
from reft_jax.run.machine import running_executor
from reft_jax.run.workdir import check_writable
from reft_jax.store import writing
from reft_jax.tasks.registry import PAPER, Task, load_task
from reft_jax.types import InputError

MEMORY_MB, TIMEOUT_S = 1024, 10.0  # per program, the defaults of a run


def run_regrade(
    sources: list[str], *, execute: bool, out_dir: Path | None, seed: int, allow_unsandboxed: bool, task: str = ""
) -> None:
    """Grades sample files, or folders of them, again; prints one table for all files that have the same questions.

    execute: run every program again instead of trusting its stored value. out_dir: where to write sweep.md and
    sweep.json, None to print only. seed: of subsets and intervals. task: as the setting `task`. Raises InputError
    before anything is executed.
    """
    began, asked = time.monotonic(), load_task(task)
    if out_dir:
        check_writable("--out_dir", out_dir)
    files = {path: read_answers(label, path, asked) for path, label in labels(sample_files(sources)).items()}
    with running_executor(os.cpu_count() or 1, MEMORY_MB, allow_unsandboxed) if execute else nullcontext():
        found = [_graded(path, answers, execute, asked) for path, answers in files.items()]
    by_questions: dict[tuple[str, ...], list[Answers]] = {}
    for answers in found:
        by_questions.setdefault(tuple(sorted(answers.samples)), []).append(answers)
    reports = []
    for models in by_questions.values():
        title = ", ".join(answers.model for answers in models)
        report = {"title": title, "chosen_on": "", "notes": [], "settings": {}, "seconds": {}}
        reports.append(report | table(models, seed, asked))
        print_report(reports[-1])
    if out_dir:
        with writing(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        write_sweep(out_dir, reports)
    print(f"\n{time.monotonic() - began:.0f} s")


def sample_files(sources: list[str]) -> list[Path]:
    """The files of `sources` in order; for a folder, its sample files and those of the folders in it (a sweep's).

    Raises InputError if there is none.
    """
    files = []
    for source in sources:
        path = Path(source)
        inside = sorted([*path.glob("*.jsonl"), *path.glob("*/*.jsonl")]) if path.is_dir() else [path]
        files += [file for file in inside if not file.name.endswith((GREEDY, RERANK)) and file.parent.name != ASIDE]
    if not files:
        raise InputError(f"--samples: no sample files (*.jsonl) in {', '.join(sources)}; sample first")
    return list(dict.fromkeys(files))


def labels(files: list[Path]) -> dict[Path, str]:
    """The name of each file's row: the file's name, or its path where two files share a name."""
    names = Counter(path.stem for path in files)
    return {path: path.stem if names[path.stem] == 1 else str(path.with_suffix("")) for path in files}


def _graded(path: Path, answers: Answers, execute: bool, task: Task = PAPER) -> Answers:
    run_programs = partial(executor.run_programs, timeout_s=TIMEOUT_S, workers=os.cpu_count() or 1, memory_mb=MEMORY_MB)
    (samples, changed), (first, more) = (
        regrade(list(one.values()), run_programs if execute else None, task) if one else ([], 0)
        for one in (answers.samples, answers.greedy)
    )
    total = sum(len(record["predictions"]) for record in [*samples, *first])
    how = "executed" if execute else "graded from its stored value"
    print(f"{path}: each of {total} answers {how}; {changed + more} differ from what the file says")
    return answers._replace(samples=by_item(samples), greedy=by_item(first))
