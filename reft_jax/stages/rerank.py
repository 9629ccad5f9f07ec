"""The reranker: a model's trunk and two classes, trained on the warm-up model's samples of the training questions."""

import json
from pathlib import Path

import numpy as np

from reft_jax.evaluation.provenance import MadeBy
from reft_jax.evaluation.records import RERANK, RERANK_KIND, scored
from reft_jax.evaluation.voting import deduplicate
from reft_jax.model.heads import RerankHead
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import put_rows
from reft_jax.run.open import Run
from reft_jax.stages.loop import Training
from reft_jax.stages.models import Weights, abstract_reranker, finished, load_model, sources
from reft_jax.stages.sample import appended, recorded, reusable, run_sample
from reft_jax.store import short_hash
from reft_jax.tasks.datasets import fit
from reft_jax.train.packing import Packing, packing_size
from reft_jax.train.progress import Progress
from reft_jax.train.state import init_head, linear_schedule, make_optimizer
from reft_jax.train.steps import RerankBatch, make_rerank_scorer, make_step, rerank_loss
from reft_jax.types import Example

SCORED_AT_ONCE = 64  # questions between two writes


def rerank_rows(run: Run, records: list[dict]) -> list[tuple[list[int], int, str]]:
    """(ids of prompt + completion, label: 1 = correct, item) of the distinct completions that fit."""
    rows, inputs = [], run.inputs
    for record in records:
        for prediction in deduplicate(record["predictions"]):
            ids = inputs.prompter.ids(record["question"], prediction["completion"])
            rows.append((ids, int(prediction["correctness"]), record["item_id"]))
    return fit(rows, [len(ids) for ids, _, _ in rows], run.config.rerank.max_len, 1.0, "rerank.max_len")


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

    def start():
        head = init_head(run.machine.mesh, RerankHead(), run.machine.model.config.hidden_size, run.config.seed)
        return {"lm": load_model(run, name)["lm"], "rerank_head": head}

    made_from = sources(run, name, "warmup")
    positive = float(np.mean([label for _, label, _ in rows]))
    state_parts = abstract_reranker(run), optimizer, start
    with Training(run, stage, *state_parts, {}, made_from, of=name) as training:
        update = make_step(rerank_loss, run.machine.model, optimizer, training.shardings, training.lora)
        for epoch in training.epochs(rows=len(rows), batch_size=settings.batch_size, epochs=settings.epochs):
            for chosen in epoch:
                ids, labels, item_ids = zip(*(rows[i] for i in chosen), strict=True)
                packing = pack(run, ids)
                labels = packing.spread(np.array(labels)[packing.at[0]], np.int32)
                judged = RerankBatch(labels, packing.spread(1 / len(chosen)))
                batch = put_rows(run.machine.mesh, (packing.lines, judged), axis=1)
                state, numbers = update(training.state, batch, packing.count, training.base)
                inputs = packing.lines._asdict() | judged._asdict()
                epoch.updated(state, numbers, item_ids, inputs, padding=packing.padding)
            means = epoch.means()
            training.info["train_accuracy"] = means["accuracy"]
            training.write({"epoch": epoch.number} | means)
        result = {"rows": len(rows), "positive": positive, "from": made_from}
        return training.finish(run.workdir.model(stage), result)


def pack(run: Run, rows: list[list[int]]) -> Packing:
    """At most a batch of rows in lines. A row has one decision, its last token, where it is judged."""
    limits = run.config.rerank
    size = packing_size(run.config, limits.max_len, limits.micro_batch, limits.batch_size)
    lengths = np.array([len(row) for row in rows])
    return Packing(rows, lengths - 1, np.ones_like(lengths), **size)


def scores_made_by(run: Run, weights: Weights, records: list[dict]) -> MadeBy:
    """The header of a file of scores."""
    settings = {"max_len": run.config.rerank.max_len, "dtype": run.config.model.dtype}
    settings |= {"template": run.inputs.template} if run.inputs.template else {}
    return MadeBy(RERANK_KIND, {"reranker": weights.checksum} | settings, recorded(asked_in(records)))


def asked_in(records: list[dict]) -> list[Example]:
    return [Example(record["item_id"], record["question"], record["answer_value"]) for record in records]


def rerank_scores(run: Run, path: Path, records: list[dict], weights: Weights, what: str) -> dict[str, list[float]]:
    """Probabilities of "correct" of the distinct completions of `records`, by item_id, in the order of `deduplicate`.

    They are stored next to the samples at `path`, each with the hash of its completion. Scores that are missing, or
    that belong to another reranker or to other completions, are computed now and appended.
    """
    beside, made, examples = path.with_suffix(RERANK), scores_made_by(run, weights, records), asked_in(records)
    texts = {r["item_id"]: [short_hash(p["completion"]) for p in deduplicate(r["predictions"])] for r in records}

    def fits(score: dict) -> bool:
        return set(texts[score["item_id"]]) <= set(score.get("completions", ()))

    found = reusable(beside, made, examples, fits)
    scores = found.records
    hosts.agree(str(beside), questions=len(scores))
    left = [record for record in sorted(records, key=lambda one: one["item_id"]) if record["item_id"] not in scores]
    if not left:
        print(f"{what}: done already, {beside}", flush=True)
    else:
        params, score = weights.load(), make_rerank_scorer(run.machine.model)
        progress = Progress(what, len(records), "question", done0=len(scores), first="compiling")
        with appended(beside) as file:
            if made.header() not in found.headers[-1:]:
                file.write(json.dumps(made.header()) + "\n")
            for start in range(0, len(left), SCORED_AT_ONCE):
                group = left[start : start + SCORED_AT_ONCE]
                for record, row in zip(group, score_questions(run, params, score, group), strict=True):
                    scores[record["item_id"]] = scored(record, row)
                    file.write(json.dumps(scores[record["item_id"]]) + "\n")
                progress.update(len(scores))
        progress.close()
        hosts.gather(f"{beside} is written", None)
    by_text = {item: dict(zip(one["completions"], one["probabilities"], strict=True)) for item, one in scores.items()}
    return {item: [by_text[item][text] for text in asked] for item, asked in texts.items()}


def score_questions(run: Run, params, score, records: list[dict]) -> list[list[float]]:
    """Probability of "correct" for each distinct completion of each record (in `deduplicate`'s order).

    A completion too long to score gets 0, so that it is chosen only if there is no other.
    """
    ids = [
        [run.inputs.prompter.ids(record["question"], p["completion"]) for p in deduplicate(record["predictions"])]
        for record in records
    ]
    flat = [(q, i) for q, rows in enumerate(ids) for i, row in enumerate(rows) if len(row) <= run.config.rerank.max_len]
    flat.sort(key=lambda at: len(ids[at[0]][at[1]]))
    scores = [[0.0] * len(rows) for rows in ids]
    batch = run.config.rerank.batch_size
    for start in range(0, len(flat), batch):
        chosen = flat[start : start + batch]
        packing = pack(run, [ids[q][i] for q, i in chosen])
        probabilities = score(params, put_rows(run.machine.mesh, packing.lines, axis=1), packing.count)
        probabilities = packing.collect(probabilities, run.config.rerank.max_len)[packing.at]
        for (q, i), probability in zip(chosen, probabilities, strict=True):
            scores[q][i] = float(probability)
        run.guards.step()
    return scores
