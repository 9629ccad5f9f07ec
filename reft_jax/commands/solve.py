"""The command `solve`: one model writes a program, or text, for one question; the answer that it gives."""

import sys
import tempfile
from pathlib import Path

from reft_jax import executor
from reft_jax.commands.sweep import Source, find
from reft_jax.run.inputs import checked_tokenizer, completed_text
from reft_jax.run.machine import start_executor
from reft_jax.run.workdir import recorded
from reft_jax.tasks import answers
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.tokenizer import all_end_ids, encode_rollout
from reft_jax.types import Example, InputError, Prompt


def run_solve(folder: Path, question: str, *, answer_format: str | None, max_len: int, allow_unsandboxed: bool) -> None:
    """Decodes greedily in float32, prints the completion and the answer that it gives.

    folder: in Hugging Face format, or RUN/models/NAME of a work directory. The latter gives the task and the default of
    the answer format; without one they are the paper's numbers and `python`. max_len: tokens of prompt and completion.
    """
    if folder.parent.name == "models" and folder.name.startswith("rerank_"):
        raise InputError(f"{folder}: is a reranker, which writes no answers; give the model that it ranks")
    source = find(str(folder)) if folder.is_dir() else Source(folder, folder)
    settings = trained_with(source)
    answer_format, task = answer_format or settings.get("data.format", "python"), load_task(settings.get("task", ""))
    tokenizer = checked_tokenizer(source.base)
    prompt = encode_rollout(tokenizer, question, answer_format, task)
    if len(prompt) >= max_len:
        raise InputError(f"--max_len={max_len}: the question alone has {len(prompt)} tokens; raise it")
    start_executor(1, 1024, allow_unsandboxed)
    print(f"{folder}: reading, then compiling", file=sys.stderr, flush=True)
    try:
        import numpy as np

        from reft_jax.engine.generate import Engine
        from reft_jax.parallel.mesh import make_mesh, on_mesh, row_shards

        mesh = make_mesh(-1, 1, 1)
        with on_mesh(mesh):
            model, lm = load_policy(source, mesh)
            model.config.check_lengths({"--max_len": max_len})
            ends = all_end_ids(tokenizer, source.base)
            rows = Engine(model, mesh, slots=row_shards(mesh), pad_multiple=64, eos_id=ends, seed=0)
            asked = [Prompt("question", 0, np.array(prompt, np.int32))]
            [(_, completion)] = rows.generate(lm, asked, max_len=max_len, temperature=0.0)
        text = completed_text(tokenizer, prompt, completion, task)
        # The correct answer is not known here; grading gets 0 instead.
        asked = [Example("toy_0", question, "0")]
        [verdict] = answers.grade([text], asked, answer_format, task, run_programs=executor.run_programs)
        print(text)
        print(f"\nanswer: {verdict.value if verdict.value is not None else f'none ({verdict.status})'}")
    finally:
        executor.shutdown()


def trained_with(source: Source) -> dict:
    """The settings of the work directory that a stage's model is in; none for any other folder."""
    return (recorded(source.folder.parent.parent) if source.is_stage else None) or {}


def load_policy(source: Source, mesh):
    """(model, parameters of the language model) in float32."""
    from reft_jax.model.hf import load_hf, read_config
    from reft_jax.model.llama import Llama
    from reft_jax.stages.models import load_saved

    if not source.is_stage:
        return load_hf(source.folder)
    model = Llama(read_config(source.base))
    with tempfile.TemporaryDirectory() as scratch:  # this command writes nothing in the work directory
        return model, load_saved(source.folder, source.base, mesh, model, Path(scratch) / "checksums.json")["lm"]
