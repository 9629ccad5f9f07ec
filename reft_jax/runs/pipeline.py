"""The whole chain in one work directory. What is done already is not done again."""

import time

from reft_jax.runs.evaluate import run_evaluate
from reft_jax.runs.reft import run_reft
from reft_jax.runs.rerank import run_rerank
from reft_jax.runs.sample import run_sample
from reft_jax.runs.setup import Run
from reft_jax.runs.sft import run_sft


def run_pipeline(run: Run) -> dict:
    """SFT, ReFT, sampling, two rerankers, the table. Returns the report."""
    stages = [
        ("SFT: warm-up and best checkpoint", lambda: run_sft(run)),
        ("ReFT: PPO from the warm-up model", lambda: run_reft(run)),
        ("samples of the warm-up model on training questions", lambda: run_sample(run, "warmup", "train")),
        ("samples of SFT on test questions", lambda: run_sample(run, "sft", "test")),
        ("samples of ReFT on test questions", lambda: run_sample(run, "reft", "test")),
        ("reranker for SFT", lambda: run_rerank(run, "sft")),
        ("reranker for ReFT", lambda: run_rerank(run, "reft")),
    ]
    started = time.monotonic()
    for i, (title, stage) in enumerate(stages, start=1):
        print(f"[{i}/{len(stages) + 1}] {title}", flush=True)
        stage()
    print(f"[{len(stages) + 1}/{len(stages) + 1}] evaluation", flush=True)
    report = run_evaluate(run)
    print(f"\nreport.md, report.json, curves.png: {run.workdir}\nthis run took {time.monotonic() - started:.0f} s")
    return report
