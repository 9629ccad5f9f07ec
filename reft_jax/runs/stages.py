"""What the training stages share: models by name, what a finished stage leaves behind, greedy accuracy."""

import json
from pathlib import Path

import numpy as np

from reft_jax.model.heads import RerankHead, ValueHead
from reft_jax.model.hf import load_hf
from reft_jax.parallel.mesh import abstract_arrays, shardings
from reft_jax.runs.setup import Run
from reft_jax.train.checkpoints import load_params
from reft_jax.train.state import abstract_params, init_head
from reft_jax.types import Example, InputError, Verdict

POLICIES = ("warmup", "sft", "reft")
TITLES = {"warmup": "SFT warm-up", "sft": "SFT", "reft": "ReFT"}


def abstract_policy(run: Run):
    return abstract_params(run.model, ValueHead(), "value_head")


def abstract_reranker(run: Run):
    return abstract_params(run.model, RerankHead(), "rerank_head")


def base_policy(run: Run):
    """The base model's weights, float32, and a new value head, on the mesh."""
    where = shardings(run.mesh, abstract_policy(run))["lm"]
    _, lm = load_hf(run.base, shardings=where)
    return {"lm": lm, "value_head": init_head(run.mesh, ValueHead(), run.model.config.hidden_size, run.config.seed)}


def model_folder(run: Run, name: str) -> Path:
    return run.workdir / "models" / name


def load_model(run: Run, name: str, abstract=None):
    """The parameters that a stage saved under `name`; InputError if it has not run in this work directory."""
    folder = model_folder(run, name)
    if not folder.exists():
        raise InputError(f"{folder}: no such model; run the stage that makes it with this --workdir first")
    return load_params(folder, abstract_arrays(run.mesh, abstract or abstract_policy(run)))


def finished(run: Run, stage: str) -> dict | None:
    """What `finish` wrote for this stage, or None if it has not ended."""
    path = run.workdir / stage / "done.json"
    return json.loads(path.read_text()) if path.exists() else None


def finish(run: Run, stage: str, result: dict) -> dict:
    path = run.workdir / stage / "done.json"
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.rename(path)
    return result


def greedy(run: Run, lm, examples: list[Example], max_len: int) -> list[tuple[str, Verdict]]:
    """The greedy completion of each example, continued from the forced prefix, and its verdict."""
    prompts, texts = run.prompts(examples), [""] * len(examples)
    for i, completion in run.engine.generate(lm, prompts, max_len=max_len, temperature=0.0):
        texts[i] = run.text(prompts[i], completion)
    return list(zip(texts, run.grade(texts, examples), strict=True))


def top1(graded: list[tuple[str, Verdict]]) -> float:
    return float(np.mean([verdict.correct for _, verdict in graded]))
