"""Many checkpoints on many data files in one command: answers into sample files, then a table a data file.

    WORKDIR/samples/MODEL_DATA.jsonl      and beside it .greedy.jsonl, .rerank.jsonl (task/records.py)
    WORKDIR/sweep.md, sweep.json

What is in the files is not made again, so an interrupted sweep goes on where it was, to the question.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from reft_jax import executor
from reft_jax.config import flatten
from reft_jax.parallel import hosts
from reft_jax.runs import lock, paths
from reft_jax.runs.about import versions
from reft_jax.runs.executions import ExecutionLog
from reft_jax.runs.guards import Guards
from reft_jax.runs.report import print_report, write_sweep
from reft_jax.runs.results import read_answers, table
from reft_jax.runs.setup import (
    Data,
    Run,
    check_rows,
    check_workdir,
    checked_tokenizer,
    create_workdir,
    make_engine,
    open_mesh,
    recorded,
    shorten,
    start_executor,
    with_absolute_paths,
)
from reft_jax.store import write_whole
from reft_jax.task.answerable import wrong_anyway
from reft_jax.task.datasets import load_examples
from reft_jax.task.records import read_lines
from reft_jax.task.tokenizer import load_tokenizer
from reft_jax.types import Example, InputError

SOURCES = "sources.json"


class Source(NamedTuple):
    """Weights: a Hugging Face folder, or the folder that a stage made (RUN/models/NAME); `base` has its config.json
    and tokenizer."""

    folder: Path
    base: Path

    @property
    def is_stage(self) -> bool:
        return self.folder != self.base


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
    if len(set(names)) < len(names) or not all(names) or any("/" in name for name in names):
        raise InputError(f"{flag}: the names {', '.join(names)} must differ and have no '/'; write NAME=PATH")


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
    data = {
        name: shorten(load_examples(file, need_cot=False), config.data.test_limit, config.seed)
        for name, file in files.items()
    }
    sources = {f"model {one.name}": str(one.model.folder) for one in checkpoints}
    sources |= {f"reranker {one.name}": str(one.reranker.folder) for one in checkpoints if one.reranker}
    sources |= {f"data {name}": digest(examples) for name, examples in data.items()}
    hosts.agree("the sweep", **sources)
    with lock.held(workdir):
        return _swept(config, workdir, checkpoints, data, sources)


def _swept(
    config, workdir: Path, checkpoints: list[Checkpoint], data: dict[str, list[Example]], sources: dict[str, str]
) -> list[dict]:
    with (
        Guards(config.watchdog_minutes) as guards,
        open_sweep(config, workdir, checkpoints, known_sources(workdir, sources), guards) as run,
    ):
        for checkpoint in checkpoints:
            answer(replace(run, base=checkpoint.model.base), checkpoint, data)
    reports = []
    for name in data:
        answers = [read_answers(one.name, samples_file(workdir, one, name)) for one in checkpoints]
        notes = cannot_answer(config, checkpoints, data[name])
        report = {"title": f"{config.name}: {name}", "chosen_on": "", "notes": notes, "seconds": {}}
        settings = {key: value for key, value in flatten(config).items() if key.startswith(("sample.", "seed"))}
        reports.append(report | {"settings": settings} | table(answers, config.seed))
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
        tok, limits = load_tokenizer(one.model.base), (config.data.engine, config.sample.max_len)
        lines.setdefault(wrong_anyway(tok, examples, *limits, "test"), []).append(one.name)
    return [f"{', '.join(names)}: {told}." for told, names in lines.items() if told]


def samples_file(workdir: Path, checkpoint: Checkpoint, data: str) -> Path:
    return workdir / "samples" / f"{checkpoint.name}_{data}.jsonl"


def digest(examples: list[Example]) -> str:
    return hashlib.sha256(json.dumps(examples).encode()).hexdigest()[:16]


def known_sources(workdir: Path, sources: dict[str, str]) -> dict[str, str]:
    """These and the earlier ones; InputError if a name stood for another folder, or for other questions, before."""
    path = workdir / SOURCES
    before = json.loads(path.read_text()) if path.exists() else {}
    for name, source in sources.items():
        if before.get(name, source) != source:
            raise InputError(
                f"--workdir: {workdir} has answers of another {name} ({before[name]}, now {source}); choose another "
                "work directory or another NAME="
            )
    return before | sources


@contextmanager
def open_sweep(
    config, workdir: Path, checkpoints: list[Checkpoint], sources: dict[str, str], guards: Guards
) -> Iterator[Run]:
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
        if hosts.is_first():
            write_whole(workdir / SOURCES, json.dumps(sources, indent=1) + "\n")
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


def answer(run: Run, checkpoint: Checkpoint, data: dict[str, list[Example]]) -> None:
    """Greedy answers, samples and the reranker's scores of one model to every data file, as far as they are missing."""
    from reft_jax.runs.rerank import rerank_scores
    from reft_jax.runs.sample import greedy_answers, sampled

    files = {name: samples_file(run.workdir, checkpoint, name) for name in data}
    run, load = with_model(run, checkpoint.model, reranker=False)
    for name, examples in data.items():
        what = f"{checkpoint.name} on {name}"
        greedy_answers(run, files[name], examples, lambda: load()["lm"], f"{what}, greedy")
        sampled(run, files[name], examples, run.config.sample.n, lambda: load()["lm"], f"{what}, samples")
    if checkpoint.reranker:
        run, load = with_model(run, checkpoint.reranker, reranker=True)
        for name, path in files.items():
            rerank_scores(run, path, read_lines(path), load, f"{checkpoint.name} on {name}, rerank")


def with_model(run: Run, source: Source, *, reranker: bool) -> tuple[Run, Callable[[], dict]]:
    """The run with this model's shape, tokenizer and engine, and what reads its weights when they are first needed."""
    import functools

    import jax.numpy as jnp

    from reft_jax.model.hf import load_hf, load_rerank_head, read_config
    from reft_jax.model.llama import Llama
    from reft_jax.parallel.mesh import abstract_arrays, put, shardings
    from reft_jax.runs.stages import abstract_policy, abstract_reranker
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
            return load_params(source.folder, abstract_arrays(run.mesh, abstract))
        where = shardings(run.mesh, abstract)
        _, lm = load_hf(source.folder, dtype=model.dtype, shardings=where["lm"], reranker=reranker)
        if not reranker:
            return {"lm": lm}
        return {"lm": lm, "rerank_head": put(load_rerank_head(source.folder), where["rerank_head"])}

    return run, load
