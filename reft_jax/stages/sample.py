"""Samples n completions per question from one model; one line per question in samples/NAME_SPLIT.jsonl."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from reft_jax.engine.generate import quantized
from reft_jax.evaluation import provenance
from reft_jax.evaluation.provenance import Fits, MadeBy, Stored, anything
from reft_jax.evaluation.records import GREEDY, GREEDY_KIND, SAMPLES_KIND, answered, first_samples, prediction
from reft_jax.parallel import hosts
from reft_jax.run.about import commit, versions
from reft_jax.run.inputs import shorten
from reft_jax.run.open import Run
from reft_jax.stages.models import Weights, check_data, policy
from reft_jax.stages.rollout import Graded, roll_out
from reft_jax.train.progress import Progress
from reft_jax.types import Example, Prompt


def run_sample(run: Run, name: str, split: str) -> list[dict]:
    """Question records (evaluation/voting.py) of model `name` on "test", or on "train" for the rerankers; resumes.

    InputError if a finished stage was trained on questions that have changed since.
    """
    settings = run.config.sample
    if split == "test":
        examples, n = run.inputs.data.test, settings.n
    else:
        check_data(run)
        examples, n = shorten(run.inputs.data.train, settings.train_limit, run.config.seed), settings.train_n
    return sampled(run, run.workdir.samples(name, split), examples, n, policy(run, name), f"{name} samples on {split}")


def greedy_answers(run: Run, path: Path, examples: list[Example], weights: Weights, what: str) -> list[dict]:
    """Question records of one greedy answer each, kept beside the samples at `path`; resumes."""
    return sampled(run, path.with_suffix(GREEDY), examples, 1, weights, what, temperature=0.0, top_k=0)


def made_by(run: Run, weights: Weights, examples: list[Example], n: int, **sampling) -> MadeBy:
    """The header of a file of answers; `sampling` replaces settings of config.sample."""
    settings, limits = run.config.sample, run.config.executor
    sampling = {"temperature": settings.temperature, "top_k": settings.top_k, "max_len": settings.max_len} | sampling
    task = run.inputs.task
    identity = {"model": weights.checksum, "format": run.config.data.format} | sampling
    identity |= {"seed": run.config.seed, "dtype": run.config.model.dtype}
    others = {"task": task.name, "template": run.inputs.template}
    others |= {f"engine.{part}": "int8" for part in quantized(run.config)}
    identity |= {key: value for key, value in others.items() if value}
    identity |= {} if task.reading == "strict" else {"reading": task.reading}
    kind = SAMPLES_KIND if sampling["temperature"] else GREEDY_KIND
    about = {"n": n, "limits": {"timeout_s": limits.timeout_s, "memory_mb": limits.memory_mb}}
    return MadeBy(kind, identity, recorded(examples, **about), task)


def recorded(examples: list[Example], **more) -> dict:
    """What every header records besides the settings that decide the answers."""
    data = {"rows": len(examples), "data": provenance.examples_checksum(examples)}
    return data | more | {"versions": versions() | {"commit": commit()}}


def reusable(path: Path, made: MadeBy, examples: list[Example], fits: Fits = anything) -> Stored:
    """What the file at `path` holds of the examples. The first host moves out of the file what may not be used."""
    found = provenance.make_ready(path, made, examples, fits) if hosts.is_first() else None
    hosts.gather(f"{path} is ready", None)
    return found or provenance.stored(path, made, examples, fits)


def sampled(
    run: Run, path: Path, examples: list[Example], n: int, weights: Weights, what: str, **sampling
) -> list[dict]:
    """The records of `examples` with n predictions, in order. Samples what the file at `path` lacks and appends it.

    Records of another model, other settings, or another question or answer move aside (evaluation/provenance.py). A
    question is written when its last completion is graded; with several hosts, when its group is graded.
    what: the name of the completions in the audit log. sampling: replaces settings of config.sample.
    """
    made = made_by(run, weights, examples, n, **sampling)
    found = reusable(path, made, examples)
    records = found.records
    hosts.agree(str(path), questions=len(records))
    there = {example.item_id: records.get(example.item_id, {"predictions": []})["predictions"] for example in examples}
    left = [example for example in examples if len(there[example.item_id]) < n]
    if not left:
        print(f"{what}: done already, {path}", flush=True)
    else:
        if more := sum(bool(there[example.item_id]) for example in left):
            told = f"{more} of {len(examples)} questions have fewer than {n} samples"
            print(f"{path}: {told}; more are drawn", flush=True)
        headers = found.headers if made.header() in found.headers[-1:] else [*found.headers, made.header()]
        lm, whole = weights.load(), [one["is_correct"] for one in records.values() if len(one["predictions"]) >= n]
        right, ended, done = sum(whole), len(whole), sum(min(n, len(one)) for one in there.values())
        progress = Progress(what, len(examples) * n, "completion", done0=done, first="compiling")
        with appended(path) as file:
            for header in headers[len(found.headers) :]:
                file.write(json.dumps(header) + "\n")
            group = max(1, 16 * run.config.engine.slots // n)  # questions; the last rows of a group leave slots empty
            sampling = {key: made.identity[key] for key in ("max_len", "temperature", "top_k")}
            for start in range(0, len(left), group):
                wanted = [(example, there[example.item_id]) for example in left[start : start + group]]
                for record in sample_questions(run, lm, wanted, n, what, sampling):
                    file.write(json.dumps(record) + "\n")
                    item = record["item_id"]
                    records[item], right, ended = record, right + record["is_correct"], ended + 1
                    done += n - len(there[item])
                    progress.update(done, correct=right / ended)
        progress.close()
        if more and hosts.is_first():
            provenance.rewrite(path, headers, [*records.values(), *found.others])  # one line per question again
        hosts.gather(f"{path} is written", None)
    return [first_samples(records[example.item_id], n) for example in examples]


def appended(path: Path) -> AbstractContextManager[TextIO]:
    """The file, open for appending, on the first host; other hosts write nothing."""
    return provenance.appending(path) if hosts.is_first() else open(os.devnull, "a", encoding="utf-8")


def sample_questions(
    run: Run, lm, left: list[tuple[Example, list[dict]]], n: int, purpose: str, sampling: dict
) -> Iterator[dict]:
    """Yields the record of each question when its last completion is graded. `left`: the questions and the predictions
    that exist already."""
    prompts: list[Prompt] = []
    owners: list[int] = []  # of each prompt, in `left`
    for q, (example, there) in enumerate(left):
        more = run.inputs.prompts([example], n)[len(there) :]
        prompts += more
        owners += [q] * len(more)
    found: list[dict[int, Graded]] = [{} for _ in left]  # by sample
    for i, graded in roll_out(run, lm, prompts, [left[q][0] for q in owners], purpose, **sampling):
        q = owners[i]
        example, there = left[q]
        found[q][prompts[i].sample] = graded
        if len(found[q]) == n - len(there):
            new = [prediction(one.text, one.verdict) for _, one in sorted(found[q].items())]
            yield answered(example, [*there, *new])
