"""A stage's model as a Hugging Face folder that transformers loads, with a card that says what it is."""

import json
import tempfile
from pathlib import Path

import numpy as np

from reft_jax import __version__
from reft_jax.evaluation.report import markdown_table
from reft_jax.model.hf import stored_type
from reft_jax.model.hf_write import save_hf
from reft_jax.model.peft import stacked, write_peft
from reft_jax.parallel import hosts
from reft_jax.run.open import Run
from reft_jax.run.workdir import TITLES
from reft_jax.stages.models import abstract_reranker, adapters_of, checksum, done, load_model, method
from reft_jax.store import copy, origin, reading, remove, writing
from reft_jax.tasks.prompts import Prompter
from reft_jax.tasks.registry import Task
from reft_jax.types import InputError

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")  # of the base, copied along


def run_export(run: Run, name: str, out: Path, dtype: str | None = None, adapter: bool = False) -> None:
    """Writes the folder. name: a policy (its value head goes into a subfolder), or a reranker.

    dtype: of the weights; None: the base's. adapter: write the language model's adapter alone, in float32, as a PEFT
    folder. Raises InputError, SaveError.
    """
    if adapter:
        if name.startswith("rerank_"):
            raise InputError(f"--adapter: {name} is a reranker, which PEFT has no folder for; export it whole")
        lora, arrays = stacked(adapters_of(run, name))
        if hosts.is_first():
            with writing(out):
                write_peft(out, run.machine.model.config, lora, arrays, str(origin(run.inputs.base)))
        print(f"the adapter of {name} -> {out}")
        return
    licences = sorted({path for pattern in LICENCES for path in run.inputs.base.glob(pattern) if path.is_file()})
    card = model_card(run, name, [path.name for path in licences])
    params = load_model(run, name, abstract_reranker(run) if name.startswith("rerank_") else None)
    head = {key: leaf for key, leaf in params.items() if key != "lm"}  # "value_head" or "rerank_head"
    base = stored_type(run.inputs.base)
    dtype = dtype or (base if base.itemsize <= 4 else np.dtype(np.float32))  # training keeps no more
    with writing(out):
        texts = {"tokenizer": run.inputs.tokenizer, "end_id": run.inputs.prompter.frame.end}
        save_hf(out, run.machine.model, params["lm"], **texts, dtype=dtype, **head)
        try:
            if hosts.is_first():
                for path in licences:
                    copy(path, out / path.name)
                (out / "README.md").write_text(card, encoding="utf-8")
        except BaseException:
            remove(out, ignore_errors=False)  # so that the same command can run again
            raise
    print(f"{name} -> {out}")


def model_card(run: Run, name: str, licences: list[str]) -> str:
    """Base, licence notice, prompt format, stages and, if `evaluate` has seen these models, its table, as Markdown."""
    base, policy, report = run.inputs.base.name, name.removeprefix("rerank_"), run.workdir.path / "report.json"
    is_reranker = name != policy
    copied = f"Copied from there: {', '.join(licences)}."
    notice = copied if licences else "Its folder held no licence file; look it up."
    parts = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-{'classification' if is_reranker else 'generation'}\n---",
        f"# {run.config.name}: {TITLES[policy]}{' reranker' * is_reranker}",
        f"Made from {base} by reft_jax {__version__}, an implementation of ReFT (arXiv 2401.08967).",
        "## Licence",
        f"This model is derived from {base}: the licence and the use policy of {base} apply to it. {notice}",
        "## Prompt",
        prompt_format(run.inputs.prompter, run.inputs.task, is_reranker=is_reranker),
        "## Stages",
        "\n".join(f"{i}. {line}" for i, line in enumerate(stages(run, name, base), 1)),
        "## Measured",
        measured(run, report) if report.exists() else "Not evaluated yet.",
    ]
    return "\n\n".join(parts) + "\n"


def prompt_format(prompter: Prompter, task: Task, *, is_reranker: bool) -> str:
    """What the model reads, and how its answer is graded."""
    answer_format = prompter.answer_format
    if is_reranker:
        text = prompter.text("{question}", "{completion}")
        then = "Class 1 is the probability that the completion is right."
    else:
        text = prompter.text("{question}", prompter.prefix("{question}"))
        program = "The program, from `def solution():` on, is executed; the answer is what `solution()` returns."
        then = program if answer_format == "python" else f"The answer follows the last `{task.phrase}`."
    special = "with the chat template's special tokens" if prompter.frame.special else "without special tokens"
    return f"```\n{text}\n```\n\nTokenized as one string, {special}. {then}"


def stages(run: Run, name: str, base: str) -> list[str]:
    """How the model was made, one line per stage."""
    config, policy = run.config, name.removeprefix("rerank_")
    sft, result, judge = (done(run, stage) or {} for stage in ("sft", policy, name))
    first = f"SFT of {base} on {sft.get('rows', '?')} worked solutions ({config.data.format})"
    lines = [f"{first}, epoch {config.sft.warmup_epoch} of a schedule of {config.sft.epochs}."]
    if policy == "sft":
        lines = [f"{first}, best epoch ({sft.get('best', '?')} of {sft.get('epochs', '?')})."]
    elif policy == "self_train_offline":
        lines.append(f"Its correct samples and the worked solutions: {result.get('rows', '?')} rows.")
        lines.append(f"SFT of {base} on these, best epoch ({result.get('best', '?')} of {result.get('epochs', '?')}).")
    elif policy != "warmup":
        best = f"best iteration ({result.get('best', '?')} of {result.get('iterations', '?')})"
        how = f"{method(config)} on executed answers" if policy == "reft" else "online self-training"
        lines.append(f"{TITLES[policy]}: {how}, {result.get('questions', '?')} questions, {best}.")
    if name != policy:
        rows = judge.get("rows", "?")
        lines.append(f"A classifier on {rows} distinct samples of the warm-up model, from that model.")
    return [*lines, f"Checkpoints chosen on: {run.inputs.data.chosen_on}."]


def measured(run: Run, path: Path) -> str:
    """The table of report.json, if its models have not changed since. InputError if it cannot be read."""
    try:
        with reading(path):
            report = json.loads(path.read_text(encoding="utf-8"))
        before = dict(report.get("checksums", {}))
        table = markdown_table(report).rstrip()
        subject = f"{report['test_questions']} test questions, {report['n']} samples each, 95 % intervals in brackets."
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a report ({error!r}); run evaluate again, or remove it") from error
    with tempfile.TemporaryDirectory() as folder:  # this command writes nothing in the work directory
        changed = [name for name in before if checksum(run, name, Path(folder) / "checksums.json") != before[name]]
    if changed or not before:
        why = f"of another {' and '.join(changed)} than there is now" if changed else "of an older version"
        print(f"{path}: is {why}, so its table is not in the card; run evaluate first", flush=True)
        return "Not evaluated yet."
    return f"{subject}\n\n{table}"
