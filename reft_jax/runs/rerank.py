"""The reranker: a model's trunk and two classes, trained on the warm-up model's samples of the training questions."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from reft_jax.model.heads import RerankHead
from reft_jax.parallel.mesh import put_rows
from reft_jax.runs.sample import run_sample
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import Training, abstract_reranker, finished, load_model, model_folder
from reft_jax.task.datasets import fit
from reft_jax.task.prompts import rerank_text
from reft_jax.task.records import RERANK, appending, read_lines
from reft_jax.task.tokenizer import encode
from reft_jax.task.voting import deduplicate
from reft_jax.train.batches import epoch_order
from reft_jax.train.metrics import Progress
from reft_jax.train.packing import Packing
from reft_jax.train.state import init_head, linear_schedule, make_optimizer
from reft_jax.train.steps import RerankBatch, make_rerank_scorer, make_rerank_step

SCORED_AT_ONCE = 64  # questions between two writes


def rerank_rows(run: Run, records: list[dict]) -> list[tuple[list[int], int]]:
    """(ids of prompt + completion, label: 1 = correct) of the distinct completions that fit."""
    rows = []
    for record in records:
        for prediction in deduplicate(record["predictions"]):
            ids = encode(run.tokenizer, rerank_text(record["question"], prediction["completion"]))
            rows.append((ids, int(prediction["correctness"])))
    return fit(rows, [len(ids) for ids, _ in rows], run.config.rerank.max_len, 1.0, "rerank.max_len")


def run_rerank(run: Run, name: str) -> dict:
    """Trains models/rerank_NAME from models/NAME. Returns {'rows', 'train_accuracy', 'positive'}."""
    stage = f"rerank_{name}"
    if result := finished(run, stage):
        return result
    settings = run.config.rerank
    rows = rerank_rows(run, run_sample(run, "warmup", "train"))
    steps_per_epoch = -(-len(rows) // settings.batch_size)
    schedule = linear_schedule(settings.learning_rate, settings.lr_warmup, settings.epochs * steps_per_epoch)
    optimizer = make_optimizer(schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)

    def begin():
        head = init_head(run.mesh, RerankHead(), run.model.config.hidden_size, run.config.seed)
        return {"lm": load_model(run, name)["lm"], "rerank_head": head}

    training = Training(run, stage, abstract_reranker(run), optimizer, begin, {})
    step_fn = make_rerank_step(run.model, optimizer, training.shardings)
    progress = Progress(stage, settings.epochs * steps_per_epoch, done0=training.done * steps_per_epoch)
    for epoch in range(training.done + 1, settings.epochs + 1):
        order, lines = epoch_order(run.config.seed, epoch, len(rows)), []
        for i in range(steps_per_epoch):
            chosen = order[i * settings.batch_size : (i + 1) * settings.batch_size]
            ids, labels = zip(*(rows[j] for j in chosen), strict=True)
            packing = pack(run, ids)
            judged = RerankBatch(
                packing.spread(np.array(labels)[packing.at[0]], np.int32), packing.spread(1 / len(labels))
            )
            batch = put_rows(run.mesh, (packing.lines, judged), axis=1)
            training.state, numbers = step_fn(training.state, batch, packing.count)
            lines.append(numbers | {"padding": packing.padding})
            step = (epoch - 1) * steps_per_epoch + i + 1
            if i % 10 == 9 or i + 1 == steps_per_epoch:
                progress.update(step, loss=float(numbers["loss"]), accuracy=float(numbers["accuracy"]))
        lines = jax.device_get(lines)
        line = {key: float(np.mean([numbers[key] for numbers in lines])) for key in ("loss", "accuracy", "padding")}
        training.check_finite(epoch, line)
        training.metrics.write(step, {"epoch": epoch} | line)
        training.info["train_accuracy"] = line["accuracy"]
        training.save(epoch, step)
    progress.close()
    positive = float(np.mean([label for _, label in rows]))
    return training.finish(model_folder(run, stage), {"rows": len(rows), "positive": positive})


def pack(run: Run, rows: list[list[int]]) -> Packing:
    """At most a batch of rows in lines; the one decision of a row is its last token, where it is judged."""
    settings, lengths = run.config.rerank, np.array([len(row) for row in rows])
    return Packing(
        rows,
        lengths - 1,
        np.ones_like(lengths),
        max_len=settings.max_len,
        micro_batch=settings.micro_batch,
        micro_batches=settings.batch_size // settings.micro_batch,
        multiple=run.config.data.pad_multiple,
    )


def rerank_scores(run: Run, path: Path, records: list[dict], load: Callable[[], dict], what: str) -> None:
    """Probabilities of "correct" of the samples at `path`, into the file beside it (see task/records.py); resumes.

    records: those of `path`. `load()` gives the reranker's parameters, if they are needed.
    """
    beside = path.with_suffix(RERANK)
    done = {line["item_id"] for line in read_lines(beside)}
    left = [record for record in sorted(records, key=lambda record: record["item_id"]) if record["item_id"] not in done]
    if not left:
        return
    params, score = load(), make_rerank_scorer(run.model)
    progress = Progress(what, len(records), "question", done0=len(done))
    with appending(beside) as file:
        for start in range(0, len(left), SCORED_AT_ONCE):
            group = left[start : start + SCORED_AT_ONCE]
            for record, row in zip(group, score_questions(run, params, score, group), strict=True):
                file.write(json.dumps({"item_id": record["item_id"], "probabilities": row}) + "\n")
            file.flush()
            progress.update(len(done) + start + len(group))
    progress.close()


def score_questions(run: Run, params, score, records: list[dict]) -> list[list[float]]:
    """Probability of "correct" for each distinct completion of each record (in `deduplicate`'s order).

    A completion too long to score gets 0, so that it is chosen only if there is no other.
    """
    ids = [
        [
            encode(run.tokenizer, rerank_text(record["question"], p["completion"]))
            for p in deduplicate(record["predictions"])
        ]
        for record in records
    ]
    flat = [(q, i) for q, rows in enumerate(ids) for i, row in enumerate(rows) if len(row) <= run.config.rerank.max_len]
    flat.sort(key=lambda at: len(ids[at[0]][at[1]]))
    scores = [[0.0] * len(rows) for rows in ids]
    batch = run.config.rerank.batch_size
    for start in range(0, len(flat), batch):
        chosen = flat[start : start + batch]
        packing = pack(run, [ids[q][i] for q, i in chosen])
        probabilities = score(params, put_rows(run.mesh, packing.lines, axis=1), packing.count)
        probabilities = packing.collect(probabilities, run.config.rerank.max_len)[packing.at]
        for (q, i), probability in zip(chosen, probabilities, strict=True):
            scores[q][i] = float(probability)
    return scores
