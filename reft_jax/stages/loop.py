"""A training stage that can stop after any update and resume: its state, saved steps, metrics and loop.

The loop goes over epochs (supervised training) or over iterations (training on what the policy samples).
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from reft_jax.executor import InfrastructureError
from reft_jax.model.lora import trained, whole
from reft_jax.parallel import hosts
from reft_jax.parallel.compilation import compiles
from reft_jax.parallel.mesh import abstract_arrays
from reft_jax.run.guards import check_finite
from reft_jax.run.open import Run
from reft_jax.run.watch import Collapse
from reft_jax.run.workdir import remove_leftovers
from reft_jax.stages.models import as_base, new_adapter
from reft_jax.stages.rollout import greedy, top1
from reft_jax.store import published, remove, write_whole
from reft_jax.train.batches import epoch_order, rows_at
from reft_jax.train.checkpoints import Checkpoints, save_params
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.metrics import read_metrics
from reft_jax.train.progress import Progress, remark
from reft_jax.train.state import abstract_state, init_adapter, new_state, state_shardings
from reft_jax.train.trackers import MetricsWriter
from reft_jax.types import InputError, SaveError, Stopped

START = {"best": 0, "best_dev_top1": -1.0}  # `info` at the start of a stage whose checkpoint is chosen on dev


class Training:
    """A training stage: its state on the mesh, its metrics and its clock. Used in a `with`.

        with Training(run, "sft", abstract, optimizer, make_params, START) as training:
            for epoch in training.epochs(rows=len(rows), batch_size=48, epochs=40):  # or training.iterations(…)
                for chosen in epoch:  # resumes where an earlier start stopped
                    state, numbers = step(training.state, batch_of(chosen))
                    epoch.updated(state, numbers, item_ids, inputs)
                training.write(epoch.means())
            training.finish(model_folder, {"rows": len(rows)})

    `done`: how many updates (in `epochs`) or iterations (in `iterations`) made `state`. `pending`: numbers of finished
    updates that are not yet in the metrics. `info`: the results so far, as JSON. All of these are saved together. They
    agree between two calls of `updated`, so a stage may stop there.

    With LoRA `state` holds the adapter and the head, and `base` is the frozen language model that the stage starts
    from; otherwise `base` is None.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        abstract,
        optimizer,
        make_params,
        info: dict,
        reference: dict | None = None,
        of: str = "",
    ):
        """Restores the newest good step of the stage, or starts from `make_params()` with this `info`.

        abstract: {'lm', head}, of the whole model; with LoRA only an adapter and the head are trained. `reference` says
        which models the stage needs besides its state: JSON with their checksums. of: the model that it starts from;
        "": the base. InputError if the data or these models differ from those of the step.
        """
        self.run, self.folder = run, run.workdir.path / stage
        mesh = run.machine.mesh
        self.base, self.adapter = None, new_adapter(run, of)
        self.lora = self.adapter.lora if self.adapter else None
        if self.lora:
            start, language_model = make_params(), abstract["lm"]
            self.base = as_base(start.pop("lm"), run.machine.model)
            abstract, reference = trained(self.lora, abstract), {"adapter": self.adapter.as_json()} | (reference or {})

            def make_params():
                return {"lora": init_adapter(mesh, self.lora, language_model, run.config.seed)} | start

        self.shardings = state_shardings(mesh, optimizer, abstract)
        made_by = run.inputs.made_by() | {"reference": reference}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", run.config.keep_steps, made_by)
        restored = self.checkpoints.restore(abstract_arrays(mesh, abstract_state(optimizer, abstract)))
        if restored:
            check_same(self.folder, restored.made_by, made_by)
            self.done, self.state = restored.step, restored.state
            self.info, self.pending = restored.info["info"], restored.info["pending"]
            print(f"{stage}: resuming after {self.done}", flush=True)
        else:
            self.done, self.info, self.pending = 0, info | {"seconds": 0.0, "step": 0}, {}
            self.state = new_state(mesh, optimizer, abstract, make_params())
        self._saved, self._unchecked = self.done if restored else None, None
        self.metrics = MetricsWriter(self.folder, run.config, made_by["versions"])
        self.metrics.truncate_after(self.info["step"])
        self._clock = time.monotonic() - self.info["seconds"]

    @property
    def params(self):
        """The parameters {'lm', head} of the whole model, with the adapter if there is one."""
        return whole(self.state.params, self.base, self.lora) if self.lora else self.state.params

    def save_params(self, folder: Path) -> None:
        """Saves what is trained; of an adapter also what it belongs to."""
        save_params(folder, self.state.params, self.adapter.as_json() if self.adapter else None)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Saves first if the run was asked to stop, or, with a single host, if programs cannot be run any more."""
        together = isinstance(error, Stopped) or (isinstance(error, InfrastructureError) and hosts.count() == 1)
        try:
            if together and self.done:
                self.save()
        finally:
            with contextlib.suppress(SaveError):  # of a full disk; every line is on it already
                self.metrics.close()
            self.checkpoints.close()

    def updated(self, state, numbers: dict, pending: dict, item_ids: list[str], inputs: dict) -> None:
        """Records that one more update or iteration made `state` from `inputs` (arrays by name) of these items.

        `numbers` are checked later, at the latest by the next call, so that the host does not wait for the device.
        Raises NotFiniteError if a number of the previous call is NaN or infinite, SaveError if a save in the background
        failed, Stopped if the run was asked to stop.
        """
        self.check_finite()
        self.done, self.state, self.pending = self.done + 1, state, pending
        self._unchecked = numbers, item_ids, inputs
        self.checkpoints.check()
        self.run.guards.step()

    def check_finite(self) -> None:
        """NotFiniteError if a number of the last update is NaN or infinite; nothing made from it is saved."""
        if self._unchecked:
            check_finite(self.folder, self.done, *self._unchecked)
            self._unchecked = None

    def write(self, line: dict) -> None:
        """Writes a line of the metrics at step `done`; nothing is pending afterwards."""
        self.metrics.write(self.done, line)
        self.info["step"], self.pending = self.done, {}

    def dev_top1(self, at: int) -> float:
        """The share of dev questions that the greedy answer gets right; keeps the parameters if it is the best so far.

        at: the epoch or iteration.
        """
        lm, stage = self.params["lm"], self.folder.name
        share = top1(greedy(self.run, lm, self.run.inputs.data.dev, f"{stage} dev"))
        self.keep_if_best(at, share)
        return share

    def keep_if_best(self, at: int, dev_top1: float) -> None:
        """Keeps the parameters of epoch or iteration `at` if they are better on dev than all before."""
        self.check_finite()
        if dev_top1 > self.info["best_dev_top1"]:
            self.save_params(self.folder / f"best_{at}")
            self.info |= {"best": at, "best_dev_top1": dev_top1}

    def save(self) -> None:
        """Starts to save everything after `done` updates or iterations, unless that is saved already."""
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
        for folder in self.folder.glob("best_*"):  # keep the best model of every saved step: a resume may need it
            if hosts.is_first() and folder.name not in {f"best_{at}" for at in wanted}:
                remove(folder, ignore_errors=False)

    def finish(self, model: Path, result: dict) -> dict:
        """Moves the best model to `model`, marks the stage done, and returns what done.json records.

        A reranker has no dev evaluation: its last parameters are saved. Removes the saved steps of the stage, each
        three times the size of the model, and its other best models.
        """
        self.check_finite()
        self.metrics.close()
        self.checkpoints.close()
        if "best" not in self.info:
            self.save_params(model)
        self.info["seconds"] = time.monotonic() - self._clock
        checksum = digest(array_checksums(self.state))
        result = self.info | result | {"checksum": checksum, "data": self.run.inputs.data_made}
        return hosts.from_first(f"{self.folder.name} is done", lambda: self._hand_on(model, result))

    def _hand_on(self, model: Path, result: dict) -> dict:
        best = self.folder / f"best_{self.info.get('best')}"
        if published(best):
            model.parent.mkdir(exist_ok=True)
            remove(model)
            best.rename(model)
        write_whole(self.folder / "done.json", json.dumps(result, indent=1) + "\n")
        remove_leftovers(self.folder)
        return result

    def epochs(self, *, rows: int, batch_size: int, epochs: int) -> Iterator["Epoch"]:
        """Yields the epochs that are left, each an iterator over its batches; saves after each one.

        If an earlier start made all updates of an epoch but did not write its line, that epoch comes first, without
        batches.
        """
        per_epoch = -(-rows // batch_size)
        progress = Progress(self.folder.name, epochs * per_epoch, done0=self.done, first="compiling")
        whole, left = divmod(self.done, per_epoch)
        first = whole if self.pending and not left else whole + 1
        for number in range(first, epochs + 1):
            yield Epoch(self, number, rows, batch_size, progress)
            self.save()
        progress.close()

    def iterations(self, questions: int, *, shown: tuple[str, ...]) -> Iterator["Drawn"]:
        """Yields the iterations that are left, each with the questions drawn for it.

        After each one it writes the line of its metrics; it evaluates on dev and saves as often as config.rl says. The
        start model counts as iteration 0: it is evaluated too and may be the best. shown: the numbers in the progress
        line.

        With rl.tokens, the iteration that reaches so many sampled tokens is the last. They are counted in `info` and
        not from the metrics, which another host may read while the first one truncates them.
        """
        stage, rl = self.folder.name, self.run.config.rl
        iterations, eval_every, save_every = schedule_of(rl, questions)
        collapse = Collapse(rl.questions)
        for line in read_metrics(self.folder):
            collapse.add(line)
        if not self.done:
            self.info["start_dev_top1"] = self.dev_top1(0)
        progress = Progress(stage, iterations, "iteration", done0=self.done, first="compiling")
        compiled = 0
        while True:
            done, tokens = self.done, self.info.get("tokens", 0) + self.pending.get("tokens", 0)
            ended = done >= iterations or 0 < rl.tokens <= tokens  # more, if rl.iterations was lowered
            if line := self.pending:  # of the last iteration, which an earlier start may have left without evaluation
                if done % eval_every == 0 or ended:
                    line = line | {"dev_top1": self.dev_top1(done)}
                    self.info["evaluated"] = done
                self.write(line | {"compiles": compiled})
                self.info["tokens"] = tokens
                if ruin := collapse.add(line):
                    remark(f"warning: {stage}: iteration {done} looks ruined: {ruin}; the best model so far is kept")
                if done % save_every == 0 or ended:
                    self.save()
                progress.total = expected(iterations, rl.tokens, done, tokens)
                progress.update(done, **{name: line[name] for name in shown}, **best_so_far(self.info))
            elif ended and self.info.get("evaluated") != done:  # it was not the last one when its line was written
                self.dev_top1(done)
            if ended:
                break
            before = compiles()
            yield Drawn(done + 1, rows_at(self.run.config.seed, done * rl.questions, rl.questions, questions))
            compiled = compiles() - before
            self.check_finite()
        progress.close()
        if not self.info["best"]:
            remark(f"warning: {stage}: no iteration was better on dev than the warm-up model, which becomes the result")


class Schedule(NamedTuple):
    """How many iterations there are, and after how many a stage evaluates on dev and saves."""

    iterations: int
    eval_every: int
    save_every: int


def schedule_of(rl, questions: int) -> Schedule:
    """The schedule on so many training questions. rl: the settings; 0 means once per pass over the questions."""
    per_pass = max(1, questions // rl.questions)
    return Schedule(rl.iterations or rl.epochs * per_pass, rl.eval_every or per_pass, rl.save_every or per_pass)


def expected(iterations: int, most: int, done: int, tokens: int) -> int:
    """How many iterations there will be if the rest are like the `done` ones.

    iterations: the most that there can be. most: `rl.tokens`. tokens: sampled so far.
    """
    if most and tokens:
        iterations = min(iterations, math.ceil(done * most / tokens))
    return max(iterations, done)  # done: if rl.iterations was lowered


class Drawn(NamedTuple):
    """An iteration to make: its number, from 1, and the indices of the questions drawn for it, int[Q]."""

    number: int
    questions: np.ndarray


class Epoch:
    """One epoch in seeded order: an iterator over the row indices of each update left, int[b], b <= batch_size."""

    def __init__(self, training: Training, number: int, rows: int, batch_size: int, progress: Progress):
        self.training, self.number, self.batch_size, self.progress = training, number, batch_size, progress
        self.order = epoch_order(training.run.config.seed, number, rows)

    def __iter__(self) -> Iterator[np.ndarray]:
        training, per_epoch = self.training, -(-len(self.order) // self.batch_size)
        for at in range(training.done - (self.number - 1) * per_epoch, per_epoch):
            yield self.order[at * self.batch_size : (at + 1) * self.batch_size]
            if training.done % 10 == 0 or at + 1 == per_epoch:
                loss = float(training.pending["loss"][-1])
                self.progress.update(training.done, loss=loss, **best_so_far(training.info))

    def updated(self, state, numbers: dict, item_ids: list[str], inputs: dict, **counted: float) -> None:
        """As `Training.updated`. `counted`: more numbers, known on the host; `means` covers these too."""
        before = self.training.pending
        pending = {name: [*before.get(name, ()), x] for name, x in (numbers | counted).items()}
        self.training.updated(state, numbers, pending, item_ids, inputs)

    def means(self) -> dict[str, float]:
        """Means of the numbers over the epoch's updates."""
        self.training.check_finite()
        numbers = jax.device_get(self.training.pending)
        return {name: float(np.mean(list(map(float, x)))) for name, x in numbers.items()}


def best_so_far(info: dict) -> dict:
    """The best dev top-1 for the progress line; empty before the first evaluation."""
    best = info.get("best_dev_top1", -1.0)
    return {"best_dev_top1": best} if best >= 0 else {}


def check_same(folder: Path, before: dict, now: dict) -> None:
    """InputError unless a saved step was made from the same data and reference; prints a line if versions differ.

    Other data is allowed if the settings differ too: they were changed on purpose.
    """
    if before["data"] != now["data"] and before["config"] == now["config"]:
        raise InputError(f"{folder}: was started with other data; restore the data or choose another --workdir")
    if before["reference"] != now["reference"]:
        told = f"({before['reference']}, now {now['reference']})"
        problem = f"{folder}: the reference model is not the one this stage started with {told}"
        raise InputError(f"{problem}; restore it, or remove {folder} to start the stage over")
    old, new = before["versions"], now["versions"]
    if changed := [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old.get(name) != new.get(name)]:
        print(f"{folder.name}: resumes with other versions ({'; '.join(changed)}); last bits may differ", flush=True)
