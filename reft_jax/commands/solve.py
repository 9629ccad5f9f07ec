"""The command `solve`: one model writes a program, or text, for one question; the answer that it gives."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from reft_jax import executor
from reft_jax.commands.sweep import Source, find
from reft_jax.engine.generate import Engine
from reft_jax.model import families
from reft_jax.model.hf import read_config
from reft_jax.model.llama import Llama
from reft_jax.parallel.mesh import make_mesh, on_mesh, row_shards
from reft_jax.run.machine import running_executor
from reft_jax.run.workdir import recorded
from reft_jax.tasks import answers
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.prompts import make_prompter
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.tokenizer import all_end_ids
from reft_jax.types import Example, InputError, Prompt

NUMBER = "toy_0"  # an item id whose answer is a number


def run_solve(
    folder: Path,
    question: str,
    *,
    answer_format: str | None,
    task: str | None,
    template: str | None,
    system: str | None,
    family: str,
    max_len: int,
    allow_unsandboxed: bool,
) -> None:
    """Decodes greedily in float32, prints the completion and the answer that it gives.

    folder: in Hugging Face format, or RUN/models/NAME of a work directory. The latter gives the defaults of the task,
    the answer format, the template, the system prompt and the family. A folder gives none of them: then the answer is a
    number, the format is `python`, the template is `method`, and the family is that of model_type.
    family: as the setting model.family. max_len: tokens of prompt and completion.
    """
    if folder.parent.name == "models" and folder.name.startswith("rerank_"):
        raise InputError(f"{folder}: is a reranker, which writes no answers; give the model that it ranks")
    source = find(str(folder)) if folder.is_dir() else Source(folder, folder)
    families.use(family, "--family")  # after the run's own, which `find` uses
    settings = trained_with(source)
    answer_format = answer_format or settings.get("data.format", "python")
    item_id = NUMBER
    if task is None and not (task := settings.get("task", "")):
        item_id = asked_in_training(settings)
    task = load_task(task, settings.get("data.reading", "strict"))
    template = template or settings.get("data.template", "method")
    if system and template != "chat":
        raise InputError("--system is set, and only --template=chat has a system prompt")
    system = settings.get("data.system", "") if system is None else system
    tokenizer = source.tokenizer()
    prompter = make_prompter(tokenizer, answer_format, task, template, system)
    prompt = prompter.prompt(question)
    if len(prompt) >= max_len:
        raise InputError(f"--max_len={max_len}: the question alone has {len(prompt)} tokens; raise it")
    with running_executor(1, 1024, allow_unsandboxed):
        print(f"{folder}: reading, then compiling", file=sys.stderr, flush=True)
        mesh, model = make_mesh(-1, 1, 1), Llama(read_config(source.base))
        with on_mesh(mesh):
            model.config.check_lengths({"--max_len": max_len})
            ends = {*all_end_ids(tokenizer, source.base), prompter.frame.end}
            rows = Engine(model, mesh, slots=row_shards(mesh), pad_multiple=64, eos_id=ends, seed=0)
            asked = [Prompt("question", 0, np.array(prompt, np.int32))]
            with tempfile.TemporaryDirectory() as scratch:  # this command writes nothing in a work directory
                lm = source.load(mesh, model, Path(scratch))
            [(_, completion)] = rows.generate(lm, asked, max_len=max_len, temperature=0.0)
        text = prompter.completed(prompt, completion)
        # The correct answer is not known here; grading gets 0 instead.
        asked = [Example(item_id, question, "0")]
        [verdict] = answers.grade([text], asked, answer_format, task, run_programs=executor.run_programs)
        print(text)
        print(f"\nanswer: {verdict.value if verdict.value is not None else f'none ({verdict.status})'}")


def trained_with(source: Source) -> dict:
    """The settings of the work directory that a stage's model is in; none for any other folder."""
    return (recorded(source.folder.parent.parent) if source.is_stage else None) or {}


def asked_in_training(settings: dict) -> str:
    """An item id of the run's training file: without the setting `task`, it says what an answer is."""
    file = settings.get("data.train", "toy")
    if file == "toy":
        return NUMBER
    try:
        return load_examples(file, need_cot=False)[0].item_id
    except InputError as error:
        print(f"the answer is read as a number; --task says otherwise ({error})", file=sys.stderr)
        return NUMBER
