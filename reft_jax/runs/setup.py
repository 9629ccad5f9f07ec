"""What every command needs before its first step: checked settings, data, tokenizer, devices, model, engine.

The order matters: everything cheap that can be wrong is looked at first, and nothing is written before it was found
right; programs' workers start before JAX takes its devices, and only then come weights and compiles.
"""

import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from reft_jax import __version__, executor
from reft_jax.config import flatten, to_json
from reft_jax.runs.executions import ExecutionLog
from reft_jax.task import datasets, prompts
from reft_jax.task.tokenizer import check_vocabulary, decode, encode, encode_rollout, load_tokenizer
from reft_jax.types import Completion, Example, InputError, Prompt

PACKAGES = "jax jaxlib flax optax orbax-checkpoint transformers datasets numpy ml_collections".split()


@dataclass
class Data:
    """The examples of a run; `chosen_on` says in words what `dev` is."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    chosen_on: str


@dataclass
class Run:
    """One work directory with everything in it made ready.

    `sft` are the rows of `sft_rows`, `questions` the examples of `ppo_examples`; `programs` counts what became of the
    completions' programs.
    """

    config: object
    workdir: Path
    base: Path
    tokenizer: object
    data: Data
    sft: list[tuple[list[int], int]] = ()
    questions: list[Example] = ()
    mesh: object = None
    model: object = None
    engine: object = None
    executions: ExecutionLog | None = None
    programs: Counter = field(default_factory=Counter)

    def prompts(self, examples: list[Example], n: int = 1) -> list[Prompt]:
        """n prompts of each example, the forced prefix included."""
        made = []
        for example in examples:
            tokens = np.array(encode_rollout(self.tokenizer, example.question, self.config.data.engine), np.int32)
            made += [Prompt(example.item_id, sample, tokens) for sample in range(n)]
        return made

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """The completion as text. Prompt and response are decoded together (see prompts.completion_text)."""
        return prompts.completion_text(decode(self.tokenizer, [*prompt.tokens, *completion.tokens]))


def check_workdir(config, workdir: Path, needs: list[str]) -> None:
    """Writes nothing. InputError unless `workdir` can be written and, where it was used before, was so with `config`.

    `needs` are the models that earlier stages must have made in it.
    """
    check_writable("--workdir", workdir)
    path = workdir / "config.json"
    if path.exists():
        try:
            before, now = dict(json.loads(path.read_text())), json.loads(to_json(config))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: not the settings of a run ({error}); choose another --workdir") from error
        changed = [f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in before | now if before.get(k) != now.get(k)]
        if changed:
            raise InputError(
                f"--workdir: {workdir} was made with other settings ({'; '.join(changed)}); choose another"
            )
    for name in needs:
        if not (workdir / "models" / name).exists():
            raise InputError(
                f"--workdir: {workdir} has no model {name!r}; run `pipeline`, or the command that makes it, there first"
            )


def check_writable(flag: str, folder: Path) -> None:
    """Writes nothing. InputError unless `folder`, or what it would be made in, is a folder that can be written."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag}: cannot write to {folder} ({there} is no writable folder); choose another")


def create_workdir(config, workdir: Path) -> None:
    """Makes the work directory, if it is new, and records config and versions."""
    if (workdir / "config.json").exists():
        return
    versions = {"reft_jax": __version__, "python": platform.python_version()} | {
        name: version(name) for name in PACKAGES
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
        (workdir / "config.json").write_text(to_json(config) + "\n")  # last: from here on the directory is in use
    except OSError as error:
        raise InputError(f"--workdir: cannot write to {workdir} ({error.strerror}); choose another") from error


def load_data(config, paths: dict[str, str]) -> Data:
    """The three splits, shortened as the config says. `paths` has train, dev ("" if there is none) and test."""
    data = config.data
    train = shorten(datasets.load_examples(paths["train"], need_cot=True), data.train_limit, config.seed)
    test = shorten(datasets.load_examples(paths["test"], need_cot=False), data.test_limit, config.seed)
    if shared := datasets.shared_questions(train, test):
        print(f"{shared} training questions are test questions too", flush=True)
    if paths["dev"]:
        return Data(train, datasets.load_examples(paths["dev"], need_cot=False), test, "a third split")
    if data.dev_rows:
        if data.dev_rows >= len(train):
            raise InputError(f"config: data.dev_rows={data.dev_rows} leaves none of {len(train)} training rows")
        train, dev = datasets.split_off(train, data.dev_rows, config.seed)
        return Data(train, dev, test, "a third split, held out of the training file")
    return Data(train, test, test, "the test file, as the paper did")


def shorten(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """The first `limit` of a seeded shuffle, in file order; all if limit is 0."""
    if not limit or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(np.random.default_rng(seed).permutation(len(examples))[:limit])]


def sft_rows(run: Run) -> list[tuple[list[int], int]]:
    """Training rows that fit: (ids of prompt + target + EOS, prompt length). Tokenized apart, as the authors do."""
    rows, config = [], run.config
    for example in run.data.train:
        prompt = encode(run.tokenizer, prompts.prompt_text(example.question))
        target = encode(run.tokenizer, prompts.sft_target(example, config.data.engine))
        rows.append((prompt + target + [run.tokenizer.eos_token_id], len(prompt)))
    lengths = [len(row) for row, _ in rows]
    return datasets.fit(rows, lengths, config.sft.max_len, config.data.max_dropped, "sft.max_len")


def ppo_examples(run: Run) -> list[Example]:
    """Training questions whose prompt fits; never trained on a cut one."""
    lengths, config = [len(prompt.tokens) for prompt in run.prompts(run.data.train)], run.config
    return datasets.fit(run.data.train, lengths, config.ppo.max_prompt, config.data.max_dropped, "ppo.max_prompt")


def tokenized(run: Run) -> Run:
    """Fills in `sft` and `questions`; a limit that drops too many rows ends the run here, not after an hour of SFT."""
    run.sft, run.questions = sft_rows(run), ppo_examples(run)
    return run


def start_executor(workers: int, memory_mb: int, allow_unsandboxed: bool) -> None:
    """Before JAX; says on stderr what guards a program. InputError if nothing does and that is not allowed."""
    try:
        print(executor.start(workers, memory_mb, allow_unsandboxed), file=sys.stderr, flush=True)
    except executor.UnprotectedError as error:
        raise InputError(str(error)) from error


def checked_tokenizer(folder: Path):
    """The tokenizer of a model folder, after its tensors' headers and its vocabulary were looked at. InputError."""
    from reft_jax.model.hf import check_folder

    vocab_size = check_folder(folder).vocab_size
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    return tokenizer


def open_mesh(config):
    """The config's mesh over this process's devices; JAX takes them here. InputError."""
    import jax

    from reft_jax.parallel.mesh import make_mesh

    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    if jax.process_count() > 1:
        raise InputError("several processes in one run are not supported; start it on one host")
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def check_rows(config, mesh) -> None:
    """InputError unless what is spread by row divides evenly among the mesh's row shards."""
    from reft_jax.parallel.mesh import row_shards

    for key in ("sft.micro_batch", "ppo.micro_batch", "rerank.micro_batch", "engine.slots"):
        if flatten(config)[key] % row_shards(mesh):
            raise InputError(f"config: {key} must be a multiple of the {row_shards(mesh)} row shards of the mesh")


@contextmanager
def open_run(config, workdir: Path, needs: list[str]) -> Iterator[Run]:
    """Everything made ready, in the order that finds mistakes first; the workers are stopped at the end."""
    workdir = workdir.absolute()
    check_workdir(config, workdir, needs)
    toy = config.model.path == "toy"
    if not toy:
        base = Path(config.model.path)
        data = load_data(config, {"train": config.data.train, "dev": config.data.dev, "test": config.data.test})
        run = tokenized(Run(config, workdir, base, checked_tokenizer(base), data))
    start_executor(config.executor.workers, config.executor.memory_mb, config.executor.allow_unsandboxed)
    try:
        import jax

        from reft_jax.engine.generate import Engine
        from reft_jax.model.heads import ValueHead
        from reft_jax.model.hf import read_config
        from reft_jax.model.llama import Llama
        from reft_jax.parallel.compilation import keep_compiled
        from reft_jax.parallel.mesh import check_divides, on_mesh
        from reft_jax.train.state import abstract_params

        mesh = open_mesh(config)
        check_rows(config, mesh)
        if toy:
            from reft_jax.runs.toy import write_data, write_model

            if not (workdir / "config.json").exists():  # what a start with other settings may have left
                shutil.rmtree(workdir / "toy", ignore_errors=True)
            data = load_data(config, write_data(config, workdir / "toy"))
            base = workdir / "toy" / "model"
            write_model(config, data.train, base)
            run = tokenized(Run(config, workdir, base, load_tokenizer(base), data))
        model = Llama(read_config(base), dtype=jax.numpy.dtype(config.model.dtype), remat=config.model.remat)
        check_divides(mesh, abstract_params(model, ValueHead(), "value_head"))
        create_workdir(config, workdir)
        keep_compiled(Path(config.compiled or workdir / "compiled"))
        run.mesh, run.model, run.executions = mesh, model, ExecutionLog(workdir)
        run.engine = Engine(
            model,
            mesh,
            slots=config.engine.slots,
            pad_multiple=config.data.pad_multiple,
            eos_id=run.tokenizer.eos_token_id,
            seed=config.seed,
        )
        with on_mesh(mesh):
            yield run
    finally:
        executor.shutdown()
