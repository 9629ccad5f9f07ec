"""n completions a question from one model, executed and graded, one question a line in samples/NAME_SPLIT.jsonl."""

import json
import os
from pathlib import Path

from reft_jax.parallel import hosts
from reft_jax.runs.rollout import roll_out
from reft_jax.runs.setup import Run, shorten
from reft_jax.runs.stages import load_model
from reft_jax.task.voting import vote, voted_correct
from reft_jax.train.metrics import Progress
from reft_jax.types import Example


def samples_path(run: Run, name: str, split: str) -> Path:
    return run.workdir / "samples" / f"{name}_{split}.jsonl"


def read_samples(path: Path) -> list[dict]:
    """The questions already sampled; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def run_sample(run: Run, name: str, split: str) -> list[dict]:
    """Question records (see task.voting) of model `name` on "test", or on "train" for the reranker; resumes."""
    settings = run.config.sample
    if split == "test":
        examples, n = run.data.test, settings.n
    else:
        examples, n = shorten(run.data.train, settings.train_limit, run.config.seed), settings.train_n
    path = samples_path(run, name, split)
    records = read_samples(path)
    hosts.agree(str(path), questions=len(records))
    done = {record["item_id"] for record in records}
    left = [example for example in examples if example.item_id not in done]
    if not left:
        return records
    path.parent.mkdir(exist_ok=True)
    if hosts.is_first() and path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lm = load_model(run, name)["lm"]
    progress = Progress(f"sample {name} on {split}", len(examples) * n, "completion", done0=len(records) * n)
    with (path if hosts.is_first() else Path(os.devnull)).open("a", encoding="utf-8") as file:
        group = max(1, 16 * run.config.engine.slots // n)  # questions; in between the last rows leave slots empty
        for start in range(0, len(left), group):
            for record in sample_questions(run, lm, left[start : start + group], n, f"{name} samples on {split}"):
                records.append(record)
                file.write(json.dumps(record) + "\n")
            file.flush()
            voted = sum(record["is_correct"] for record in records) / len(records)
            progress.update(len(records) * n, voted_correct=voted)
    progress.close()
    hosts.gather(f"{path} is written", None)
    return records


def sample_questions(run: Run, lm, examples: list[Example], n: int, purpose: str) -> list[dict]:
    settings = run.config.sample
    sampling = {"max_len": settings.max_len, "temperature": settings.temperature, "top_k": settings.top_k}
    asked = [example for example in examples for _ in range(n)]
    found = dict(roll_out(run, lm, run.prompts(examples, n), asked, purpose, **sampling))
    records = []
    for q, example in enumerate(examples):
        predictions = [
            {"completion": text, "solving_res": verdict.value, "correctness": verdict.correct}
            for _, text, verdict in (found[i] for i in range(q * n, q * n + n))
        ]
        records.append(
            {
                "item_id": example.item_id,
                "question": example.question,
                "answer_value": example.answer_value,
                "predictions": predictions,
                "most_voted_answer": vote([p["solving_res"] for p in predictions]),
                "is_correct": voted_correct(predictions),
            }
        )
    return records
