"""Many checkpoints on many data files in one command: answers into sample files, then a table a data file.

    WORKDIR/samples/DATA/MODEL.jsonl      and beside it .greedy.jsonl, .rerank.jsonl (evaluation/records.py)
    WORKDIR/sweep.md, sweep.json, sources.json

What the same model has answered is not asked again, so an interrupted sweep resumes where it was, to the question.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from reft_jax import executor
from reft_jax.commands import paths
from reft_jax.config import flatten
from reft_jax.evaluation.provenance import ASIDE
from reft_jax.evaluation.report import print_report, write_sweep
from reft_jax.evaluation.results import Answers, by_item, table
from reft_jax.parallel import hosts
from reft_jax.run import lock
from reft_jax.run.about import versions
from reft_jax.run.executions import ExecutionLog
from reft_jax.run.guards import Guards
from reft_jax.run.open import (
    Data,
    Run,
    check_rows,
    checked_tokenizer,
    make_engine,
    open_mesh,
    shorten,
    start_executor,
)
from reft_jax.run.workdir import check_workdir, create_workdir, recorded, with_absolute_paths
from reft_jax.store import write_whole
from reft_jax.tasks.answerable import wrong_anyway
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.tokenizer import load_tokenizer
from reft_jax.types import Example, InputError

if TYPE_CHECKING:
    from reft_jax.stages.models import Weights

SOURCES = "sources.json"
RESERVED = (".greedy", ".rerank", ".jsonl")  # of the files themselves
LONGEST_NAME = 200


class Source(NamedTuple):
    """Weights: a Hugging Face folder, or the folder that a stage made (RUN/models/NAME); `base` has its config.json
    and tokenizer."""

    folder: Path
    base: Path

    @property
    def is_stage(self) -> bool:
        return self.folder != self.base

    def checksum(self, run: Run) -> str:
        """Of weights, config and tokenizer, wherever they lie."""
        from reft_jax.train.checksums import MEMORY, model_checksum

        memory = run.workdir / MEMORY
        return hosts.from_first(f"checksum of {self.folder}", lambda: model_checksum(self.folder, self.base, memory))


class Checkpoint(NamedTuple):
    """A model of a sweep, with its reranker if it has one."""

    name: str
    model: Source
    reranker: Source | None


def parse_checkpoints(text: str) -> list[Checkpoint]:
    """Of `[NAME=]FOLDER[+RERANKER],…`; without NAME it is that of the folder. Raises InputError."""
    checkpoints = []
    for entry in paths.listed(text, paths.is_checkpoint):
        name, folders = paths.named(entry)
        folder, reranker = paths.with_reranker(folders)
        judge = find(reranker, reranker=True) if reranker else None
        checkpoints.append(Checkpoint(name or Path(folder).name, find(folder), judge))
    return checkpoints


def parse_data(text: str) -> dict[str, str]:
    """{name: file} of `[NAME=]FILE,…`; without NAME it is the file's, without its suffix."""
    pairs = [paths.named(entry) for entry in paths.listed(text, paths.is_data)]
    names = [name or Path(file).stem for name, file in pairs]
    check_names("--data", names)
    return {name: file for name, (_, file) in zip(names, pairs, strict=True)}


def check_names(flag: str, names: list[str]) -> None:
    """InputError unless every name can be that of a file or folder of its own."""
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
    """Raises InputError unless there is a model in the folder, of either kind.

    What a Hugging Face folder holds is looked at later; of a stage's model the name says whether it is a reranker.
    """
    path = Path(folder).absolute()
    workdir = path.parent.parent
    settings = recorded(workdir) if path.is_dir() and path.parent.name == "models" else None
    if settings is not None and not (path / "config.json").exists():
        if path.name.startswith("rerank_") != reranker:
            kind = "no reranker" if reranker else "a reranker, which writes no text"
            raise InputError(f"{folder}: {kind}; write --models=[NAME=]FOLDER[+RERANKER]")
        base = settings.get("model.path")
        return Source(path, workdir / "toy" / "model" if base == "toy" else Path(str(base)))
    if path.is_dir():
        return Source(path, path)
    raise InputError(f"{folder}: neither a Hugging Face folder nor RUN/models/NAME of a work directory; check the path")


def run_sweep(
    config, workdir: Path, checkpoints: list[Checkpoint], files: dict[str, str], allowed: Sequence[str] = ()
) -> list[dict]:
    """Answers what is not answered yet, writes and prints the tables. Returns the reports, one a data file.

    `allowed` as in `open_run`. Raises InputError before anything is compiled or written.
    """
    hosts.agree("the command", workdir=str(workdir), **flatten(config), **versions())
    lock.look(workdir)
    config = with_absolute_paths(config, workdir)
    check_names("--models", [checkpoint.name for checkpoint in checkpoints])
    check_workdir(config, workdir, [], allowed)
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
        open_sweep(config, workdir, checkpoints, guards) as run,
    ):
        sources = {f"model {one.name}": one.model.checksum(run) for one in checkpoints}
        sources |= {f"reranker {one.name}": one.reranker.checksum(run) for one in checkpoints if one.reranker}
        hosts.from_first("the models", lambda: keep_sources(workdir, sources))
        found = [answer(run, checkpoint, data) for checkpoint in checkpoints]
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
    """A line a model: the questions that it cannot answer, whatever it writes. Models of one tokenizer say the same."""
    lines: dict[str, list[str]] = {}
    for one in checkpoints:
        tok, limits = load_tokenizer(one.model.base), (config.data.format, config.sample.max_len)
        told = wrong_anyway(tok, examples, *limits, "test", load_task(config.task))
        lines.setdefault(told, []).append(one.name)
    return [f"{', '.join(names)}: {told}." for told, names in lines.items() if told]


def samples_file(workdir: Path, checkpoint: Checkpoint, data: str) -> Path:
    return workdir / "samples" / data / f"{checkpoint.name}.jsonl"


def keep_sources(workdir: Path, sources: dict[str, str]) -> None:
    """Records the checksum of every model and reranker by its name. InputError if a name stood for another one before:
    it has answers already."""
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
def open_sweep(config, workdir: Path, checkpoints: list[Checkpoint], guards: Guards) -> Iterator[Run]:
    """A run without model, tokenizer and training data, as far as that can be made ready."""
    for checkpoint in checkpoints:
        checked_tokenizer(checkpoint.model.base)
        if checkpoint.reranker:
            checked_tokenizer(checkpoint.reranker.base, reranker=not checkpoint.reranker.is_stage)
    start_executor(config.executor.workers, config.executor.memory_mb, config.executor.allow_unsandboxed)
    try:
        from reft_jax.parallel.compilation import keep_compiled
        from reft_jax.parallel.mesh import on_mesh

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
            run = Run(config, workdir, Path(), None, Data([], [], [], ""), mesh=mesh, executions=ExecutionLog(workdir))
            run.guards = guards
            yield run
    finally:
        executor.shutdown()


def check_stage(source: Source, *, reranker: bool) -> None:
    """Reads no weights. InputError unless what a stage made is a policy, or a reranker, with its base's shapes."""
    from reft_jax.model.heads import RerankHead, ValueHead
    from reft_jax.model.hf import read_config
    from reft_jax.model.llama import Llama
    from reft_jax.train.checkpoints import check_shapes
    from reft_jax.train.state import abstract_params

    head = (RerankHead(), "rerank_head") if reranker else (ValueHead(), "value_head")
    check_shapes(source.folder, abstract_params(Llama(read_config(source.base)), *head))


def answer(run: Run, checkpoint: Checkpoint, data: dict[str, list[Example]]) -> dict[str, Answers]:
    """Greedy answers, samples and the reranker's scores of one model to every data file, by the file's name; made as
    far as they are missing."""
    from reft_jax.stages.rerank import rerank_scores
    from reft_jax.stages.sample import greedy_answers, sampled

    paths = {name: samples_file(run.workdir, checkpoint, name) for name in data}
    run, weights = with_model(run, checkpoint.model, reranker=False)
    found = {}
    for name, examples in data.items():
        if (older := run.workdir / "samples" / f"{checkpoint.name}_{name}.jsonl").exists():
            print(f"{older}: is not used, the answers of this sweep are in {paths[name]}", flush=True)
        what = f"{checkpoint.name} on {name}"
        greedy = greedy_answers(run, paths[name], examples, weights, f"{what}, greedy")
        records = sampled(run, paths[name], examples, run.config.sample.n, weights, f"{what}, samples")
        found[name] = Answers(checkpoint.name, by_item(greedy), by_item(records), {})
    if checkpoint.reranker:
        run, weights = with_model(run, checkpoint.reranker, reranker=True)
        for name, answers in found.items():
            what = f"{checkpoint.name} on {name}, rerank"
            scores = rerank_scores(run, paths[name], list(answers.samples.values()), weights, what)
            found[name] = answers._replace(probabilities=scores)
    return found


def with_model(run: Run, source: Source, *, reranker: bool) -> "tuple[Run, Weights]":
    """The run with this model's shape, tokenizer and engine, and its weights, read when they are first needed."""
    import functools

    import jax.numpy as jnp

    from reft_jax.model.hf import load_hf, load_rerank_head, read_config
    from reft_jax.model.llama import Llama
    from reft_jax.parallel.mesh import abstract_arrays, put, shardings
    from reft_jax.stages.models import Weights, abstract_policy, abstract_reranker
    from reft_jax.train.checkpoints import load_params

    config = run.config
    model = Llama(read_config(source.base), dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
    tokenizer = checked_tokenizer(source.base, reranker=reranker and not source.is_stage)
    run = replace(run, base=source.base, tokenizer=tokenizer, model=model)
    run.engine = make_engine(run)
    abstract = abstract_reranker(run) if reranker else abstract_policy(run)

    @functools.cache
    def load() -> dict:
        if source.is_stage:
            params = load_params(source.folder, abstract_arrays(run.mesh, abstract))
            return params if reranker else params["lm"]
        where = shardings(run.mesh, abstract)
        _, lm = load_hf(source.folder, dtype=model.dtype, shardings=where["lm"], reranker=reranker)
        return {"lm": lm, "rerank_head": put(load_rerank_head(source.folder), where["rerank_head"])} if reranker else lm

    return run, Weights(source.checksum(run), load)
