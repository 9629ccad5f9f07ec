"""What the training stages share: models by name, state and metrics, what a finished stage leaves behind."""

import json
import shutil
import time
from pathlib import Path

import jax
import numpy as np

from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.parallel.mesh import abstract_arrays, shardings
from reft_jax.runs.setup import Run
from reft_jax.train.checkpoints import Checkpoints, load_params, save_params
from reft_jax.train.metrics import MetricsWriter
from reft_jax.train.state import abstract_params, abstract_state, init_head, new_state, state_shardings
from reft_jax.types import InputError

TITLES = {
    "warmup": "SFT warm-up",
    "sft": "SFT",
    "self_train_offline": "offline self-training",
    "self_train_online": "online self-training",
    "reft": "ReFT",
}
POLICIES = tuple(TITLES)


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
    """What a training stage resumes: its state on the mesh, its metrics and its clock.

    `done` is the last epoch or iteration that is saved, `info` the JSON saved with it (results so far, seconds, step).
    """

    def __init__(self, run: Run, stage: str, abstract, optimizer, make_params, info: dict):
        """Restores the newest state of the stage, or begins one around `make_params()` with this `info`."""
        self.folder = folder = run.workdir / stage
        self.shardings = state_shardings(run.mesh, optimizer, abstract)
        self.checkpoints, self.metrics = Checkpoints(folder / "checkpoints"), MetricsWriter(folder)
        restored = self.checkpoints.restore(abstract_arrays(run.mesh, abstract_state(optimizer, abstract)))
        if restored:
            self.done, self.state, self.info = restored
            print(f"{stage}: resuming after {self.done}", flush=True)
        else:
            self.done, self.info = 0, info | {"seconds": 0.0}
            self.state = new_state(run.mesh, optimizer, abstract, make_params())
        self.metrics.truncate_after(self.info.get("step", 0))
        self._clock = time.monotonic() - self.info["seconds"]

    def keep_if_best(self, at: int, dev_top1: float) -> None:
        """Keeps the parameters of epoch or iteration `at` if no earlier one was as good on dev."""
        if dev_top1 > self.info["best_dev_top1"]:
            save_params(self.folder / f"best_{at}", self.state.params)
            self.info |= {"best": at, "best_dev_top1": dev_top1}

    def check_finite(self, at: int, numbers: dict) -> None:
        """FloatingPointError, before anything of this epoch or iteration is saved, if a number is NaN or infinite."""
        bad = {name: float(value) for name, value in numbers.items() if not np.isfinite(value)}
        if bad:
            raise FloatingPointError(f"{self.folder.name} {at}: {bad}; the last saved state is {self.done}")

    def save(self, done: int, step: int) -> None:
        """Everything up to epoch or iteration `done`, whose last metrics line is `step`, is kept from here on."""
        self.info |= {"seconds": time.monotonic() - self._clock, "step": step}
        self.checkpoints.save(done, self.state, self.info)
        self.done = done
        for folder in self.folder.glob("best_*"):  # what a resume could still have wanted is not wanted any more
            if folder.name != f"best_{self.info['best']}":
                shutil.rmtree(folder)

    def finish(self, model: Path, result: dict) -> dict:
        """Hands on the model (the best one, or the last one where a stage does not choose) and marks the stage done.

        The states of the stage, three times the model's size, are removed: nothing reads them any more.
        """
        self.metrics.close()
        self.checkpoints.close()
        best = self.folder / f"best_{self.info.get('best')}"
        if best.exists():
            model.parent.mkdir(exist_ok=True)
            shutil.rmtree(model, ignore_errors=True)
            best.rename(model)
        elif "best" not in self.info:
            save_params(model, self.state.params)
        result = self.info | result
        whole = self.folder / "done.tmp"
        whole.write_text(json.dumps(result, indent=1) + "\n")
        whole.rename(self.folder / "done.json")
        shutil.rmtree(self.folder / "checkpoints")
        return result


def best_so_far(info: dict) -> dict:
    """For the progress line: nothing before the first evaluation."""
    return {"best_dev_top1": info["best_dev_top1"]} if info["best"] else {}
