"""Supervised fine-tuning: one run makes the warm-up model (an early epoch) and the best checkpoint."""

import jax
import numpy as np

from reft_jax.parallel.mesh import put_rows
from reft_jax.runs.rollout import greedy, top1
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import Training, abstract_policy, base_policy, best_so_far, finished, model_folder
from reft_jax.train.batches import epoch_order
from reft_jax.train.checkpoints import save_params
from reft_jax.train.metrics import Progress
from reft_jax.train.packing import Packing
from reft_jax.train.state import linear_schedule, make_optimizer
from reft_jax.train.steps import make_sft_step


def run_sft(run: Run) -> dict:
    """Trains, evaluates on dev, saves models/warmup and models/sft. Returns {'best': epoch, 'best_dev_top1', …}."""
    if result := finished(run, "sft"):
        return result
    settings, rows = run.config.sft, run.sft
    steps_per_epoch = -(-len(rows) // settings.batch_size)
    last_epoch = settings.stop_epoch or settings.epochs
    schedule = linear_schedule(settings.learning_rate, settings.lr_warmup, settings.epochs * steps_per_epoch)
    optimizer = make_optimizer(schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)
    begin = {"best": 0, "best_dev_top1": -1.0}
    training = Training(run, "sft", abstract_policy(run), optimizer, lambda: base_policy(run), begin)
    step_fn, info = make_sft_step(run.model, optimizer, training.shardings), training.info
    progress = Progress("sft", last_epoch * steps_per_epoch, done0=training.done * steps_per_epoch)
    for epoch in range(training.done + 1, last_epoch + 1):
        order, losses, padding = epoch_order(run.config.seed, epoch, len(rows)), [], []
        for i in range(steps_per_epoch):
            chosen = order[i * settings.batch_size : (i + 1) * settings.batch_size]
            packing = pack(run, [rows[j] for j in chosen])
            batch = put_rows(run.mesh, (packing.lines, packing.spread(1 / len(packing.at[0]))), axis=1)
            training.state, numbers = step_fn(training.state, batch, packing.count)
            losses.append(numbers["loss"])
            padding.append(packing.padding)
            step = (epoch - 1) * steps_per_epoch + i + 1
            if i % 10 == 9 or i + 1 == steps_per_epoch:
                progress.update(step, loss=float(losses[-1]), **best_so_far(info))
        line = {"epoch": epoch, "loss": float(np.mean(jax.device_get(losses))), "lr": float(schedule(step - 1))}
        line["padding"] = float(np.mean(padding))
        training.check_finite(epoch, line)
        params = training.state.params
        if epoch % settings.eval_every == 0 or epoch in (settings.warmup_epoch, last_epoch):
            line["dev_top1"] = top1(greedy(run, params["lm"], run.data.dev, "sft dev"))
            training.keep_if_best(epoch, line["dev_top1"])
        if epoch == settings.warmup_epoch:
            info["warmup_dev_top1"] = line["dev_top1"]
            save_params(model_folder(run, "warmup"), params)
        training.metrics.write(step, line)
        training.save(epoch, step)
    progress.close()
    return training.finish(model_folder(run, "sft"), {"epochs": last_epoch, "rows": len(rows)})


def pack(run: Run, rows: list[tuple[list[int], int]]) -> Packing:
    """Rows (ids, prompt length) in lines; their decisions are those that chose a target token."""
    settings, (ids, prompt_lens) = run.config.sft, zip(*rows, strict=True)
    return Packing(
        ids,
        [prompt - 1 for prompt in prompt_lens],
        [len(row) - prompt for row, prompt in rows],
        max_len=settings.max_len,
        micro_batch=settings.micro_batch,
        micro_batches=settings.batch_size // settings.micro_batch,
        multiple=run.config.data.pad_multiple,
    )
