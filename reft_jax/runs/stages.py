"""What the training stages share: models by name, state and metrics, what a finished stage leaves behind."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from reft_jax.executor import InfrastructureError
from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.parallel.mesh import abstract_arrays, shardings
from reft_jax.runs.guards import Stopped, check_finite
from reft_jax.runs.setup import Run
from reft_jax.train.batches import epoch_order
from reft_jax.train.checkpoints import Checkpoints, load_params, save_params
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.metrics import MetricsWriter, Progress
from reft_jax.train.state import abstract_params, abstract_state, init_head, new_state, state_shardings
from reft_jax.types import InputError

POLICIES = ("warmup", "sft", "reft")
TITLES = {"warmup": "SFT warm-up", "sft": "SFT", "reft": "ReFT"}


def abstract_policy(run: Run):
    return abstract_params(run.model, ValueHead(), "value_head")


def abstract_reranker(run: Run):
    return abstract_params(run.model, RerankHead(), "rerank_head")


def base_policy(run: Run):
    """The base model's weights, float32, on the mesh, with the value head of its folder or a new one."""
    where = shardings(run.mesh, abstract_policy(run))
    _, lm = load_hf(run.base, shardings=where["lm"])
    if head := load_value_head(run.base):
        print(f"the value head is that of {run.base}", flush=True)
        return {"lm": lm, "value_head": jax.device_put(head, where["value_head"])}
    head = init_head(run.mesh, ValueHead(), run.model.config.hidden_size, run.config.seed)
    return {"lm": lm, "value_head": jax.tree.map(lambda x: run.config.ppo.value_init * x, head)}


def model_folder(run: Run, name: str) -> Path:
    """Where a finished stage puts its model; the warm-up model is there as soon as its epoch is over."""
    return run.workdir / "models" / name


def load_model(run: Run, name: str, abstract=None):
    """The parameters that a stage saved under `name`; InputError if it has not run in this work directory."""
    folder = model_folder(run, name)
    if not folder.exists():
        raise InputError(f"{folder}: no such model; run the stage that makes it with this --workdir first")
    return load_params(folder, abstract_arrays(run.mesh, abstract or abstract_policy(run)))


def finished(run: Run, stage: str) -> dict | None:
    """What `Training.finish` wrote for this stage, or None if it has not ended."""
    path = run.workdir / stage / "done.json"
    return json.loads(path.read_text()) if path.exists() else None


class Training:
    """What a training stage resumes: its state on the mesh, its metrics and its clock. A context.

        with Training(run, "sft", abstract, optimizer, make_params, {"best": 0, "best_dev_top1": -1.0}) as training:
            while training.done < updates:  # wherever an earlier start was stopped
                state, numbers = step(training.state, batch)
                training.updated(training.done + 1, state, numbers, pending, item_ids, inputs)
                training.write(training.done, line), training.save()  # now and then
            training.finish(model_folder(run, "sft"), {"rows": len(rows)})

    `done` counts what `state` has been through: updates, or iterations of PPO. `pending` are the numbers of what is
    trained and not yet a line of the metrics; `info` is JSON for the stage (results so far). All of it is saved
    together, so a stage may be stopped wherever `done`, `state` and `pending` fit each other: between two `updated`.
    """

    def __init__(
        self, run: Run, stage: str, abstract, optimizer, make_params, info: dict, reference: dict | None = None
    ):
        """Restores the newest good step of the stage, or begins one around `make_params()` with this `info`.

        `reference` ({"path", "checksum"}) is a model that is frozen beside the state. InputError if the data or the
        reference are not those of the step.
        """
        self.run, self.folder = run, run.workdir / stage
        self.shardings = state_shardings(run.mesh, optimizer, abstract)
        made_by = run.made_by() | {"reference": reference}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", run.config.keep_steps, made_by)
        restored = self.checkpoints.restore(abstract_arrays(run.mesh, abstract_state(optimizer, abstract)))
        if restored:
            check_same(self.folder, restored.made_by, made_by)
            self.done, self.state = restored.step, restored.state
            self.info, self.pending = restored.info["info"], restored.info["pending"]
            print(f"{stage}: resuming after {self.done}", flush=True)
        else:
            self.done, self.info, self.pending = 0, info | {"seconds": 0.0, "step": 0}, {}
            self.state = new_state(run.mesh, optimizer, abstract, make_params())
        self._saved, self._unchecked = self.done if restored else None, None
        self.metrics = MetricsWriter(self.folder)
        self.metrics.truncate_after(self.info["step"])
        self._clock = time.monotonic() - self.info["seconds"]

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Saves first if the run was asked to stop, or if programs cannot be run any more."""
        try:
            if isinstance(error, Stopped | InfrastructureError) and self.done:
                self.save()
        finally:
            self.metrics.close()
            self.checkpoints.close()

    def updated(self, done: int, state, numbers: dict, pending: dict, item_ids: list[str], inputs: dict) -> None:
        """`state` is what update or iteration `done` made, from `inputs` (arrays by name) of these items.

        The `numbers` of the update before are looked at, so the host need not wait for the device. Raises
        NotFiniteError for those, SaveError for a save in the background, Stopped if the run was asked to stop.
        """
        self.check_finite()
        self.done, self.state, self.pending = done, state, pending
        self._unchecked = numbers, item_ids, inputs
        self.checkpoints.check()
        self.run.guards.step()

    def check_finite(self) -> None:
        """NotFiniteError if a number of the last update is NaN or infinite; nothing that came of it is saved."""
        if self._unchecked:
            check_finite(self.folder, self.done, *self._unchecked)
            self._unchecked = None

    def write(self, step: int, line: dict) -> None:
        """A line of the metrics: nothing is pending any more."""
        self.metrics.write(step, line)
        self.info["step"], self.pending = step, {}

    def keep_if_best(self, at: int, dev_top1: float) -> None:
        """Keeps the parameters of epoch or iteration `at` if no earlier one was as good on dev."""
        self.check_finite()
        if dev_top1 > self.info["best_dev_top1"]:
            save_params(self.folder / f"best_{at}", self.state.params)
            self.info |= {"best": at, "best_dev_top1": dev_top1}

    def save(self) -> None:
        """Begins to save everything as it is after `done`, unless that was saved; a stop may have come there before."""
        self.check_finite()
        if self.done == self._saved:
            return
        self.info["seconds"] = time.monotonic() - self._clock
        pending = json.loads(json.dumps(jax.device_get(self.pending), default=float))
        self.checkpoints.wait()
        wanted = {saved["info"].get("best") for saved in self.checkpoints.infos()} | {self.info.get("best")}
        self.checkpoints.save(self.done, self.state, {"info": self.info, "pending": pending})
        self._saved = self.done
        for folder in self.folder.glob("best_*"):  # a step that a resume may use wants its best model
            if folder.name not in {f"best_{at}" for at in wanted}:
                shutil.rmtree(folder)

    def finish(self, model: Path, result: dict) -> dict:
        """Hands on the model (the best one, or the last one where a stage does not choose) and marks the stage done.

        The states of the stage, three times the model's size, are removed: nothing reads them any more.
        """
        self.check_finite()
        self.metrics.close()
        self.checkpoints.close()
        best = self.folder / f"best_{self.info.get('best')}"
        if best.exists():
            model.parent.mkdir(exist_ok=True)
            shutil.rmtree(model, ignore_errors=True)
            best.rename(model)
        elif "best" not in self.info:
            save_params(model, self.state.params)
        self.info["seconds"] = time.monotonic() - self._clock
        result = self.info | result | {"checksum": digest(array_checksums(self.state))}
        whole = self.folder / "done.tmp"
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.rename(self.folder / "done.json")
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        return result


def check_same(folder: Path, before: dict, now: dict) -> None:
    """InputError unless a step was made from the same data and reference; says so if by other versions.

    A config that was changed on purpose may have changed its data.
    """
    if before["data"] != now["data"] and before["config"] == now["config"]:
        raise InputError(f"{folder}: began with other data; bring them back or choose another --workdir")
    if before["reference"] != now["reference"]:
        raise InputError(
            f"{folder}: the reference model is not the one this stage began with ({before['reference']}, now "
            f"{now['reference']}); bring it back or remove {folder} to begin the stage again"
        )
    old, new = before["versions"], now["versions"]
    if changed := [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]:
        print(f"{folder.name}: goes on with other versions ({'; '.join(changed)}); last bits may differ", flush=True)


def train_epochs(
    training: Training, step_fn, make_batch, end_epoch, *, rows: int, batch_size: int, epochs: int, shown=lambda: {}
) -> None:
    """Updates over `rows` in seeded order, `epochs` times, from wherever the training is.

    make_batch(rows of an update) -> (batch on the mesh, count, host numbers, item ids, inputs by name); step_fn(state,
    batch, count) -> (state, numbers). end_epoch(epoch, step, means of the epoch's numbers) makes and writes its line.
    """
    run, per_epoch = training.run, -(-rows // batch_size)
    progress = Progress(training.folder.name, epochs * per_epoch, done0=training.done)
    while True:
        epoch, at = divmod(training.done, per_epoch)
        if at == 0 and training.pending:
            training.check_finite()
            numbers = jax.device_get(training.pending)
            end_epoch(epoch, training.done, {name: float(np.mean(list(map(float, x)))) for name, x in numbers.items()})
            training.save()
        if training.done == epochs * per_epoch:
            break
        chosen = epoch_order(run.config.seed, epoch + 1, rows)[at * batch_size : (at + 1) * batch_size]
        batch, count, counted, item_ids, inputs = make_batch(chosen)
        state, numbers = step_fn(training.state, batch, count)
        pending = {name: [*training.pending.get(name, ()), x] for name, x in (numbers | counted).items()}
        training.updated(training.done + 1, state, numbers, pending, item_ids, inputs)
        if training.done % 10 == 0 or training.done % per_epoch == 0:
            progress.update(training.done, loss=float(numbers["loss"]), **shown())
    progress.close()


def best_so_far(info: dict) -> dict:
    """For the progress line: nothing before the first evaluation."""
    return {"best_dev_top1": info["best_dev_top1"]} if info["best"] else {}
