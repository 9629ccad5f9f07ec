"""Supervised fine-tuning: one run makes the warm-up model (an early epoch) and the best checkpoint."""

from reft_jax.parallel.mesh import put_rows
from reft_jax.run.open import Row, Run
from reft_jax.stages.loop import Training, best_so_far, train_epochs
from reft_jax.stages.models import abstract_policy, base_policy, finished, model_folder
from reft_jax.stages.rollout import greedy, top1
from reft_jax.train.checkpoints import save_params
from reft_jax.train.packing import Packing, pack_targets
from reft_jax.train.state import linear_schedule, make_optimizer
from reft_jax.train.steps import make_sft_step


def run_sft(run: Run) -> dict:
    """Trains, evaluates on dev, saves models/warmup and models/sft. Returns {'best': epoch, 'best_dev_top1', …}."""
    sft = run.config.sft
    return train_supervised(run, "sft", run.sft, sft.epochs, sft.stop_epoch or sft.epochs, sft.warmup_epoch)


def train_supervised(
    run: Run,
    stage: str,
    rows: list[Row],
    epochs: int,
    last_epoch: int,
    warmup_epoch: int = 0,
    sources: dict[str, str] | None = None,
) -> dict:
    """Trains the base model on rows of `supervised_row`, saves models/STAGE (best on dev); as `run_sft` returns.

    The schedule is that of `epochs`, the run ends after `last_epoch`; models/warmup is what `warmup_epoch` leaves.
    `sources` are checksums of the models that the rows come from.
    """
    if result := finished(run, stage):
        return result
    settings = run.config.sft
    steps_per_epoch = -(-len(rows) // settings.batch_size)
    schedule = linear_schedule(settings.learning_rate, settings.lr_warmup, epochs * steps_per_epoch)
    optimizer = make_optimizer(schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm)
    begin = {"best": 0, "best_dev_top1": -1.0}
    with Training(run, stage, abstract_policy(run), optimizer, lambda: base_policy(run), begin, sources) as training:
        step_fn = make_sft_step(run.model, optimizer, training.shardings)

        def make_batch(chosen):
            packing, item_ids = pack(run, [rows[i] for i in chosen]), [rows[i][2] for i in chosen]
            arrays = packing.lines, packing.spread(1 / len(packing.at[0]))
            inputs = packing.lines._asdict() | {"weight": arrays[1]}
            return put_rows(run.mesh, arrays, axis=1), packing.count, {"padding": packing.padding}, item_ids, inputs

        def end_epoch(epoch, step, means):
            line = {"epoch": epoch, "lr": float(schedule(step - 1))} | means
            params = training.state.params
            if epoch % settings.eval_every == 0 or epoch in (warmup_epoch, last_epoch):
                line["dev_top1"] = top1(greedy(run, params["lm"], run.data.dev, f"{stage} dev"))
                training.keep_if_best(epoch, line["dev_top1"])
            if epoch == warmup_epoch:
                training.info["warmup_dev_top1"] = line["dev_top1"]
                save_params(model_folder(run, "warmup"), params)
            training.write(step, line)

        size = {"rows": len(rows), "batch_size": settings.batch_size, "epochs": last_epoch}
        train_epochs(training, step_fn, make_batch, end_epoch, **size, shown=lambda: best_so_far(training.info))
        result = {"epochs": last_epoch, "rows": len(rows), "from": sources or {}}
        return training.finish(model_folder(run, stage), result)


def pack(run: Run, rows: list[Row]) -> Packing:
    """Rows of `supervised_row` in lines."""
    settings = run.config.sft
    return pack_targets(
        rows,
        max_len=settings.max_len,
        micro_batch=settings.micro_batch,
        micro_batches=settings.batch_size // settings.micro_batch,
        multiple=run.config.data.pad_multiple,
    )
