"""One question to one model: the program it writes and the answer that running it gives."""

from pathlib import Path

from reft_jax import executor
from reft_jax.runs.setup import checked_tokenizer, completed_text, start_executor
from reft_jax.task import answers
from reft_jax.task.tokenizer import all_end_ids, encode_rollout
from reft_jax.types import Example, InputError, Prompt


def run_solve(folder: Path, question: str, *, engine: str, max_len: int, allow_unsandboxed: bool) -> None:
    """Decodes greedily in float32, prints the completion and its executed answer."""
    tokenizer = checked_tokenizer(folder)
    prompt = encode_rollout(tokenizer, question, engine)
    if len(prompt) >= max_len:
        raise InputError(f"--max_len={max_len}: the question alone has {len(prompt)} tokens; raise it")
    start_executor(1, 1024, allow_unsandboxed)
    try:
        import numpy as np

        from reft_jax.engine.generate import Engine
        from reft_jax.model.hf import load_hf
        from reft_jax.parallel.mesh import make_mesh, on_mesh, row_shards

        mesh = make_mesh(-1, 1, 1)
        with on_mesh(mesh):
            model, lm = load_hf(folder)
            ends = all_end_ids(tokenizer, folder)
            rows = Engine(model, mesh, slots=row_shards(mesh), pad_multiple=64, eos_id=ends, seed=0)
            asked = [Prompt("question", 0, np.array(prompt, np.int32))]
            [(_, completion)] = rows.generate(lm, asked, max_len=max_len, temperature=0.0)
        text = completed_text(tokenizer, prompt, completion)
        # The right answer is not known here; 0 only stands where grading wants one.
        [verdict] = answers.grade([text], [Example("toy_0", question, "0")], engine, run_programs=executor.run_programs)
        print(text)
        print(f"\nanswer: {verdict.value if verdict.value is not None else f'none ({verdict.status})'}")
    finally:
        executor.shutdown()
