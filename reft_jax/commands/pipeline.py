"""The whole chain in one work directory. Finished stages are skipped."""

import time
from functools import partial

from reft_jax.commands.evaluate import run_evaluate
from reft_jax.run.open import Run
from reft_jax.stages.models import TITLES, check_sources
from reft_jax.stages.reft import run_reft
from reft_jax.stages.rerank import run_rerank
from reft_jax.stages.sample import run_sample
from reft_jax.stages.self_train import OFFLINE, ONLINE, online_rows, run_offline, run_online
from reft_jax.stages.sft import run_sft


def run_pipeline(run: Run, *, baselines: bool = False) -> dict:
    """SFT, ReFT, with `baselines` self-training of both kinds, sampling, rerankers, the table. Returns the report."""
    names = ["sft", OFFLINE, ONLINE, "reft"] if baselines else ["sft", "reft"]
    stages = [("SFT: warm-up and best checkpoint", lambda: run_sft(run))]
    if baselines:
        online_rows(run)  # a limit that drops too many rows ends the run here
        stages += [
            ("offline self-training of the base model", lambda: run_offline(run)),
            ("online self-training from the warm-up model", lambda: run_online(run)),
        ]
    stages.append(("ReFT: PPO from the warm-up model", lambda: run_reft(run)))
    stages.append(("samples of the warm-up model on training questions", lambda: run_sample(run, "warmup", "train")))
    stages += [(f"samples of {TITLES[one]} on test questions", partial(run_sample, run, one, "test")) for one in names]
    stages += [(f"reranker for {TITLES[one]}", partial(run_rerank, run, one)) for one in names]
    for stage in [*names, *(f"rerank_{one}" for one in names)]:
        check_sources(run, stage)  # a finished stage that may not be used is found now, not after hours
    started = time.monotonic()
    for i, (title, stage) in enumerate(stages, start=1):
        print(f"[{i}/{len(stages) + 1}] {title}", flush=True)
        stage()
    print(f"[{len(stages) + 1}/{len(stages) + 1}] evaluation", flush=True)
    report = run_evaluate(run)
    print(f"\nreport.md, report.json, report.html, curves.png: {run.workdir.path}")
    print(f"this run took {time.monotonic() - started:.0f} s")
    return report
