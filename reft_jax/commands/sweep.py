"""Evaluates many checkpoints on many data files: writes their answers to sample files, then a table per data file.

    WORKDIR/samples/DATA/MODEL.jsonl      and beside it .greedy.jsonl, .rerank.jsonl (evaluation/records.py)
    WORKDIR/sweep.md, sweep.json, sources.json

Questions that the same model has answered are not asked again, so an interrupted sweep resumes at its next question.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from reft_jax import executor
from reft_jax.commands import paths
from reft_jax.config import flatten
from reft_jax.evaluation.provenance import ASIDE
from reft_jax.evaluation.report import print_report, write_sweep
from reft_jax.evaluation.results import Answers, by_item, table
from reft_jax.model import families
from reft_jax.model.heads import RerankHead
from reft_jax.model.hf import load_hf, load_rerank_head, read_config
from reft_jax.model.llama import Llama
from reft_jax.model.lora import trained
from reft_jax.parallel import hosts
from reft_jax.parallel.compilation import keep_compiled
from reft_jax.parallel.mesh import on_mesh, put, shardings
from reft_jax.run import lock
from reft_jax.run.about import versions
from reft_jax.run.executions import ExecutionLog
from reft_jax.run.guards import Guards
from reft_jax.run.inputs import Data, Inputs, checked_tokenizer, shorten
from reft_jax.run.machine import check_rows, make_machine, open_mesh, start_executor
from reft_jax.run.open import Run, Workdir
from reft_jax.run.workdir import check_workdir, create_workdir, recorded, with_absolute_paths
from reft_jax.stages.models import Weights, load_saved, policy_shapes, read_adapter
from reft_jax.stages.rerank import rerank_scores
from reft_jax.stages.sample import greedy_answers, sampled
from reft_jax.store import write_whole
from reft_jax.tasks.answerable import wrong_anyway
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.train.checkpoints import check_shapes, has_value_head
from reft_jax.train.checksums import MEMORY, model_checksum
from reft_jax.train.state import abstract_params
from reft_jax.types import Example, InputError

SOURCES = "sources.json"
RESERVED = (".greedy", ".rerank", ".jsonl")  # of the files themselves
LONGEST_NAME = 200


class Source(NamedTuple):
    """The weights of a model: a Hugging Face folder, or the folder that a stage made (RUN/models/NAME).

    base: the folder with its config.json and tokenizer."""

    folder: Path
    base: Path

    @property
    def is_stage(self) -> bool:
        return self.folder != self.base

    def checksum(self, workdir: Path) -> str:
        """The checksum of weights, config and tokenizer; `workdir` remembers those of unchanged files."""
        memory = workdir / MEMORY
        return hosts.from_first(f"checksum of {self.folder}", lambda: model_checksum(self.folder, self.base, memory))


class Checkpoint(NamedTuple):
    """A model of a sweep, with its reranker if it has one."""

    name: str
    model: Source
    reranker: Source | None


class Sweep(NamedTuple):
    """What all models of a sweep share."""

    config: Any
    workdir: Workdir
    mesh: Any
    guards: Guards


def parse_checkpoints(text: str) -> list[Checkpoint]:
    """Parses `[NAME=]FOLDER[+RERANKER],…`; NAME is the folder's name if left out. Raises InputError."""
    checkpoints = []
    for entry in paths.listed(text, paths.is_checkpoint):
        name, folders = paths.named(entry)
        folder, reranker = paths.with_reranker(folders)
        judge = find(reranker, reranker=True) if reranker else None
        checkpoints.append(Checkpoint(name or Path(folder).name, find(folder), judge))
    return checkpoints


def parse_data(text: str) -> dict[str, str]:
    """Parses `[NAME=]FILE,…` to {name: file}; NAME is the file's name without suffix if left out."""
    pairs = [paths.named(entry) for entry in paths.listed(text, paths.is_data)]
    names = [name or Path(file).stem for name, file in pairs]
    check_names("--data", names)
    return {name: file for name, (_, file) in zip(names, pairs, strict=True)}


def check_names(flag: str, names: list[str]) -> None:
    """InputError unless every name is a valid file name and no two are equal."""
    distinct = len({name.casefold() for name in names}) == len(names)  # some file systems ignore case
    if not distinct or not all(names) or any("/" in name or name.startswith(".") for name in names):
        raise InputError(
            f"{flag}: the names {', '.join(names)} must differ, not begin with '.' and have no '/'; write NAME=PATH"
        )
    for name in names:
        if name.endswith(RESERVED) or name == ASIDE or len(name.encode()) > LONGEST_NAME:
            raise InputError(
                f"{flag}: the name {name!r} is reserved ({', '.join(RESERVED)}, {ASIDE}) or longer than {LONGEST_NAME} "
                "bytes; write NAME=PATH"
            )


def find(folder: str, *, reranker: bool = False) -> Source:
    """The model in the folder. Raises InputError if there is none.

    The contents of a Hugging Face folder are checked later. The name of a stage's model says whether it is a reranker.
    """
    path = Path(folder).absolute()
    workdir = path.parent.parent
    settings = recorded(workdir) if path.is_dir() and path.parent.name == "models" else None
    if settings is not None and not (path / "config.json").exists():
        if path.name.startswith("rerank_") != reranker:
            kind = "no reranker" if reranker else "a reranker, which writes no text"
            raise InputError(f"{folder}: {kind}; write --models=[NAME=]FOLDER[+RERANKER]")
        families.use(str(settings.get("model.family", "")))
        base = settings.get("model.path")
        return Source(path, workdir / "toy" / "model" if base == "toy" else Path(str(base)))
    if path.is_dir():
        return Source(path, path)
    raise InputError(f"{folder}: neither a Hugging Face folder nor RUN/models/NAME of a work directory; check the path")


def sweep(config, workdir: Path, models: str, data: str, allowed: Sequence[str]) -> list[dict]:
    """`run_sweep` of the flags --models and --data."""
    checkpoints, files = parse_checkpoints(models), parse_data(data or config.data.test)
    return run_sweep(config, workdir.absolute(), checkpoints, files, allowed)


def run_sweep(
    config, workdir: Path, checkpoints: list[Checkpoint], files: dict[str, str], allowed: Sequence[str] = ()
) -> list[dict]:
    """Answers the questions that are left, writes and prints the tables. Returns the reports, one per data file.

    `allowed` as in `open_run`. Raises InputError before anything is compiled or written.
    """
    hosts.agree("the command", workdir=str(workdir), **flatten(config), **versions())
    lock.look(workdir)
    config = with_absolute_paths(config, workdir)
    check_names("--models", [checkpoint.name for checkpoint in checkpoints])
    check_workdir(config, workdir, [], allowed)
    families.use(config.model.family)
    task = load_task(config.task)
    data = {
        name: shorten(load_examples(file, task, need_cot=False), config.data.test_limit, config.seed)
        for name, file in files.items()
    }
    with lock.held(workdir):
        return _swept(config, workdir, checkpoints, data)


def _swept(config, workdir: Path, checkpoints: list[Checkpoint], data: dict[str, list[Example]]) -> list[dict]:
    with (
        Guards(config.watchdog_minutes) as guards,
        open_sweep(config, workdir, checkpoints, guards) as sweep,
    ):
        sources = {f"model {one.name}": one.model.checksum(workdir) for one in checkpoints}
        sources |= {f"reranker {one.name}": one.reranker.checksum(workdir) for one in checkpoints if one.reranker}
        hosts.from_first("the models", lambda: keep_sources(workdir, sources))
        found = [answer(sweep, checkpoint, data) for checkpoint in checkpoints]
    reports = []
    for name in data:
        answers = [of_model[name] for of_model in found]
        notes = cannot_answer(config, checkpoints, data[name])
        report = {"title": f"{config.name}: {name}", "chosen_on": "", "notes": notes, "seconds": {}}
        settings = {key: value for key, value in flatten(config).items() if key.startswith(("sample.", "seed"))}
        reports.append(report | {"settings": settings} | table(answers, config.seed, load_task(config.task)))
    if hosts.is_first():
        for report in reports:
            print_report(report)
        write_sweep(workdir, reports)
        print(f"\nsweep.md, sweep.json: {workdir}")
    return reports


def cannot_answer(config, checkpoints: list[Checkpoint], examples: list[Example]) -> list[str]:
    """A line per tokenizer: the questions that its models cannot answer, whatever they write."""
    lines: dict[str, list[str]] = {}
    for one in checkpoints:
        tok, limits = load_tokenizer(one.model.base), (config.data.format, config.sample.max_len)
        told = wrong_anyway(tok, examples, *limits, "test", load_task(config.task))
        lines.setdefault(told, []).append(one.name)
    return [f"{', '.join(names)}: {told}." for told, names in lines.items() if told]


def samples_file(workdir: Path, checkpoint: Checkpoint, data: str) -> Path:
    return workdir / "samples" / data / f"{checkpoint.name}.jsonl"


def keep_sources(workdir: Path, sources: dict[str, str]) -> None:
    """Records the checksum of every model and reranker by its name.

    InputError if a name belonged to another model before: that one has answers already."""
    path = workdir / SOURCES
    try:
        before = json.loads(path.read_text()) if path.exists() else {}
        before = {name: source for name, source in before.items() if "/" not in source}  # older versions': folders
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, the sample files say the same") from error
    for name, source in sources.items():
        if before.get(name, source) != source:
            raise InputError(
                f"--workdir: {workdir} has answers of another {name} (checksum {before[name]}, now {source}); choose "
                f"another NAME= or another work directory, or remove {path}: the old answers then move aside"
            )
    if before | sources != before:
        write_whole(path, json.dumps(before | sources, indent=1) + "\n")


@contextmanager
def open_sweep(config, workdir: Path, checkpoints: list[Checkpoint], guards: Guards) -> Iterator[Sweep]:
    """Checks every model, then makes ready what all of them share."""
    for checkpoint in checkpoints:
        checked_tokenizer(checkpoint.model.base)
        if checkpoint.reranker:
            checked_tokenizer(checkpoint.reranker.base, reranker=not checkpoint.reranker.is_stage)
    start_executor(config.executor.workers, config.executor.memory_mb, config.executor.allow_unsandboxed)
    try:
        mesh = open_mesh(config)
        check_rows(config, mesh, ("rerank.micro_batch", "engine.slots"))
        for checkpoint in checkpoints:
            for source in filter(None, (checkpoint.model, checkpoint.reranker)):
                if source.is_stage:
                    check_stage(source, reranker=source is checkpoint.reranker)
        create_workdir(config, workdir)
        hosts.log_to(workdir / "logs")
        keep_compiled(Path(config.compiled or workdir / "compiled"))
        with on_mesh(mesh):
            yield Sweep(config, Workdir(workdir, ExecutionLog(workdir)), mesh, guards)
    finally:
        executor.shutdown()


def check_stage(source: Source, *, reranker: bool) -> None:
    """InputError unless a stage's model is a policy (or a reranker) with the shapes of its base. Reads no weights."""
    adapter, shapes = (
        read_adapter(source.folder),
        stored_shapes(source, Llama(read_config(source.base)), reranker=reranker),
    )
    check_shapes(source.folder, trained(adapter.lora if adapter else None, shapes))


def stored_shapes(source: Source, model: Llama, *, reranker: bool):
    """The shapes of a stage's model: a reranker, or a policy with or without a value head."""
    if reranker:
        return abstract_params(model, RerankHead(), "rerank_head")
    return policy_shapes(model, value_head=source.is_stage and has_value_head(source.folder))


def answer(sweep: Sweep, checkpoint: Checkpoint, data: dict[str, list[Example]]) -> dict[str, Answers]:
    """The greedy answers, samples and reranker scores of one model, by data file; makes those that are missing."""
    workdir = sweep.workdir.path
    paths = {name: samples_file(workdir, checkpoint, name) for name in data}
    run, weights = with_model(sweep, checkpoint.model, reranker=False)
    found = {}
    for name, examples in data.items():
        if (older := workdir / "samples" / f"{checkpoint.name}_{name}.jsonl").exists():
            print(f"{older}: is not used, the answers of this sweep are in {paths[name]}", flush=True)
        what = f"{checkpoint.name} on {name}"
        greedy = greedy_answers(run, paths[name], examples, weights, f"{what}, greedy")
        records = sampled(run, paths[name], examples, run.config.sample.n, weights, f"{what}, samples")
        found[name] = Answers(checkpoint.name, by_item(greedy), by_item(records), {})
    if checkpoint.reranker:
        run, weights = with_model(sweep, checkpoint.reranker, reranker=True)
        for name, answers in found.items():
            what = f"{checkpoint.name} on {name}, rerank"
            scores = rerank_scores(run, paths[name], list(answers.samples.values()), weights, what)
            found[name] = answers._replace(probabilities=scores)
    return found


def with_model(sweep: Sweep, source: Source, *, reranker: bool) -> tuple[Run, Weights]:
    """A run with this model's shape, tokenizer and engine, and its weights, which are read when first needed."""
    config, mesh, guards = sweep.config, sweep.mesh, sweep.guards
    tokenizer = checked_tokenizer(source.base, reranker=reranker and not source.is_stage)
    inputs = Inputs(config, source.base, tokenizer, Data([], [], [], ""))
    run = Run(inputs, make_machine(config, source.base, tokenizer, mesh, guards.step), sweep.workdir, guards)
    abstract = stored_shapes(source, run.machine.model, reranker=reranker)

    @functools.cache
    def load() -> dict:
        if source.is_stage:
            memory = sweep.workdir.path / MEMORY
            params = load_saved(source.folder, source.base, mesh, run.machine.model, memory, abstract)
            return params if reranker else params["lm"]
        where = shardings(mesh, abstract)
        _, lm = load_hf(source.folder, dtype=run.machine.model.dtype, shardings=where["lm"], reranker=reranker)
        return {"lm": lm, "rerank_head": put(load_rerank_head(source.folder), where["rerank_head"])} if reranker else lm

    return run, Weights(source.checksum(sweep.workdir.path), load)
