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
from reft_jax.train.packing import Packing, pack_targets
from reft_jax.train.state import linear_schedule, make_optimizer
from reft_jax.train.steps import make_sft_step


def run_sft(run: Run) -> dict:
    """Trains, evaluates on dev, saves models/warmup and models/sft. Returns {'best': epoch, 'best_dev_top1', …}."""
    sft = run.config.sft
    return train_supervised(run, "sft", run.sft, sft.epochs, sft.stop_epoch or sft.epochs, sft.warmup_epoch)


def train_supervised(
    run: Run, stage: str, rows: list[tuple[list[int], int]], epochs: int, last_epoch: int, warmup_epoch: int = 0
) -> dict:
    """Trains the base model on rows of `supervised_row`, saves models/STAGE (best on dev); as `run_sft` returns.

    The schedule is that of `epochs`, the run ends after `last_epoch`; models/warmup is what `warmup_epoch` leaves.
    """
    if result := finished(run, stage):
        return result
    settings = run.config.sft
    steps_per_epoch = -(-len(rows) // settings.batch_size)
    schedule = linear_schedule(settings.learning_rate, settings.lr_warmup, epochs * steps_per_epoch)
    optimizer = make_optimizer(schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)
    begin = {"best": 0, "best_dev_top1": -1.0}
    training = Training(run, stage, abstract_policy(run), optimizer, lambda: base_policy(run), begin)
    step_fn, info = make_sft_step(run.model, optimizer, training.shardings), training.info
    progress = Progress(stage, last_epoch * steps_per_epoch, done0=training.done * steps_per_epoch)
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
        if epoch % settings.eval_every == 0 or epoch in (warmup_epoch, last_epoch):
            line["dev_top1"] = top1(greedy(run, params["lm"], run.data.dev, f"{stage} dev"))
            training.keep_if_best(epoch, line["dev_top1"])
        if epoch == warmup_epoch:
            info["warmup_dev_top1"] = line["dev_top1"]
            save_params(model_folder(run, "warmup"), params)
        training.metrics.write(step, line)
        training.save(epoch, step)
    progress.close()
    return training.finish(model_folder(run, stage), {"epochs": last_epoch, "rows": len(rows)})


def pack(run: Run, rows: list[tuple[list[int], int]]) -> Packing:
    """Rows of `supervised_row` in lines."""
    settings = run.config.sft
    return pack_targets(
        rows,
        max_len=settings.max_len,
        micro_batch=settings.micro_batch,
        micro_batches=settings.batch_size // settings.micro_batch,
        multiple=run.config.data.pad_multiple,
    )
