"""The models of a work directory by name: where they come from, where they are, and what a finished stage said."""

import json
from pathlib import Path

import jax

from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.hf import load_hf, load_value_head
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import abstract_arrays, put, shardings
from reft_jax.runs.setup import Run
from reft_jax.train.checkpoints import load_params
from reft_jax.train.state import abstract_params, init_head
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
        return {"lm": lm, "value_head": put(head, where["value_head"])}
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


def done(run: Run, stage: str) -> dict | None:
    """What `Training.finish` wrote for this stage, or None if it has not ended. InputError if that is damaged."""
    return hosts.from_first(f"is {stage} done?", lambda: read_result(run.workdir / stage / "done.json"))


def finished(run: Run, stage: str) -> dict | None:
    """As `done`, for a command that would run the stage: a line says that it will not."""
    if result := done(run, stage):
        print(f"{stage}: done already, {run.workdir / stage / 'done.json'}", flush=True)
    return result


def read_result(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        problem = None if {"seconds", "checksum"} <= dict(result).keys() else "fields are missing"
    except (OSError, ValueError, TypeError) as error:
        problem = error
    if problem:
        raise InputError(
            f"{path}: not what a finished stage writes ({problem}); restore it from a copy, or remove "
            f"{path.parent} and {path.parent.parent / 'models' / path.parent.name} to begin the stage again"
        )
    return result
