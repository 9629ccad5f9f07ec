"""n completions a question from one model, executed and graded, one question a line in samples/NAME_SPLIT.jsonl."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from reft_jax.parallel import hosts
from reft_jax.runs.rollout import Graded, roll_out
from reft_jax.runs.setup import Run, shorten
from reft_jax.runs.stages import load_model
from reft_jax.task.records import GREEDY, appending, question_record, read_lines
from reft_jax.train.metrics import Progress
from reft_jax.types import Example


def samples_path(run: Run, name: str, split: str) -> Path:
    return run.workdir / "samples" / f"{name}_{split}.jsonl"


def run_sample(run: Run, name: str, split: str) -> list[dict]:
    """Question records (see task.voting) of model `name` on "test", or on "train" for the rerankers; resumes."""
    settings = run.config.sample
    if split == "test":
        examples, n = run.data.test, settings.n
    else:
        examples, n = shorten(run.data.train, settings.train_limit, run.config.seed), settings.train_n
    path, what = samples_path(run, name, split), f"{name} samples on {split}"
    return sampled(run, path, examples, n, lambda: load_model(run, name)["lm"], what)


def greedy_answers(run: Run, path: Path, examples: list[Example], load: Callable[[], dict], what: str) -> list[dict]:
    """Question records of one greedy answer each, kept beside the samples at `path`; resumes."""
    return sampled(run, path.with_suffix(GREEDY), examples, 1, load, what, temperature=0.0, top_k=0)


def sampled(
    run: Run, path: Path, examples: list[Example], n: int, load: Callable[[], dict], what: str, **sampling
) -> list[dict]:
    """The records of `examples`, in their order; those that are not in the file at `path` are made now and appended.

    A question is on the disk once its last completion is graded; with several hosts, once those of its group are.
    `load()` gives the model's parameters, if they are needed; `what` names the completions in the audit log;
    `sampling` replaces settings of config.sample.
    """
    settings, records = run.config.sample, {record["item_id"]: record for record in read_lines(path)}
    hosts.agree(str(path), questions=len(records))
    left = [example for example in examples if example.item_id not in records]
    if not left:
        print(f"{what}: done already, {path}", flush=True)
    else:
        sampling = {
            "max_len": settings.max_len,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
        } | sampling
        lm, right = load(), sum(record["is_correct"] for record in records.values())
        progress = Progress(what, len(examples) * n, "completion", done0=len(records) * n)
        progress.say("compiling")
        with appended(path) as file:
            group = max(1, 16 * run.config.engine.slots // n)  # questions; in between the last rows leave slots empty
            for start in range(0, len(left), group):
                for record in sample_questions(run, lm, left[start : start + group], n, what, sampling):
                    file.write(json.dumps(record) + "\n")
                    records[record["item_id"]], right = record, right + record["is_correct"]
                    progress.update(len(records) * n, correct=right / len(records))
        progress.close()
        hosts.gather(f"{path} is written", None)
    return [records[example.item_id] for example in examples]


def appended(path: Path) -> AbstractContextManager[TextIO]:
    """The file, open for new lines, on the first host; those of the others go nowhere."""
    return appending(path) if hosts.is_first() else open(os.devnull, "a", encoding="utf-8")


def sample_questions(run: Run, lm, examples: list[Example], n: int, purpose: str, sampling: dict) -> Iterator[dict]:
    """The record of each question, as its last completion is graded."""
    asked = [example for example in examples for _ in range(n)]
    found: list[dict[int, Graded]] = [{} for _ in examples]  # by sample
    for i, graded in roll_out(run, lm, run.prompts(examples, n), asked, purpose, **sampling):
        q, sample = divmod(i, n)
        found[q][sample] = graded
        if len(found[q]) == n:
            _, texts, verdicts = zip(*(found[q][sample] for sample in range(n)), strict=True)
            yield question_record(examples[q], texts, verdicts)
