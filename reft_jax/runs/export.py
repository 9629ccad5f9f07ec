"""A stage's model as a Hugging Face folder that transformers loads."""

from pathlib import Path

from reft_jax.model.hf import save_hf
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import abstract_reranker, load_model


def run_export(run: Run, name: str, out: Path) -> None:
    """`name`: warmup, sft, reft (the value head goes into a file of its own beside it), rerank_sft or rerank_reft."""
    if name.startswith("rerank_"):
        params = load_model(run, name, abstract_reranker(run))
        save_hf(out, run.model, params["lm"], rerank_head=params["rerank_head"], tokenizer=run.tokenizer)
    else:
        params = load_model(run, name)
        save_hf(out, run.model, params["lm"], value_head=params["value_head"], tokenizer=run.tokenizer)
    print(f"{name} -> {out}")
