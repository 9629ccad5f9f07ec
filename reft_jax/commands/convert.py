"""The command `convert`: training files from data as published. GSM8K becomes programs and text, other data is checked.

Nothing is guessed: a program is kept if it keeps the rules of gsm8k_programs/program_rules.py and returns the correct
answer when the executor runs it. Every other row goes into rejected.jsonl with its reason.
"""

import json
import os
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from reft_jax import executor
from reft_jax.gsm8k_programs import conversion
from reft_jax.model_folder import SCRATCH
from reft_jax.run.machine import running_executor
from reft_jax.run.workdir import check_writable
from reft_jax.store import writing
from reft_jax.tasks import answers
from reft_jax.tasks.datasets import load_examples, read_rows
from reft_jax.tasks.gsm8k import read_official
from reft_jax.tasks.prompts import PROGRAM_HEAD, sft_target
from reft_jax.tasks.registry import PAPER, TASKS, plain_answer
from reft_jax.types import Example, InputError

HUB_GSM8K = "openai/gsm8k"
FILES = {"python": "python_sdp", "nl": "nl"}  # the authors' names: gsm8k_python_sdp.json
MEMORY_MB = 1024
PROGRESS = 2000  # rows between two lines of progress
CLOSING = re.compile(r"Therefore, the answer is:? <?(-?[\d.,]+|[a-e])>?\.?\s*$")
Judged = tuple[Example, str, str]  # row with its solution, answer format, and why it is rejected, "" if it is not


def run_convert(
    dataset: str, source: str | None, out_dir: Path, *, show: int, seed: int, allow_unsandboxed: bool
) -> None:
    """Converts and verifies the rows of `source`, writes the files into `out_dir` and prints a summary.

    source: a file, `hub:owner/name:split`, or openai/gsm8k for its training split; None: openai/gsm8k if the dataset is
    gsm8k. show: how many programs to print, drawn with `seed`. Raises InputError before anything is written.
    """
    began = time.monotonic()
    if not (source := source or (HUB_GSM8K if dataset == "gsm8k" else "")):
        raise InputError(f"--in is missing: name the file of {dataset}")
    check_writable("--out_dir", out_dir)
    may_write = [f"{dataset}_{name}.json" for name in (*FILES.values(), "questions")] + ["rejected.jsonl"]
    if Path(source).parent.resolve() == out_dir.resolve() and Path(source).name in may_write:
        raise InputError(f"--out_dir: {out_dir} holds {source}, which would be overwritten; choose another")
    source = f"hub:{HUB_GSM8K}/main:train" if source == HUB_GSM8K else source
    published = read_rows(source)
    official = dataset == "gsm8k" and not _is_ours(published)
    rows = read_official(source, published) if official else _examples(dataset, source)
    workers = max(2, os.cpu_count() or 1)
    with running_executor(workers, MEMORY_MB, allow_unsandboxed):
        judged = list((_converted if official else _checked)(rows, workers))
    rejected = [one for one in judged if one[2]]
    made = {kind: [row for row, form, reason in judged if form == kind and not reason] for kind in FILES}
    files = {f"{dataset}_{FILES[form]}.json": kept for form, kept in made.items() if kept or official}
    files[f"{dataset}_questions.json"] = [Example(row.item_id, row.question, row.answer_value) for row in rows]
    _write(out_dir, {name: _as_json(kept) for name, kept in files.items()}, rejected)
    print(_summary(source, len(rows), made, rejected, time.monotonic() - began))
    print(f"{out_dir}: " + ", ".join(f"{name} ({len(kept)})" for name, kept in files.items()) + ", rejected.jsonl")
    programs = made.get("python", [])
    for example in random.Random(seed).sample(programs, min(show, len(programs))):
        print(f"\n\n# {example.item_id}: {example.answer_value}\n{example.answer_cot}")


def _is_ours(rows: list) -> bool:
    return any(isinstance(row, dict) and {"item_id", "answer_value"} & row.keys() for row in rows)


def _examples(dataset: str, source: str) -> list[Example]:
    """The rows of a file in our format: stripped, numbers without commas, letters in lower case. Raises InputError."""
    examples = []
    for index, example in enumerate(load_examples(source, need_cot=False)):
        if PAPER.of(example.item_id).name != dataset:
            problem = f"{source}: row {index}, field 'item_id': {example.item_id!r} is not a row of {dataset}"
            raise InputError(f"{problem}; convert the file as the dataset that its ids name")
        value = example.answer_value.strip()
        value = value.lower() if TASKS[dataset].want == "text" else plain_answer(value)
        cot = example.answer_cot and example.answer_cot.strip()
        examples.append(Example(example.item_id, example.question.strip(), value, cot))
    return examples


def _converted(rows: list[conversion.Official], workers: int) -> Iterator[Judged]:
    """Official rows as programs, which run while the next ones are made, and as text."""
    running = []
    with executor.stream(workers=workers, memory_mb=MEMORY_MB) as programs:
        for number, row in enumerate(rows, 1):
            converted = conversion.convert_row(row)
            running.append((row, converted, converted.program and programs.submit(converted.program)))
            if number % PROGRESS == 0:
                print(f"{number} of {len(rows)} rows", flush=True)
    for row, converted, future in running:
        reason = converted.reason
        if future:
            outcome = future.result()
            value, _ = TASKS["gsm8k"].returned(outcome)
            if not TASKS["gsm8k"].is_correct(value, row.answer_value):
                reason = f"the program returns another answer ({outcome.status})"
        yield Example(row.item_id, row.question, row.answer_value, converted.program), "python", reason
        text = conversion.nl_example(row)
        yield text, "nl", conversion.nl_problem(text) or _text_problem(text)


def _checked(rows: list[Example], workers: int) -> Iterator[Judged]:
    """Rows that have a worked solution: programs are executed, text must end in the answer."""
    programs = [row for row in rows if row.answer_cot and PROGRAM_HEAD.strip() in row.answer_cot]
    run = partial(executor.run_programs, workers=workers, memory_mb=MEMORY_MB)
    verdicts = answers.grade([row.answer_cot for row in programs], programs, "python", run_programs=run)
    for row, verdict in zip(programs, verdicts, strict=True):
        nothing = f"the program returns nothing ({verdict.status})"
        reason = nothing if verdict.value is None else f"the program returns {verdict.value}, not {row.answer_value}"
        yield row, "python", "" if verdict.correct else reason
    for row in rows:
        if row.answer_cot and PROGRAM_HEAD.strip() not in row.answer_cot:
            yield row, "nl", _text_problem(row)


def _text_problem(row: Example) -> str:
    """Why a solution in words does not give the row's answer; "" if it does."""
    [verdict] = answers.grade([sft_target(row, "nl")], [row], "nl", run_programs=executor.run_programs)
    if not verdict.correct:
        return "the answer phrase does not give the answer"
    closing = CLOSING.search(row.answer_cot)
    task = PAPER.of(row.item_id)
    if closing and not task.is_correct(task.target(closing[1]), row.answer_value):
        return f"the text ends in {closing[1]}, the answer is {row.answer_value}"
    return ""


def _as_json(examples: list[Example]) -> str:
    rows = [{key: value for key, value in example._asdict().items() if value is not None} for example in examples]
    return json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def _write(folder: Path, files: dict[str, str], rejected: list[Judged]) -> None:
    """Writes all files or none: into a folder of their own first, moved when the last one is complete. SaveError."""
    lines = [
        {"item_id": row.item_id, "format": form, "reason": reason, "question": row.question}
        for row, form, reason in rejected
    ]
    files["rejected.jsonl"] = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        for name, text in files.items():
            with writing(folder / name):
                Path(scratch, name).write_text(text, encoding="utf-8")
        for name in files:
            os.replace(Path(scratch, name), folder / name)


def _summary(source: str, rows: int, made: dict[str, list[Example]], rejected: list[Judged], seconds: float) -> str:
    kinds = [f"{len(kept)} verified {form} ({len(kept) / rows:.2%})" for form, kept in made.items() if kept]
    # Reasons name single values: they are counted without them.
    reasons = Counter((form, re.sub(r"`\w+`|-?\d+(\.\d+)?", "…", reason)) for _, form, reason in rejected)
    lines = [f"{count:6d} {form} rejected: {reason}" for (form, reason), count in reasons.most_common()]
    return "\n".join([", ".join([f"{source}: {rows} rows", *kinds, f"{seconds:.0f} s"]), *lines])
