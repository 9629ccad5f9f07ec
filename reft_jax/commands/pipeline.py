"""The whole chain in one work directory. Finished stages are skipped."""

import time
from collections.abc import Callable
from typing import NamedTuple

from reft_jax.commands.evaluate import run_evaluate
from reft_jax.run.open import Run
from reft_jax.run.workdir import TITLES
from reft_jax.stages.models import check_sources, method
from reft_jax.stages.reft import run_reft
from reft_jax.stages.rerank import run_rerank
from reft_jax.stages.sample import run_sample
from reft_jax.stages.self_train import OFFLINE, ONLINE, online_rows, run_offline, run_online
from reft_jax.stages.sft import run_sft


class Step(NamedTuple):
    """A step of the chain: `function(run, *arguments)`."""

    title: str
    function: Callable
    arguments: tuple[str, ...] = ()


def steps(config, *, baselines: bool) -> list[Step]:
    """SFT, ReFT, with `baselines` self-training of both kinds, sampling, rerankers, the table."""
    names = ["sft", OFFLINE, ONLINE, "reft"] if baselines else ["sft", "reft"]
    chain = [Step("SFT: warm-up and best checkpoint", run_sft)]
    if baselines:
        chain.append(Step("offline self-training of the base model", run_offline))
        chain.append(Step("online self-training from the warm-up model", run_online))
    chain.append(Step(f"ReFT: {method(config)} from the warm-up model", run_reft))
    chain.append(Step("samples of the warm-up model on training questions", run_sample, ("warmup", "train")))
    chain += [Step(f"samples of {TITLES[one]} on test questions", run_sample, (one, "test")) for one in names]
    chain += [Step(f"reranker for {TITLES[one]}", run_rerank, (one,)) for one in names]
    return [*chain, Step("evaluation", run_evaluate)]


def run_pipeline(run: Run, *, baselines: bool = False) -> dict:
    """Runs `steps` and returns the report."""
    chain = steps(run.config, baselines=baselines)
    if baselines:
        online_rows(run)  # a limit that drops too many rows ends the run here
    for name in ("sft", *((OFFLINE, ONLINE) if baselines else ()), "reft"):
        for stage in (name, f"rerank_{name}"):
            check_sources(run, stage)  # a finished stage that may not be used is found now, not after hours
    started = time.monotonic()
    for i, step in enumerate(chain, start=1):
        print(f"[{i}/{len(chain)}] {step.title}", flush=True)
        result = step.function(run, *step.arguments)
    print(f"this run took {time.monotonic() - started:.0f} s")
    return result
