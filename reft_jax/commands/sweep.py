"""Evaluates many checkpoints on many data files: writes their answers to sample files, then a table per data file.

    WORKDIR/samples/DATA/MODEL.jsonl      and beside it .greedy.jsonl, .rerank.jsonl (evaluation/records.py)
    WORKDIR/sweep.md, sweep.json, sources.json, report.html

Questions that the same model has answered are not asked again, so an interrupted sweep resumes at its next question.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
from reft_jax.page.build import try_page
from reft_jax.parallel import hosts
from reft_jax.parallel.mesh import put, shardings
from reft_jax.run import lock
from reft_jax.run.guards import Guards
from reft_jax.run.inputs import Data, Inputs, checked_tokenizer, shorten
from reft_jax.run.machine import check_rows, make_machine, open_mesh, running_executor
from reft_jax.run.open import Run, Workdir, checked_settings, in_workdir
from reft_jax.run.workdir import recorded
from reft_jax.stages.models import Weights, load_saved, policy_shapes, read_adapter
from reft_jax.stages.rerank import rerank_scores
from reft_jax.stages.sample import greedy_answers, sampled
from reft_jax.store import as_path, readable, reading, write_whole
from reft_jax.tasks.answerable import wrong_anyway
from reft_jax.tasks.datasets import load_examples
from reft_jax.tasks.registry import load_task
from reft_jax.train.checkpoints import check_shapes, has_value_head
from reft_jax.train.checksums import MEMORY, model_checksum
from reft_jax.train.state import abstract_params
from reft_jax.types import Example, InputError

SOURCES = "sources.json"
RESERVED = (".greedy", ".rerank", ".jsonl")  # of the files themselves
LONGEST_NAME = 200
REPORTED = ("sample.", "seed", "data.format", "data.template", "data.system")  # settings that a report lists


class Source(NamedTuple):
    """The weights of a model: a Hugging Face folder, or the folder that a stage made (RUN/models/NAME).

    base: the folder with its config.json and tokenizer. reranker: whether it is a reranker; else it writes text.
    """

    folder: Path
    base: Path
    reranker: bool = False

    @property
    def is_stage(self) -> bool:
        return self.folder != self.base

    def checksum(self, workdir: Path) -> str:
        """The checksum of weights, config and tokenizer; `workdir` remembers those of unchanged files."""
        memory = workdir / MEMORY
        return hosts.from_first(f"checksum of {self.folder}", lambda: model_checksum(self.folder, self.base, memory))

    def tokenizer(self):
        """The tokenizer of `base`, whose folder is checked. Raises InputError."""
        return checked_tokenizer(self.base, reranker=self.reranker and not self.is_stage)

    def abstract(self, model: Llama):
        """The shapes of its parameters as a stage saves them."""
        if self.reranker:
            return abstract_params(model, RerankHead(), "rerank_head")
        return policy_shapes(model, value_head=self.is_stage and has_value_head(self.folder))

    def load(self, mesh, model: Llama, workdir: Path):
        """Reads its parameters onto the mesh: of a reranker the trunk and the head, else the language model's.

        workdir: as in `checksum`.
        """
        abstract = self.abstract(model)
        if self.is_stage:
            params = load_saved(self.folder, self.base, mesh, model, workdir / MEMORY, abstract)
            return params if self.reranker else params["lm"]
        where = shardings(mesh, abstract)
        _, lm = load_hf(self.folder, dtype=model.dtype, shardings=where["lm"], reranker=self.reranker)
        if not self.reranker:
            return lm
        return {"lm": lm, "rerank_head": put(load_rerank_head(self.folder), where["rerank_head"])}


class Checkpoint(NamedTuple):
    """A model of a sweep, with its reranker if it has one."""

    name: str
    model: Source
    reranker: Source | None

    @property
    def sources(self) -> list[Source]:
        return [self.model, self.reranker] if self.reranker else [self.model]


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
            reserved = f"reserved ({', '.join(RESERVED)}, {ASIDE}) or longer than {LONGEST_NAME} bytes"
            raise InputError(f"{flag}: the name {name!r} is {reserved}; write NAME=PATH")


def find(folder: str, *, reranker: bool = False) -> Source:
    """The model in the folder. Raises InputError if there is none.

    The contents of a Hugging Face folder are checked later. The name of a stage's model says whether it is a reranker.
    """
    path = as_path(folder).absolute()
    workdir = path.parent.parent
    settings = recorded(workdir) if path.is_dir() and path.parent.name == "models" else None
    if settings is not None and not (path / "config.json").exists():
        if path.name.startswith("rerank_") != reranker:
            kind = "no reranker" if reranker else "a reranker, which writes no text"
            raise InputError(f"{folder}: {kind}; write --models=[NAME=]FOLDER[+RERANKER]")
        families.use(str(settings.get("model.family", "")))
        base = settings.get("model.path")
        base = workdir / "toy" / "model" if base == "toy" else as_path(str(base))
        return Source(path, readable(base), reranker)
    if path.is_dir():
        path = readable(path)
        return Source(path, path, reranker)
    raise InputError(f"{folder}: neither a Hugging Face folder nor RUN/models/NAME of a work directory; check the path")


def sweep(config, workdir: Path, models: str, data: str, greedy: bool, allowed: Sequence[str]) -> list[dict]:
    """`run_sweep` of the flags --models, --data and --greedy."""
    checkpoints, files = parse_checkpoints(models), parse_data(data or config.data.test)
    if greedy and (judged := [one.name for one in checkpoints if one.reranker]):
        raise InputError(f"--greedy: the reranker of {judged[0]} would get no samples; leave out one of the two")
    return run_sweep(config, workdir.absolute(), checkpoints, files, allowed, greedy)


def run_sweep(
    config,
    workdir: Path,
    checkpoints: list[Checkpoint],
    files: dict[str, str],
    allowed: Sequence[str] = (),
    greedy: bool = False,
) -> list[dict]:
    """Answers the questions that are left, writes and prints the tables. Returns the reports, one per data file.

    `allowed` as in `open_run`. greedy: draw no samples and do not show those that are there. Raises InputError before
    anything is compiled or written.
    """
    check_names("--models", [checkpoint.name for checkpoint in checkpoints])
    config = checked_settings(config, workdir, [], allowed)
    task = load_task(config.task, config.data.reading)
    data = {
        name: shorten(load_examples(file, task, need_cot=False), config.data.test_limit, config.seed)
        for name, file in files.items()
    }
    with open_sweep(config, workdir, checkpoints) as sweep:
        sources = {f"model {one.name}": one.model.checksum(workdir) for one in checkpoints}
        sources |= {f"reranker {one.name}": one.reranker.checksum(workdir) for one in checkpoints if one.reranker}
        hosts.from_first("the models", lambda: keep_sources(workdir, sources))
        found = [answer(sweep, checkpoint, data, greedy) for checkpoint in checkpoints]
        settings = {key: value for key, value in flatten(config).items() if key.startswith(REPORTED)}
        reports = []
        for name in data:
            notes = cannot_answer(config, checkpoints, data[name])
            report = {"title": f"{config.name}: {name}", "chosen_on": "", "notes": notes, "seconds": {}}
            report |= {"settings": settings} | table([of_model[name] for of_model in found], config.seed, task)
            reports.append(report)
        if hosts.is_first():
            for report in reports:
                print_report(report)
            write_sweep(workdir, reports)
            page = ", report.html" if try_page(workdir) else ""
            print(f"\nsweep.md, sweep.json{page}: {workdir}")
    return reports


def cannot_answer(config, checkpoints: list[Checkpoint], examples: list[Example]) -> list[str]:
    """A line per tokenizer: the questions that its models cannot answer, whatever they write."""
    lines: dict[str, list[str]] = {}
    for one in checkpoints:
        prompter = unasked(config, one.model).prompter
        told = wrong_anyway(prompter, examples, config.sample.max_len, "test")
        lines.setdefault(told, []).append(one.name)
    return [f"{', '.join(names)}: {told}." for told, names in lines.items() if told]


def unasked(config, source: Source) -> Inputs:
    """The inputs of one model, without questions."""
    return Inputs(config, source.base, source.tokenizer(), Data([], [], [], ""))


def samples_file(workdir: Path, checkpoint: Checkpoint, data: str) -> Path:
    return workdir / "samples" / data / f"{checkpoint.name}.jsonl"


def keep_sources(workdir: Path, sources: dict[str, str]) -> None:
    """Records the checksum of every model and reranker by its name.

    InputError if a name belonged to another model before: that one has answers already.
    """
    path = workdir / SOURCES
    try:
        with reading(path):
            before = json.loads(path.read_text()) if path.exists() else {}
        before = {name: source for name, source in before.items() if "/" not in source}  # older versions': folders
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it, the sample files say the same") from error
    for name, source in sources.items():
        if before.get(name, source) != source:
            problem = f"{workdir} has answers of another {name} (checksum {before[name]}, now {source})"
            remedy = f"choose another NAME= or another --workdir, or remove {path}: the old answers then move aside"
            raise InputError(f"--workdir: {problem}; {remedy}")
    if before | sources != before:
        write_whole(path, json.dumps(before | sources, indent=1) + "\n")


@contextmanager
def open_sweep(config, workdir: Path, checkpoints: list[Checkpoint]) -> Iterator[Sweep]:
    """Takes the work directory, checks every model, and makes ready what all of them share."""
    sources, limits = [source for checkpoint in checkpoints for source in checkpoint.sources], config.executor
    with lock.held(workdir), Guards(config.watchdog_minutes) as guards:
        for source in sources:
            _ = unasked(config, source).prompter  # a template that does not fit is found here
        with running_executor(limits.workers, limits.memory_mb, limits.allow_unsandboxed):
            mesh = open_mesh(config)
            check_rows(config, mesh, ("rerank.micro_batch", "engine.slots"))
            for source in sources:
                if source.is_stage:
                    check_stage(source)
            with in_workdir(config, workdir, mesh) as opened:
                yield Sweep(config, opened, mesh, guards)


def check_stage(source: Source) -> None:
    """InputError unless a stage's model is a policy (or a reranker) with the shapes of its base. Reads no weights."""
    adapter, shapes = read_adapter(source.folder), source.abstract(Llama(read_config(source.base)))
    check_shapes(source.folder, trained(adapter.lora if adapter else None, shapes))


def answer(
    sweep: Sweep, checkpoint: Checkpoint, data: dict[str, list[Example]], greedy_only: bool
) -> dict[str, Answers]:
    """The greedy answers, samples and reranker scores of one model, by data file; makes those that are missing."""
    workdir = sweep.workdir.path
    paths = {name: samples_file(workdir, checkpoint, name) for name in data}
    run, weights = with_model(sweep, checkpoint.model)
    found = {}
    for name, examples in data.items():
        if (older := workdir / "samples" / f"{checkpoint.name}_{name}.jsonl").exists():
            print(f"{older}: is not used, the answers of this sweep are in {paths[name]}", flush=True)
        what = f"{checkpoint.name} on {name}"
        greedy = greedy_answers(run, paths[name], examples, weights, f"{what}, greedy")
        records = []
        if not greedy_only:
            records = sampled(run, paths[name], examples, run.config.sample.n, weights, f"{what}, samples")
        found[name] = Answers(checkpoint.name, by_item(greedy), by_item(records), {})
    if checkpoint.reranker:
        run, weights = with_model(sweep, checkpoint.reranker)
        for name, answers in found.items():
            what = f"{checkpoint.name} on {name}, rerank"
            scores = rerank_scores(run, paths[name], list(answers.samples.values()), weights, what)
            found[name] = answers._replace(probabilities=scores)
    return found


def with_model(sweep: Sweep, source: Source) -> tuple[Run, Weights]:
    """A run with this model's shape, tokenizer and engine, and its weights, which are read when first needed."""
    config, guards, inputs = sweep.config, sweep.guards, unasked(sweep.config, source)
    machine, workdir = make_machine(config, source.base, inputs.end_ids, sweep.mesh, guards.step), sweep.workdir.path
    load = functools.cache(functools.partial(source.load, sweep.mesh, machine.model, workdir))
    return Run(inputs, machine, sweep.workdir, guards), Weights(source.checksum(workdir), load)
