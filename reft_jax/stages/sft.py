"""Supervised fine-tuning: one run makes the warm-up model (an early epoch) and the best checkpoint."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from reft_jax.parallel.mesh import put_rows
from reft_jax.run.inputs import Row
from reft_jax.run.open import Run
from reft_jax.stages.loop import START, Training
from reft_jax.stages.models import abstract_policy, base_policy, finished
from reft_jax.train.packing import Packing, pack_targets, packing_size
from reft_jax.train.state import linear_schedule, make_optimizer
from reft_jax.train.steps import make_step, sft_loss


def run_sft(run: Run) -> dict:
    """Trains, evaluates on dev, saves models/warmup and models/sft. Returns {'best': epoch, 'best_dev_top1', …}."""
    sft = run.config.sft
    last_epoch = sft.stop_epoch or sft.epochs
    return train_supervised(run, "sft", run.inputs.sft_rows, sft.epochs, last_epoch, warmup_epoch=sft.warmup_epoch)


def train_supervised(
    run: Run,
    stage: str,
    rows: list[Row],
    epochs: int,
    last_epoch: int,
    *,
    warmup_epoch: int = 0,
    sources: dict[str, str] | None = None,
) -> dict:
    """Trains the base model on supervised rows and saves models/STAGE (best on dev). Returns what `run_sft` does.

    epochs: length of the schedule; the run ends after `last_epoch`. warmup_epoch: after it the model is saved as
    models/warmup (0: never). sources: checksums of the models that the rows come from.
    """
    if result := finished(run, stage):
        return result
    settings = run.config.sft
    steps_per_epoch = -(-len(rows) // settings.batch_size)
    schedule = linear_schedule(settings.learning_rate, settings.lr_warmup, epochs * steps_per_epoch)
    optimizer = make_optimizer(schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)
    machine = run.machine
    dtype = machine.model.dtype if run.config.lora.rank else jnp.float32  # of a base that is frozen, or trained
    make_params = partial(base_policy, run.inputs, machine.mesh, machine.model, dtype)
    state_parts = abstract_policy(run), optimizer, make_params
    with Training(run, stage, *state_parts, START, sources) as training:
        update = make_step(sft_loss, machine.model, optimizer, training.shardings, training.lora)
        for epoch in training.epochs(rows=len(rows), batch_size=settings.batch_size, epochs=last_epoch):
            for chosen in epoch:
                packing, weight, batch = make_batch(run, [rows[i] for i in chosen])
                state, numbers = update(training.state, batch, packing.count, training.base)
                item_ids, inputs = [rows[i][2] for i in chosen], packing.lines._asdict() | {"weight": weight}
                epoch.updated(state, numbers, item_ids, inputs, padding=packing.padding)
            at, line = epoch.number, {"epoch": epoch.number, "lr": float(schedule(training.done - 1))} | epoch.means()
            if at % settings.eval_every == 0 or at in (warmup_epoch, last_epoch):
                line["dev_top1"] = training.dev_top1(at)
            if at == warmup_epoch:
                training.info["warmup_dev_top1"] = line["dev_top1"]
                training.save_params(run.workdir.model("warmup"))
            training.write(line)
        result = {"epochs": last_epoch, "rows": len(rows), "from": sources or {}}
        return training.finish(run.workdir.model(stage), result)


def make_batch(run: Run, rows: list[Row]) -> tuple[Packing, np.ndarray, tuple]:
    """Supervised rows in lines, the weights of their decisions [M,b,W], and the batch of both on the mesh."""
    packing = pack(run, rows)
    weight = packing.spread(1 / len(packing.at[0]))
    return packing, weight, put_rows(run.machine.mesh, (packing.lines, weight), axis=1)


def pack(run: Run, rows: list[Row]) -> Packing:
    """Supervised rows in lines."""
    sft = run.config.sft
    return pack_targets(rows, **packing_size(run.config, sft.max_len, sft.micro_batch, sft.batch_size))
