"""The command `evaluate --samples`: grades every stored answer again, without a model and without an accelerator."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from reft_jax import executor
from reft_jax.evaluation import results
from reft_jax.evaluation.provenance import ASIDE
from reft_jax.evaluation.records import GREEDY, RERANK, SAMPLES_KIND, read_file, regrade
from reft_jax.evaluation.report import print_report, write_sweep
from reft_jax.evaluation.results import Answers, by_item, read_answers, table
from reft_jax.run.machine import running_executor
from reft_jax.run.workdir import check_writable
from reft_jax.store import writing
from reft_jax.tasks.answers import RunPrograms
from reft_jax.tasks.registry import PAPER, Task, load_task
from reft_jax.types import InputError

MEMORY_MB, TIMEOUT_S = 1024, 10.0  # per program, the defaults of a run


def run_regrade(
    sources: list[str],
    *,
    execute: bool,
    out_dir: Path | None,
    seed: int,
    allow_unsandboxed: bool,
    task: str = "",
    reading: str = "strict",
    both_readings: bool = False,
) -> None:
    """Grades sample files, or folders of them, again; prints one table for all files that have the same questions.

    execute: run every program again instead of trusting its stored value. out_dir: where to write sweep.md and
    sweep.json, None to print only. seed: of subsets and intervals. task, reading: as the settings `task` and
    `data.reading`. both_readings: also the other reading beside it. Raises InputError before anything is executed,
    also if programs must run for a reading that is not the file's and `execute` is not given.
    """
    began, asked = time.monotonic(), load_task(task, reading)
    other = load_task(task, "lenient" if reading == "strict" else "strict") if both_readings else None
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
            report |= table(models, seed, asked)
            if other:
                programs = _run_programs if execute else _refuse(title, other.reading)
                report["readings"] = results.both_readings(models, seed, asked, other, programs)
            reports.append(report)
    for report in reports:
        print_report(report)
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


def stored_reading(path: Path, task: Task) -> str:
    """The reading that gave the values of a sample file."""
    headers = read_file(path, SAMPLES_KIND, task).headers
    return headers[-1]["made_by"].get("reading", "strict") if headers else "strict"


def _run_programs(programs: Sequence[str], *, want: str) -> list[executor.ExecResult]:
    workers = os.cpu_count() or 1
    return executor.run_programs(programs, want=want, timeout_s=TIMEOUT_S, workers=workers, memory_mb=MEMORY_MB)


def _refuse(what: str, reading: str) -> RunPrograms:
    def run_programs(programs: Sequence[str], *, want: str) -> NoReturn:
        raise InputError(
            f"{what}: its values were read in another way, and programs must run for the {reading} reading; "
            "add --execute"
        )

    return run_programs


def _graded(path: Path, answers: Answers, execute: bool, task: Task = PAPER) -> Answers:
    programs = _run_programs if execute else None
    if not execute and task.reading != stored_reading(path, task):
        programs = _refuse(str(path), task.reading)  # texts are read again
    (samples, changed), (first, more) = (
        regrade(list(one.values()), programs, task) if one else ([], 0) for one in (answers.samples, answers.greedy)
    )
    total = sum(len(record["predictions"]) for record in [*samples, *first])
    how = "executed" if execute else "read again" if programs else "graded from its stored value"
    print(f"{path}: each of {total} answers {how}; {changed + more} differ from what the file says")
    return answers._replace(samples=by_item(samples), greedy=by_item(first))
