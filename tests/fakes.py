"""Fake models for tests/acts.py: a fake's answers depend only on its checksum. And the truth about their answers,
computed from scratch."""

import hashlib
import json
import random
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from reft_jax.commands import evaluate, sweep
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.machine import Machine
from reft_jax.run.open import Run, Workdir
from reft_jax.run.workdir import create_workdir
from reft_jax.stages import models as stages
from reft_jax.stages import rerank, sample
from reft_jax.stages.rollout import Graded
from reft_jax.tasks.registry import PAPER
from reft_jax.train.checksums import ARRAYS, write_manifest
from reft_jax.types import Example, Prompt

POLICIES = ("sft", "reft")
SHARE = re.compile(r"[\d.]+ % \((\d+)/(\d+)\)")
COLUMNS = {"top-1": "top1", "voting": "voting", "rerank": "rerank", "upper bound": "upper_bound"}


class Killed(BaseException):
    """As SIGKILL would end the process."""


def number(*what) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:6])


def completion(weights: str, example: Example, sample_number: int, settings: tuple) -> tuple[str, float | None]:
    """(text, value) that a fake model answers; `settings` is () for greedy decoding."""
    drawn = number(weights, example.question, sample_number, settings)
    value = None if drawn % 7 == 0 else float(drawn % 3)
    return f"answer {value}, way {drawn // 16 % 4}", value


def sampling_of(config) -> tuple:
    settings = config.sample
    return settings.temperature, settings.top_k, settings.max_len, config.seed, config.data.format


class FakeInputs(Inputs):
    prompter = None  # there is no tokenizer

    def prompts(self, examples, n=1):
        return [Prompt(example.item_id, i, ()) for example in examples for i in range(n)]


def fake_run(config, workdir: Path, base: Path, data: Data) -> Run:
    """A run without tokenizer, devices and model."""
    inputs = FakeInputs(config, base, None, data)
    return Run(inputs, Machine(None, None, None), Workdir(workdir, None), None)


# --- what replaces the model


class Fakes:
    """Models that are a function of their checksums. Dies after `dies_after` completions, if that is not None."""

    def __init__(self):
        self.dies_after: int | None = None
        self.drawn = 0

    def save(self, folder: Path, weights: str) -> None:
        """As a stage saves a model."""
        save_fake(folder, weights)

    def weights(self, folder: Path, base: Path):
        """What a model computes with: its arrays and its tokenizer."""
        tokenizer = base / "tokenizer.json"
        return (folder / ARRAYS).read_text() + (tokenizer.read_text() if tokenizer.exists() else "")

    def complete(self, weights, asked: list[tuple[Example, int]], settings: tuple) -> list[tuple[str, float | None]]:
        """(text, value) of each sample of a question; `settings` is () for greedy decoding."""
        return [completion(weights, example, i, settings) for example, i in asked]

    def probability(self, weights, question: str, text: str) -> float:
        return number(weights, question, text) % 1000 / 1000

    def roll_out(self, run, lm, prompts, examples, purpose, clock=None, **sampling):
        greedy = not sampling["temperature"]
        settings = () if greedy else (sampling["temperature"], sampling["top_k"], sampling["max_len"])
        settings += () if greedy else (run.config.seed, run.config.data.format)
        answered = self.complete(lm, [(e, p.sample) for e, p in zip(examples, prompts, strict=True)], settings)
        order = list(range(len(prompts)))
        random.Random(len(prompts)).shuffle(order)  # rows end in any order
        for i in order:
            if self.dies_after is not None and self.drawn >= self.dies_after:
                raise Killed
            self.drawn += 1
            text, value = answered[i]
            yield i, Graded(None, text, PAPER.of(examples[i].item_id).judge(value, "ok", examples[i]))

    def install(self, monkeypatch) -> None:
        def scores(run, params, score, records):
            return [
                [
                    self.probability(params, record["question"], p["completion"])
                    for p in rerank.deduplicate(record["predictions"])
                ]
                for record in records
            ]

        def load_model(run, name, abstract=None):
            weights = self.weights(run.workdir.model(name), run.inputs.base)
            return weights if name.startswith("rerank_") else {"lm": weights}

        def with_model(run, source):
            made = source.checksum(run.workdir.path)
            return run, stages.Weights(made, lambda: self.weights(source.folder, source.base))

        @contextmanager
        def open_sweep(config, workdir, checkpoints):
            create_workdir(config, workdir)
            yield fake_run(config, workdir, Path(), Data([], [], [], ""))

        monkeypatch.setattr(sample, "roll_out", self.roll_out)
        monkeypatch.setattr(evaluate, "wrong_anyway", lambda *args: "")  # there is no tokenizer
        monkeypatch.setattr(sweep, "cannot_answer", lambda *args: [])
        monkeypatch.setattr(stages, "load_model", load_model)
        monkeypatch.setattr(stages, "abstract_reranker", lambda run: None)
        monkeypatch.setattr(rerank, "make_rerank_scorer", lambda model: None)
        monkeypatch.setattr(rerank, "score_questions", scores)
        monkeypatch.setattr(sweep, "with_model", with_model)
        monkeypatch.setattr(sweep, "open_sweep", open_sweep)


def save_fake(folder: Path, weights: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ARRAYS).write_text(json.dumps({"x": weights}))
    write_manifest(folder)


# --- the truth


def truth(fakes: Fakes, weights, judge, config, examples: list[Example], n: int) -> dict[str, int]:
    """How many questions each column has right, question by question, without a file."""
    right = dict.fromkeys(COLUMNS.values(), 0)
    for example in examples:
        target = float(example.answer_value)
        [(_, value)] = fakes.complete(weights, [(example, 0)], ())
        right["top1"] += value == target
        drawn = fakes.complete(weights, [(example, i) for i in range(n)], sampling_of(config))
        values = [value for _, value in drawn if value is not None]
        voted = max(values, key=lambda v: (values.count(v), -values.index(v)), default=None)
        right["voting"] += voted == target
        right["upper_bound"] += target in values
        if judge:
            best = max(
                (pair for pair in drawn if pair[1] is not None),
                key=lambda pair: (fakes.probability(judge, example.question, pair[0]), -drawn.index(pair)),
                default=("", None),
            )
            right["rerank"] += best[1] == target
    return right


def printed(text: str) -> list[dict[str, dict]]:
    """The tables in a terminal's text: {model: {column: (correct, total), "n": …}} each."""
    tables, heads = [], None
    for line in text.splitlines():
        if line.startswith("model "):
            heads, widths = line, [m.start() for m in re.finditer(r"(?<=   )\S|^\S", line)]
            tables.append({})
        elif heads and SHARE.search(line) and not line.startswith(" "):
            cells = [line[a:b].strip() for a, b in zip(widths, [*widths[1:], None], strict=True)]
            names = [heads[a:b].strip() for a, b in zip(widths, [*widths[1:], None], strict=True)]
            model, _, own = cells[0].partition(" (n=")
            row = {"n": int(own.rstrip(")")) if own else None}
            for name, cell in zip(names[1:], cells[1:], strict=True):
                kind, _, k = name.partition("@")
                if k.isdigit():
                    row["n"] = row["n"] or int(k)
                if found := SHARE.fullmatch(cell):
                    row[COLUMNS[kind]] = tuple(map(int, found.groups()))
            tables[-1][model] = row
        elif heads and not line.strip():
            heads = None
    return tables


# --- the acts
