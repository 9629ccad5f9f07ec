"""A training stage that can stop and go on anywhere: state, saved steps, metrics, and the two kinds of loop."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from reft_jax.executor import InfrastructureError
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import abstract_arrays
from reft_jax.run.guards import check_finite
from reft_jax.run.open import Run
from reft_jax.run.watch import Collapse
from reft_jax.run.workdir import remove_leftovers
from reft_jax.stages.rollout import greedy, top1
from reft_jax.store import write_whole
from reft_jax.train.batches import epoch_order
from reft_jax.train.checkpoints import Checkpoints, save_params
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.metrics import read_metrics
from reft_jax.train.progress import Progress, remark
from reft_jax.train.state import abstract_state, new_state, state_shardings
from reft_jax.train.trackers import MetricsWriter
from reft_jax.types import InputError, SaveError, Stopped


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

        `reference` says which models the stage needs beside its state: JSON with their checksums. InputError if the
        data or these models are not those of the step.
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
        self.metrics = MetricsWriter(self.folder, run.config)
        self.metrics.truncate_after(self.info["step"])
        self._clock = time.monotonic() - self.info["seconds"]

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Saves first if the run was asked to stop, or if programs cannot be run any more (and other hosts know)."""
        together = isinstance(error, Stopped) or (isinstance(error, InfrastructureError) and hosts.count() == 1)
        try:
            if together and self.done:
                self.save()
        finally:
            with contextlib.suppress(SaveError):  # of a full disk; every line is on it already
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
        hosts.agree(f"{self.folder.name}: save", done=self.done, step=self.info["step"], best=self.info.get("best"))
        wanted = {saved["info"].get("best") for saved in self.checkpoints.infos()} | {self.info.get("best")}
        self.checkpoints.save(self.done, self.state, {"info": self.info, "pending": pending})
        self._saved = self.done
        for folder in self.folder.glob("best_*"):  # a step that a resume may use wants its best model
            if hosts.is_first() and folder.name not in {f"best_{at}" for at in wanted}:
                shutil.rmtree(folder)

    def finish(self, model: Path, result: dict) -> dict:
        """Hands on the model (the best one, or the last one where a stage does not choose) and marks the stage done.

        The states of the stage, three times the model's size, and its other best models are removed.
        """
        self.check_finite()
        self.metrics.close()
        self.checkpoints.close()
        if "best" not in self.info:
            save_params(model, self.state.params)
        self.info["seconds"] = time.monotonic() - self._clock
        checksum = digest(array_checksums(self.state))
        result = self.info | result | {"checksum": checksum, "data": self.run.data_made}
        return hosts.from_first(f"{self.folder.name} is done", lambda: self._hand_on(model, result))

    def _hand_on(self, model: Path, result: dict) -> dict:
        best = self.folder / f"best_{self.info.get('best')}"
        if best.exists():
            model.parent.mkdir(exist_ok=True)
            shutil.rmtree(model, ignore_errors=True)
            best.rename(model)
        write_whole(self.folder / "done.json", json.dumps(result, indent=1) + "\n")
        remove_leftovers(self.folder)
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
    progress.say("compiling")
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


def train_iterations(training: Training, iterate, *, questions: int, shown: tuple[str, ...]) -> int:
    """Iterations in which a policy trains on what it sampled, from wherever the training is; the best on dev is kept.

    How many there are, which is returned, follows from config.rl and the number of questions. iterate(state,
    iteration) -> (state, line of the metrics, item ids, inputs by name). `shown` are the numbers of a line that the
    progress shows. Iteration 0 is the model that the stage begins with: it is evaluated too, and may be the best.
    """
    run, stage, rl = training.run, training.folder.name, training.run.config.rl
    per_pass = max(1, questions // rl.questions)
    iterations = rl.iterations or rl.epochs * per_pass
    eval_every, save_every = rl.eval_every or per_pass, rl.save_every or per_pass
    collapse = Collapse(rl.questions)
    for line in read_metrics(training.folder):
        collapse.add(line)

    def evaluated(iteration: int) -> float:
        dev_top1 = top1(greedy(run, training.state.params["lm"], run.data.dev, f"{stage} dev"))
        training.keep_if_best(iteration, dev_top1)
        return dev_top1

    if not training.done:
        training.info["start_dev_top1"] = evaluated(0)
    progress = Progress(stage, iterations, "iteration", done0=training.done)
    progress.say("compiling")
    while True:
        iteration = training.done
        if line := training.pending:  # trained; a stop may have come before it was evaluated
            if iteration % eval_every == 0 or iteration == iterations:
                line = line | {"dev_top1": evaluated(iteration)}
            training.write(iteration, line)
            if ruin := collapse.add(line):
                remark(f"warning: {stage}: iteration {iteration} looks ruined: {ruin}; the best model so far is kept")
            if iteration % save_every == 0 or iteration == iterations:
                training.save()
            progress.update(iteration, **{name: line[name] for name in shown}, **best_so_far(training.info))
        if iteration == iterations:
            break
        state, line, item_ids, inputs = iterate(training.state, iteration + 1)
        training.updated(iteration + 1, state, line, line, item_ids, inputs)
        training.check_finite()
    progress.close()
    if not training.info["best"]:
        remark(f"warning: {stage}: no iteration was better on dev than the warm-up model, which is handed on")
    return iterations


def best_so_far(info: dict) -> dict:
    """For the progress line: nothing before the first evaluation."""
    return {"best_dev_top1": info["best_dev_top1"]} if info["best_dev_top1"] >= 0 else {}
