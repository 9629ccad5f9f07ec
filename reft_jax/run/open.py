"""What every command needs before its first step: checked settings, data, tokenizer, devices, model, engine.

The order matters: everything cheap that can be wrong is looked at first, and nothing is written before it was found
right; programs' workers start before JAX takes its devices, and only then come weights and compiles.
"""

import hashlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from reft_jax import executor
from reft_jax.config import flatten
from reft_jax.evaluation.provenance import examples_checksum
from reft_jax.model_folder import check_ids
from reft_jax.parallel import hosts
from reft_jax.run import lock
from reft_jax.run.about import versions
from reft_jax.run.executions import ExecutionLog
from reft_jax.run.guards import Guards
from reft_jax.run.watch import Silence
from reft_jax.run.workdir import MACHINE, check_workdir, create_workdir, with_absolute_paths
from reft_jax.tasks import datasets, prompts
from reft_jax.tasks.answerable import trainable, wrong_anyway
from reft_jax.tasks.registry import PAPER, Task, load_task
from reft_jax.tasks.tokenizer import all_end_ids, check_vocabulary, decode, encode, encode_rollout, load_tokenizer
from reft_jax.train.trackers import load_trackers
from reft_jax.types import Completion, Example, InputError, Prompt

DATA = ("seed", "toy.", "data.train", "data.dev", "data.format")  # settings that decide what training and dev rows are
BY_ROW = ("sft.micro_batch", "rl.micro_batch", "rerank.micro_batch", "engine.slots")
Row = tuple[list[int], int, str]  # ids of prompt + target + EOS, prompt length, item


@dataclass
class Data:
    """The examples of a run; `chosen_on` says in words what `dev` is."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    chosen_on: str

    def checksum(self) -> str:
        """16 hex digits of every example of every split."""
        return _hash(json.dumps([self.train, self.dev, self.test]))


@dataclass
class Run:
    """One work directory with everything in it made ready.

    `sft` are the rows of `sft_rows`, `questions` the examples of `ppo_examples`; `programs` counts what became of the
    completions' programs; `guards` says when to stop, `silence` when nothing is an answer.
    """

    config: object
    workdir: Path
    base: Path
    tokenizer: object
    data: Data
    sft: list[Row] = ()
    questions: list[Example] = ()
    mesh: object = None
    model: object = None
    engine: object = None
    executions: ExecutionLog | None = None
    programs: Counter = field(default_factory=Counter)
    guards: Guards = field(default_factory=Guards)
    silence: Silence = field(default_factory=Silence)

    def prompts(self, examples: list[Example], n: int = 1) -> list[Prompt]:
        """n prompts of each example, the forced prefix included."""
        made, how = [], (self.config.data.format, load_task(self.config.task))
        for example in examples:
            tokens = np.array(encode_rollout(self.tokenizer, example.question, *how), np.int32)
            made += [Prompt(example.item_id, sample, tokens) for sample in range(n)]
        return made

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """The completion as text, see `completed_text`."""
        return completed_text(self.tokenizer, prompt.tokens, completion, load_task(self.config.task))

    @cached_property
    def data_made(self) -> dict:
        """What a finished stage records about its data: checksums of the rows, and of the settings that chose them."""
        settings = {key: value for key, value in flatten(self.config).items() if key.startswith(DATA)}
        checksums = {split: examples_checksum(getattr(self.data, split)) for split in ("train", "dev")}
        return {"settings": _hash(json.dumps(settings, sort_keys=True))} | checksums

    def made_by(self) -> dict:
        """What a saved step records about its run: JSON."""
        settings = {key: value for key, value in flatten(self.config).items() if key not in MACHINE}
        return {
            "config": _hash(json.dumps(settings, sort_keys=True)),
            "data": self.data.checksum(),
            "seed": self.config.seed,
            "versions": versions(),
        }


def completed_text(tokenizer, prompt: Sequence[int], completion: Completion, task: Task = PAPER) -> str:
    """A completion as text, without the id that ended it, which is not always a special token.

    Prompt and response are decoded together (see prompts.completion_text).
    """
    response = completion.tokens[:-1] if completion.finished else completion.tokens
    return prompts.completion_text(decode(tokenizer, [*prompt, *response]), task)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_data(config, paths: dict[str, str]) -> Data:
    """The three splits, shortened as the config says. `paths` has train, dev ("" if there is none) and test."""
    data, task = config.data, load_task(config.task)
    train = shorten(datasets.load_examples(paths["train"], task, need_cot=True), data.train_limit, config.seed)
    test = shorten(datasets.load_examples(paths["test"], task, need_cot=False), data.test_limit, config.seed)
    if shared := datasets.shared_questions(train, test):
        print(f"{shared} training questions are test questions too", flush=True)
    if paths["dev"]:
        return Data(train, datasets.load_examples(paths["dev"], task, need_cot=False), test, "a third split")
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


def sft_rows(run: Run) -> list[Row]:
    """Training rows that fit, of `supervised_row`."""
    config, how = run.config, (run.config.data.format, load_task(run.config.task))
    rows = [supervised_row(run, example, prompts.sft_target(example, *how)) for example in run.data.train]
    lengths = [len(ids) for ids, _, _ in rows]
    return datasets.fit(rows, lengths, config.sft.max_len, config.data.max_dropped, "sft.max_len")


def supervised_row(run: Run, example: Example, target: str) -> Row:
    """Prompt and target are tokenized apart, as the authors do."""
    prompt = encode(run.tokenizer, prompts.prompt_text(example.question, load_task(run.config.task)))
    return prompt + encode(run.tokenizer, target) + [run.tokenizer.eos_token_id], len(prompt), example.item_id


def ppo_examples(run: Run) -> list[Example]:
    """Training questions whose prompt fits; never trained on a cut one."""
    lengths, config = [len(prompt.tokens) for prompt in run.prompts(run.data.train)], run.config
    return datasets.fit(run.data.train, lengths, config.rl.max_prompt, config.data.max_dropped, "rl.max_prompt")


def tokenized(run: Run) -> Run:
    """Fills in `sft` and `questions`, after rows that cannot earn a reward were taken out of the training data.

    A limit that drops too many rows ends the run here, not after an hour of SFT. Rows of dev and test stay, and are
    named if no completion can answer them.
    """
    config, data, tok, task = run.config, run.data, run.tokenizer, load_task(run.config.task)
    where = f"data.train={config.data.train}"
    data.train = trainable(tok, data.train, config.data.format, config.data.max_dropped, where, task)
    run.sft, run.questions = sft_rows(run), ppo_examples(run)
    splits = {"test": data.test} | ({} if data.dev is data.test else {"dev": data.dev})
    for split, examples in splits.items():
        if told := wrong_anyway(tok, examples, config.data.format, config.sample.max_len, split, task):
            print(told, flush=True)
    return run


def data_facts(run: Run) -> dict:
    """What must be alike on all hosts: rows and a digest of them."""
    rows = {f"{name} rows": len(getattr(run.data, name)) for name in ("train", "dev", "test")}
    rows |= {"SFT rows": len(run.sft), "PPO questions": len(run.questions)}
    return rows | {"examples' sha256": run.data.checksum(), "SFT rows' sha256": _hash(json.dumps(run.sft))}


def start_executor(workers: int, memory_mb: int, allow_unsandboxed: bool) -> None:
    """Before JAX; says on stderr what guards a program. InputError if too little does and that is not allowed, or if
    this machine gives no room for it.
    """
    try:
        print(executor.start(workers, memory_mb, allow_unsandboxed), file=sys.stderr, flush=True)
    except executor.InfrastructureError as error:
        raise InputError(str(error)) from error


def checked_tokenizer(folder: Path, *, reranker: bool = False):
    """The tokenizer of a model folder, once tensors' headers, vocabulary and end ids were looked at. InputError.

    `reranker`: the folder must be a classifier's with 2 classes, else a language model's.
    """
    from reft_jax.model.hf import check_folder

    vocab_size = check_folder(folder, reranker=reranker).vocab_size
    check_ids(folder, vocab_size)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    if others := [index for index in all_end_ids(tokenizer, folder) if index != tokenizer.eos_token_id]:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(others)))
        print(f"{folder}: by its eos_token_id a rollout also ends at {names}", file=sys.stderr, flush=True)
    return tokenizer


def open_mesh(config):
    """The config's mesh over this process's devices; JAX takes them here. InputError."""
    import jax

    from reft_jax.parallel.mesh import make_mesh

    if config.mesh.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.mesh.cpu_devices)
    return make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)


def check_rows(config, mesh, keys: Sequence[str] = BY_ROW) -> None:
    """InputError unless what is spread by row divides evenly among the mesh's row shards."""
    from reft_jax.parallel.mesh import row_shards

    for key in keys:
        if flatten(config)[key] % row_shards(mesh):
            raise InputError(f"config: {key} must be a multiple of the {row_shards(mesh)} row shards of the mesh")


def make_engine(run: Run):
    """The rollout engine of the run's model, tokenizer and mesh."""
    from reft_jax.engine.generate import Engine

    return Engine(
        run.model,
        run.mesh,
        slots=run.config.engine.slots,
        pad_multiple=run.config.data.pad_multiple,
        eos_id=all_end_ids(run.tokenizer, run.base),
        seed=run.config.seed,
        after_chunk=run.guards.step,
    )


@contextmanager
def open_run(
    config, workdir: Path, needs: list[str], allowed: Sequence[str] = (), *, reads: bool = False
) -> Iterator[Run]:
    """Everything made ready, in the order that finds mistakes first; the workers are stopped at the end.

    `allowed` are settings that may differ from those the work directory was made with. A command that only `reads`
    comes in while another one works there, and writes nothing in it.
    """
    workdir = workdir.absolute()
    hosts.agree("the command", workdir=str(workdir), **flatten(config), **versions())
    if not reads:
        lock.look(workdir)
    config = with_absolute_paths(config, workdir)
    check_workdir(config, workdir, needs, allowed, reads=reads)
    load_trackers(config.tracking)
    with Guards(config.watchdog_minutes) as guards:
        with _opened(config, workdir, guards, reads) as run:
            guards.check()
            yield run


@contextmanager
def _opened(config, workdir: Path, guards: Guards, reads: bool) -> Iterator[Run]:
    toy = config.model.path == "toy"
    if not toy:
        base = Path(config.model.path)
        data = load_data(config, {"train": config.data.train, "dev": config.data.dev, "test": config.data.test})
        run = tokenized(Run(config, workdir, base, checked_tokenizer(base), data))
    with ExitStack() as stack:
        if not reads:
            stack.enter_context(lock.held(workdir))
        start_executor(config.executor.workers, config.executor.memory_mb, config.executor.allow_unsandboxed)
        stack.callback(executor.shutdown)
        import jax

        from reft_jax.model.heads import ValueHead
        from reft_jax.model.hf import read_config
        from reft_jax.model.llama import Llama
        from reft_jax.parallel.compilation import keep_compiled
        from reft_jax.parallel.mesh import check_divides, on_mesh
        from reft_jax.train.state import abstract_params

        mesh = open_mesh(config)
        check_rows(config, mesh)
        if toy:
            from reft_jax.toy.model import write_data, write_model

            def write_toy_data() -> dict[str, str]:
                if not reads and not (workdir / "config.json").exists():  # what a start with other settings has left
                    shutil.rmtree(workdir / "toy", ignore_errors=True)
                return write_data(config, workdir / "toy")

            data = load_data(config, hosts.from_first("the toy's data", write_toy_data))
            base = workdir / "toy" / "model"
            hosts.from_first("the toy's model", lambda: write_model(config, data.train, base))
            run = tokenized(Run(config, workdir, base, load_tokenizer(base), data))
        model = Llama(read_config(base), dtype=jax.numpy.dtype(config.model.dtype), remat=config.model.remat)
        check_divides(mesh, abstract_params(model, ValueHead(), "value_head"))
        if not reads:
            create_workdir(config, workdir)
            hosts.log_to(workdir / "logs")
        hosts.agree("the data", **data_facts(run))
        keep_compiled(Path(config.compiled or workdir / "compiled"))
        run.mesh, run.model, run.executions = mesh, model, ExecutionLog(workdir)
        run.guards = guards
        run.engine = make_engine(run)
        with on_mesh(mesh):
            yield run
