"""Every dataset, with both engines, through every stage of the method, shortened: one process, one tiny model.

The model learns its twelve questions by heart, so that samples with an answer, both correct and wrong ones,
reach rewards, votes and rerankers in every cell.
"""

import json
from itertools import product
from pathlib import Path

import pytest
from tiny import tiny_model

from reft_jax.commands.pipeline import run_pipeline
from reft_jax.config import check_config, default_config
from reft_jax.evaluation.records import read_records
from reft_jax.model.hf_write import save_hf
from reft_jax.run.open import open_run
from reft_jax.tasks.prompts import PROGRAM_HEAD, prompt_text, sft_target
from reft_jax.tasks.registry import TASKS
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.types import Example

DATASETS, ENGINES = ("gsm8k", "svamp", "mathqa", "mathqa-numeric"), ("python", "nl")
CELLS = list(product(DATASETS, ENGINES))
LATER = [
    ("gsm8k", "nl"),
    ("svamp", "python"),
    ("mathqa", "nl"),
    ("mathqa-numeric", "python"),
    ("mathqa-numeric", "nl"),
]  # with --long; the others have numbers and letters as answers, programs and text
TRAINED = ("warmup", "sft", "self_train_offline", "self_train_online", "reft", "rerank_sft", "rerank_reft")
LENGTH = 128
SETTINGS = {
    "model.dtype": "float32",
    "model.remat": "none",
    "data.pad_multiple": LENGTH,
    "sft.epochs": 12,
    "sft.warmup_epoch": 11,
    "sft.eval_every": 12,
    "sft.batch_size": 4,
    "sft.micro_batch": 4,
    "sft.learning_rate": 1e-2,
    "sft.max_len": LENGTH,
    "self_train.epochs": 2,
    "rl.iterations": 2,
    "rl.questions": 4,
    "rl.micro_batch": 4,
    "rl.ppo_epochs": 1,
    "rl.max_prompt": 64,
    "rl.max_len": LENGTH,
    "sample.n": 4,
    "sample.train_n": 2,
    "sample.max_len": LENGTH,
    "engine.slots": 8,
    "rerank.epochs": 1,
    "rerank.batch_size": 8,
    "rerank.micro_batch": 4,
    "rerank.max_len": LENGTH,
}


def examples(dataset: str, engine: str) -> list[Example]:
    """Twelve questions, whose answer is a letter in MathQA."""
    made = []
    for i in range(12):
        value = "abcde"[i % 5] if TASKS[dataset].want == "text" else str(i % 3 + 1)
        question = f"Number {i}?"
        returned = repr(value) if TASKS[dataset].want == "text" else value
        program = f'{PROGRAM_HEAD}    """{question}"""\n    return {returned}'
        made.append(Example(f"{dataset}_{i}", question, value, program if engine == "python" else "Look."))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder of one tiny model for all; its tokenizer has seen every cell's text."""
    folder = tmp_path_factory.mktemp("matrix") / "model"
    texts = [
        prompt_text(example.question) + sft_target(example, engine)
        for dataset, engine in CELLS
        for example in examples(dataset, engine)
    ]
    tokenizer = train_bpe(texts, 340)
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, num_layers=1, hidden_size=32)
    save_hf(folder, *tiny_model(**shape), tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize(
    ("dataset", "engine"),
    [pytest.param(*cell, id="-".join(cell), marks=[pytest.mark.long] if cell in LATER else []) for cell in CELLS],
)
def test_every_stage(model, tmp_path, dataset, engine, capsys):
    rows = [example._asdict() for example in examples(dataset, engine)]
    for name, fields in (("train", rows), ("test", [row | {"answer_cot": None} for row in rows[:8]])):
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    config = default_config()
    config.update_from_flattened_dict(SETTINGS)
    config.model.path, config.data.format = str(model), engine
    config.data.train, config.data.test = str(tmp_path / "train.json"), str(tmp_path / "test.json")
    with open_run(check_config(config), tmp_path / "run", []) as run:
        report = run_pipeline(run, baselines=True)
        outcomes = dict(run.programs)

    assert {path.name for path in (tmp_path / "run" / "models").iterdir()} >= set(TRAINED)
    table = {row["model"]: row for row in report["rows"]}
    assert list(table) == ["SFT warm-up", "SFT", "offline self-training", "online self-training", "ReFT"]
    assert table["SFT"]["top1"]["correct"] > 0
    for name in ("SFT", "ReFT"):
        row = table[name]
        assert row["voting"]["total"] == row["rerank"]["total"] == row["upper_bound"]["total"] == 8
        assert row["upper_bound"]["correct"] >= max(row["voting"]["correct"], row["rerank"]["correct"])
    assert table["SFT"]["upper_bound"]["correct"] > 0

    samples = read_records(tmp_path / "run/samples/sft_test.jsonl")
    answers = [p["solving_res"] for record in samples for p in record["predictions"] if p["solving_res"] is not None]
    assert answers and all(isinstance(value, str if TASKS[dataset].want == "text" else float) for value in answers)
    if TASKS[dataset].want == "text":
        assert set(answers) <= set("abcde")
    starts = {p["completion"].startswith(PROGRAM_HEAD) for record in samples for p in record["predictions"]}
    assert starts == {engine == "python"}
    assert bool(outcomes) == (engine == "python")  # text is never executed
    metrics = [json.loads(line) for line in (tmp_path / "run/self_train_online/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
