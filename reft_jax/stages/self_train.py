"""The paper's baselines: a model trained on its own correct samples, drawn once (offline) or as it learns (online)."""

import time

import jax
import numpy as np

from reft_jax.parallel.mesh import put_rows
from reft_jax.run.open import Row, Run, supervised_row
from reft_jax.stages.loop import Training, train_iterations
from reft_jax.stages.models import abstract_policy, finished, load_model, model_folder, sources
from reft_jax.stages.rollout import Clock, Graded, one_each, roll_out, top1
from reft_jax.stages.sample import run_sample
from reft_jax.stages.sft import train_supervised
from reft_jax.tasks.datasets import fit
from reft_jax.tasks.prompts import sft_target
from reft_jax.tasks.registry import load_task
from reft_jax.train.batches import rows_at
from reft_jax.train.packing import Packing, pack_targets
from reft_jax.train.state import constant_schedule, make_optimizer
from reft_jax.train.steps import SelfTrainBatch, make_self_train_step
from reft_jax.types import Example, Prompt

OFFLINE, ONLINE = "self_train_offline", "self_train_online"


def run_offline(run: Run) -> dict:
    """SFT of the base model on the worked solutions and correct samples of the warm-up model; makes models/OFFLINE."""
    if result := finished(run, OFFLINE):
        return result
    rows = offline_rows(run, run_sample(run, "warmup", "train"))
    epochs = run.config.self_train.epochs
    return train_supervised(run, OFFLINE, rows, epochs, epochs, sources=sources(run, "warmup"))


def offline_rows(run: Run, records: list[dict]) -> list[Row]:
    """Rows of each training question: its own solution and the first `self_train.samples` distinct correct samples.

    records: what `run_sample` gives. Samples are told apart by their stripped text; one that is the worked solution
    stands once. Rows over sft.max_len are left out.
    """
    config, sampled = run.config, {record["item_id"]: record["predictions"] for record in records}
    rows = []
    for example in run.data.train:
        gold = sft_target(example, config.data.format, load_task(config.task))
        right = [p["completion"].strip() for p in sampled.get(example.item_id, []) if p["correctness"]]
        chosen = list(dict.fromkeys(right))[: config.self_train.samples]
        rows += [supervised_row(run, example, text) for text in dict.fromkeys([gold, *chosen])]
    return fit(rows, [len(ids) for ids, _, _ in rows], config.sft.max_len, config.data.max_dropped, "sft.max_len")


def online_rows(run: Run) -> list[tuple[Example, Row]]:
    """The questions of PPO with the row of their worked solution, where that is within rl.max_len too."""
    config = run.config
    gold = [supervised_row(run, e, sft_target(e, config.data.format, load_task(config.task))) for e in run.questions]
    lengths = [len(ids) for ids, _, _ in gold]
    rows = list(zip(run.questions, gold, strict=True))
    return fit(rows, lengths, config.rl.max_len, config.data.max_dropped, "rl.max_len")


def run_online(run: Run) -> dict:
    """From models/warmup: rolls out as PPO does and trains on what is correct, beside the worked solutions.

    Saves models/ONLINE (best on dev). Returns {'best': iteration, 'best_dev_top1', …}.
    """
    if result := finished(run, ONLINE):
        return result
    rl, settings, rows = run.config.rl, run.config.self_train, online_rows(run)
    schedule = constant_schedule(settings.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    begin = {"best": 0, "best_dev_top1": -1.0}
    made_from = sources(run, "warmup")
    where = run, ONLINE, abstract_policy(run), optimizer
    with Training(*where, lambda: load_model(run, "warmup"), begin, made_from) as training:
        step_fn = make_self_train_step(run.model, optimizer, training.shardings)

        def iterate(state, iteration):
            begun = time.monotonic()
            chosen = rows_at(run.config.seed, (iteration - 1) * rl.questions, rl.questions, len(rows))
            examples, gold = zip(*(rows[i] for i in chosen), strict=True)
            prompts, graded, line = roll_out_once(run, state.params["lm"], list(examples), iteration)
            packing, weights = online_batch(run, prompts, graded, gold)
            batch = put_rows(run.mesh, (packing.lines, weights), axis=1)
            for _ in range(settings.updates):
                state, numbers = step_fn(state, batch, packing.count)
            line |= jax.device_get(numbers) | {"padding": packing.padding, "seconds": time.monotonic() - begun}
            return state, line, [e.item_id for e in examples], packing.lines._asdict() | weights._asdict()

        iterations = train_iterations(training, iterate, questions=len(rows), shown=("loss", "train_correct"))
        result = {"iterations": iterations, "questions": len(rows), "from": made_from}
        return training.finish(model_folder(run, ONLINE), result)


def roll_out_once(
    run: Run, lm, examples: list[Example], iteration: int
) -> tuple[list[Prompt], list[Graded], dict[str, float]]:
    """One graded response a question, and metrics."""
    rl, clock, prompts = run.config.rl, Clock(), one_each(run, examples)
    sampling = {"max_len": rl.max_len, "temperature": rl.temperature, "iteration": iteration}
    found = dict(roll_out(run, lm, prompts, examples, f"{ONLINE} rollout", clock, **sampling))
    graded = [found[i] for i in range(len(examples))]
    metrics = {
        "train_correct": top1(graded),
        "no_answer": np.mean([one.verdict.value is None for one in graded]),
        "finished": np.mean([one.completion.finished for one in graded]),
        "seconds_rollout": clock.decoding,
        "seconds_reward": clock.waiting,
    }
    return prompts, graded, metrics


def online_batch(
    run: Run, prompts: list[Prompt], graded: list[Graded], gold: list[Row]
) -> tuple[Packing, SelfTrainBatch]:
    """The rows of one batch in lines, and what their decisions weigh.

    A correct sample decides at its response (EOS included, the forced prefix not), a worked solution at its target.
    Without a correct sample the gold half stands alone, still one half.
    """
    rl = run.config.rl
    sampled = [
        ([*prompt.tokens, *one.completion.tokens], len(prompt.tokens), prompt.item_id)
        for prompt, one in zip(prompts, graded, strict=True)
        if one.verdict.correct
    ]
    packing = pack_targets(
        [*sampled, *gold],
        max_len=rl.max_len,
        micro_batch=rl.micro_batch,
        micro_batches=2 * rl.questions // rl.micro_batch,
        multiple=run.config.data.pad_multiple,
    )
    is_gold = packing.at[0] >= len(sampled)
    halves = (0.5 * half / max(1, half.sum()) for half in (~is_gold, is_gold))
    return packing, SelfTrainBatch(*map(packing.spread, halves))
