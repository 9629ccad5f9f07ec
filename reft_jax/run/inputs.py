"""What a run reads: settings, the base model's folder and tokenizer, the examples, and the rows made of them.

They are checked before a device is taken or a file is written; only the toy's are made after the devices are taken.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from reft_jax.config import flatten
from reft_jax.evaluation.provenance import examples_checksum
from reft_jax.model.hf import check_folder
from reft_jax.model_folder import check_ids
from reft_jax.run.about import versions
from reft_jax.run.workdir import MACHINE
from reft_jax.store import short_hash
from reft_jax.tasks import datasets, prompts
from reft_jax.tasks.answerable import trainable, wrong_anyway
from reft_jax.tasks.prompts import Prompter, make_prompter
from reft_jax.tasks.registry import Task, load_task
from reft_jax.tasks.tokenizer import all_end_ids, check_vocabulary, load_tokenizer
from reft_jax.types import Completion, Example, InputError, Prompt

# Beginnings of the names of the settings that decide what training and dev rows are.
DATA_PREFIXES = ("seed", "toy.", "data.train", "data.dev", "data.format")
TEMPLATE = ("data.template", "data.system")  # they do too, if the template is not the method's
Row = tuple[list[int], int, str]  # ids of prompt + target + EOS, prompt length, item


@dataclass(frozen=True)
class Data:
    """The examples of a run. chosen_on: which questions choose the checkpoints, in words for the report."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    chosen_on: str

    def checksum(self) -> str:
        """16 hex digits: a hash over the examples of all splits."""
        return short_hash(json.dumps([self.train, self.dev, self.test]))


@dataclass(frozen=True)
class Inputs:
    """What a run reads. `base` is the folder of the base model."""

    config: object
    base: Path
    tokenizer: object
    data: Data

    @property
    def task(self) -> Task:
        """What the questions ask for."""
        return load_task(self.config.task, self.config.data.reading)

    @cached_property
    def prompter(self) -> Prompter:
        """Makes rows of questions, and reads answers. InputError if there is no chat template and one is needed."""
        data = self.config.data
        return make_prompter(self.tokenizer, data.format, self.task, data.template, data.system)

    @property
    def template(self) -> str:
        """What records about rows say of the template besides their other settings: "" for the method's prompt."""
        return "" if self.config.data.template == "method" else self.prompter.template

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a rollout: those of the folder, and the one that training appends."""
        return sorted({*all_end_ids(self.tokenizer, self.base), self.prompter.frame.end})

    @cached_property
    def sft_rows(self) -> list[Row]:
        """The worked solutions as rows, those that fit in sft.max_len. InputError if too many do not."""
        config, how = self.config, (self.config.data.format, self.task)
        targets = [prompts.sft_target(example, *how) for example in self.data.train]
        made = self.prompter.rows([example.question for example in self.data.train], targets)
        rows = [(*row, example.item_id) for row, example in zip(made, self.data.train, strict=True)]
        lengths = [len(ids) for ids, _, _ in rows]
        return datasets.fit(rows, lengths, config.sft.max_len, config.data.max_dropped, "sft.max_len")

    @cached_property
    def questions(self) -> list[Example]:
        """Training questions whose prompt fits in rl.max_prompt; none is cut. InputError if too many do not fit."""
        lengths, config = [len(prompt.tokens) for prompt in self.prompts(self.data.train)], self.config
        return datasets.fit(self.data.train, lengths, config.rl.max_prompt, config.data.max_dropped, "rl.max_prompt")

    def prompts(self, examples: list[Example], n: int = 1) -> list[Prompt]:
        """n prompts per example, the forced prefix included."""
        ids = self.prompter.prompts([example.question for example in examples])
        asked = zip(examples, ids, strict=True)
        return [Prompt(example.item_id, sample, tokens) for example, tokens in asked for sample in range(n)]

    def row(self, example: Example, target: str) -> Row:
        """A supervised row."""
        return *self.prompter.row(example.question, target), example.item_id

    def text(self, prompt: Prompt, completion: Completion) -> str:
        """The completion as text."""
        return self.prompter.completed(prompt.tokens, completion)

    @cached_property
    def data_made(self) -> dict:
        """What a finished stage records about its data: checksums of the rows and of the settings that chose them."""
        prefixes = DATA_PREFIXES + (TEMPLATE if self.template else ())
        flat = {key: value for key, value in flatten(self.config).items() if key.startswith(prefixes)}
        flat["data.engine"] = flat.pop("data.format")  # the name that older versions recorded
        checksums = {split: examples_checksum(getattr(self.data, split)) + self.template for split in ("train", "dev")}
        return {"settings": short_hash(json.dumps(flat, sort_keys=True))} | checksums

    def made_by(self) -> dict:
        """What a saved step records about its run: JSON."""
        settings = {key: value for key, value in flatten(self.config).items() if key not in MACHINE}
        return {
            "config": short_hash(json.dumps(settings, sort_keys=True)),
            "data": self.data.checksum() + self.template,
            "seed": self.config.seed,
            "versions": versions(),
        }

    def facts(self) -> dict:
        """What must be the same on all hosts: numbers of rows, and digests of them."""
        rows = {f"{name} rows": len(getattr(self.data, name)) for name in ("train", "dev", "test")}
        rows |= {"SFT rows": len(self.sft_rows), "PPO questions": len(self.questions)}
        return rows | {
            "examples' sha256": self.data.checksum(),
            "SFT rows' sha256": short_hash(json.dumps(self.sft_rows)),
        }


def read_inputs(config, base: Path, tokenizer, data: Data) -> Inputs:
    """Checks and returns the inputs, without the training rows that cannot earn a reward.

    InputError if too many rows are left out or are too long: here, not after an hour of SFT. Rows of dev and test all
    stay; a line names those that no completion can answer.
    """
    where, asked = f"data.train={config.data.train}", Inputs(config, base, tokenizer, data)
    train = trainable(asked.prompter, data.train, config.data.max_dropped, where, asked.task)
    inputs = replace(asked, data=replace(data, train=train))
    vars(inputs)["prompter"] = asked.prompter  # it knows the prompts by now
    _ = inputs.sft_rows, inputs.questions
    splits = {"test": data.test} | ({} if data.dev is data.test else {"dev": data.dev})
    for split, examples in splits.items():
        if told := wrong_anyway(inputs.prompter, examples, config.sample.max_len, split):
            print(told, flush=True)
    return inputs


def load_data(config, paths: dict[str, str]) -> Data:
    """The three splits, shortened as the config says. `paths` has train, dev ("" if there is none) and test."""
    data, task = config.data, load_task(config.task, config.data.reading)
    if task.want == "tests" and data.format != "python":
        raise InputError(f"config: data.format={data.format!r} must be 'python': task={config.task!r} runs its answers")
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


def checked_tokenizer(folder: Path, *, reranker: bool = False):
    """Checks a model folder (tensors' headers, vocabulary, end ids) and returns its tokenizer. Raises InputError.

    reranker: whether the folder must hold a classifier with 2 classes; if not, it must hold a language model.
    """
    vocab_size = check_folder(folder, reranker=reranker).vocab_size
    check_ids(folder, vocab_size)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    if others := [index for index in all_end_ids(tokenizer, folder) if index != tokenizer.eos_token_id]:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(others)))
        print(f"{folder}: by its eos_token_id a rollout also ends at {names}", file=sys.stderr, flush=True)
    return tokenizer
