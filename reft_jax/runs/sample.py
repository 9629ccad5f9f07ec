"""n completions a question from one model, executed and graded, one question a line in samples/NAME_SPLIT.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from reft_jax.parallel import hosts
from reft_jax.runs.rollout import roll_out
from reft_jax.runs.setup import Run, shorten
from reft_jax.runs.stages import load_model
from reft_jax.task.voting import vote, voted_correct
from reft_jax.train.metrics import Progress
from reft_jax.types import Example, InputError


def samples_path(run: Run, name: str, split: str) -> Path:
    return run.workdir / "samples" / f"{name}_{split}.jsonl"


def read_samples(path: Path) -> list[dict]:
    """The questions already sampled, in the order they were finished; a last line torn by a crash is left out.

    InputError if any other line is not the JSON of a question.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error}); remove it, and it is made again") from error
    return records


def run_sample(run: Run, name: str, split: str) -> list[dict]:
    """Question records (see task.voting) of model `name` on "test", or on "train" for the reranker, in file order.

    A question is on the disk once its last completion is graded; those that are there already are not asked again.
    """
    settings = run.config.sample
    if split == "test":
        examples, n = run.data.test, settings.n
    else:
        examples, n = shorten(run.data.train, settings.train_limit, run.config.seed), settings.train_n
    path = samples_path(run, name, split)
    records = {record["item_id"]: record for record in read_samples(path)}
    hosts.agree(str(path), questions=len(records))
    left = [example for example in examples if example.item_id not in records]
    if left:
        path.parent.mkdir(exist_ok=True)
        if hosts.is_first() and path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        lm, voted = load_model(run, name)["lm"], sum(record["is_correct"] for record in records.values())
        progress = Progress(f"sample {name} on {split}", len(examples) * n, "completion", done0=len(records) * n)
        written = path if hosts.is_first() else Path(os.devnull)
        with written.open("a", encoding="utf-8", buffering=1) as file:  # by the line: a crash loses none written
            group = max(1, 16 * run.config.engine.slots // n)  # questions; in between the last rows leave slots empty
            for start in range(0, len(left), group):
                for record in sample_questions(run, lm, left[start : start + group], n, f"{name} samples on {split}"):
                    file.write(json.dumps(record) + "\n")
                    records[record["item_id"]], voted = record, voted + record["is_correct"]
                    progress.update(len(records) * n, voted_correct=voted / len(records))
        progress.close()
        hosts.gather(f"{path} is written", None)
    return [records[example.item_id] for example in examples]


def sample_questions(run: Run, lm, examples: list[Example], n: int, purpose: str) -> Iterator[dict]:
    """The record of each question, as its last completion is graded."""
    settings = run.config.sample
    sampling = {"max_len": settings.max_len, "temperature": settings.temperature, "top_k": settings.top_k}
    asked = [example for example in examples for _ in range(n)]
    found: list[dict[int, dict]] = [{} for _ in examples]  # by sample
    for i, (_, text, verdict) in roll_out(run, lm, run.prompts(examples, n), asked, purpose, **sampling):
        q, sample = divmod(i, n)
        found[q][sample] = {"completion": text, "solving_res": verdict.value, "correctness": verdict.correct}
        if len(found[q]) == n:
            predictions = [found[q][sample] for sample in range(n)]
            yield {
                "item_id": examples[q].item_id,
                "question": examples[q].question,
                "answer_value": examples[q].answer_value,
                "predictions": predictions,
                "most_voted_answer": vote([p["solving_res"] for p in predictions]),
                "is_correct": voted_correct(predictions),
            }
