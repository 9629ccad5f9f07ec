"""The paper's baselines: a model trained on its own correct samples, drawn once (offline) or as it learns (online)."""

import time
from functools import partial

import jax

from reft_jax.parallel.mesh import put_rows
from reft_jax.run.inputs import Row
from reft_jax.run.open import Run
from reft_jax.stages.loop import START, Training
from reft_jax.stages.models import abstract_policy, finished, sources, start_policy
from reft_jax.stages.rollout import Graded, roll_out_once
from reft_jax.stages.sample import run_sample
from reft_jax.stages.sft import train_supervised
from reft_jax.tasks.datasets import fit
from reft_jax.tasks.prompts import sft_target
from reft_jax.train.packing import Packing, pack_targets, packing_size
from reft_jax.train.state import constant_schedule, make_optimizer
from reft_jax.train.steps import SelfTrainBatch, make_step, self_train_loss
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

    records: what `run_sample` returns. Two samples are equal if their stripped texts are; a sample equal to the worked
    solution is left out. Rows over sft.max_len are left out too.
    """
    config, sampled = run.config, {record["item_id"]: record["predictions"] for record in records}
    rows = []
    for example in run.inputs.data.train:
        gold = sft_target(example, config.data.format, run.inputs.task)
        right = [p["completion"].strip() for p in sampled.get(example.item_id, []) if p["correctness"]]
        chosen = list(dict.fromkeys(right))[: config.self_train.samples]
        rows += [run.inputs.row(example, text) for text in dict.fromkeys([gold, *chosen])]
    return fit(rows, [len(ids) for ids, _, _ in rows], config.sft.max_len, config.data.max_dropped, "sft.max_len")


def online_rows(run: Run) -> list[tuple[Example, Row]]:
    """The questions of PPO, each with the row of its worked solution, as far as that fits in rl.max_len too."""
    config, questions = run.config, run.inputs.questions
    gold = [run.inputs.row(e, sft_target(e, config.data.format, run.inputs.task)) for e in questions]
    lengths = [len(ids) for ids, _, _ in gold]
    rows = list(zip(questions, gold, strict=True))
    return fit(rows, lengths, config.rl.max_len, config.data.max_dropped, "rl.max_len")


def run_online(run: Run) -> dict:
    """From models/warmup: rolls out as PPO does and trains on the correct samples and the worked solutions.

    Saves models/ONLINE (best on dev). Returns {'best': iteration, 'best_dev_top1', …}.
    """
    if result := finished(run, ONLINE):
        return result
    rl, settings, rows = run.config.rl, run.config.self_train, online_rows(run)
    schedule = constant_schedule(settings.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    made_from = sources(run, "warmup")
    state_parts = abstract_policy(run), optimizer, partial(start_policy, run)
    with Training(run, ONLINE, *state_parts, START, made_from, of="warmup") as training:
        update = make_step(self_train_loss, run.machine.model, optimizer, training.shardings, training.lora)
        for number, drawn in training.iterations(len(rows), shown=("loss", "train_correct")):
            started, state = time.monotonic(), training.state
            examples, gold = zip(*(rows[i] for i in drawn), strict=True)
            prompts, graded, line = roll_out_once(
                run, training.params["lm"], list(examples), f"{ONLINE} rollout", number
            )
            packing, weights = online_batch(run, prompts, graded, gold)
            batch = put_rows(run.machine.mesh, (packing.lines, weights), axis=1)
            for _ in range(settings.updates):
                state, numbers = update(state, batch, packing.count, training.base)
            line |= jax.device_get(numbers) | {"padding": packing.padding, "seconds": time.monotonic() - started}
            item_ids, inputs = [e.item_id for e in examples], packing.lines._asdict() | weights._asdict()
            training.updated(state, numbers=line, pending=line, item_ids=item_ids, inputs=inputs)
        result = {"iterations": training.done, "questions": len(rows), "from": made_from}
        return training.finish(run.workdir.model(ONLINE), result)


def online_batch(
    run: Run, prompts: list[Prompt], graded: list[Graded], gold: list[Row]
) -> tuple[Packing, SelfTrainBatch]:
    """The rows of one batch in lines, and the weights of their decisions.

    The decisions of a correct sample are its response (with EOS, without the forced prefix); those of a worked solution
    are its target. Without a correct sample the gold half is alone and still weighs one half.
    """
    rl = run.config.rl
    sampled = [
        ([*prompt.tokens, *one.completion.tokens], len(prompt.tokens), prompt.item_id)
        for prompt, one in zip(prompts, graded, strict=True)
        if one.verdict.correct
    ]
    packing = pack_targets([*sampled, *gold], **packing_size(run.config, rl.max_len, rl.micro_batch, 2 * rl.questions))
    is_gold = packing.at[0] >= len(sampled)
    halves = (0.5 * half / max(1, half.sum()) for half in (~is_gold, is_gold))
    return packing, SelfTrainBatch(*map(packing.spread, halves))
