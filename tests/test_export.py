"""The card of an exported model says what the model is, where it comes from and what was measured."""

import json
from types import SimpleNamespace

import pytest
from test_report import full_report

from reft_jax.commands import export
from reft_jax.commands.export import model_card
from reft_jax.commands.pipeline import steps
from reft_jax.config import default_config
from reft_jax.evaluation.report import markdown_table
from reft_jax.run.inputs import Data, Inputs
from reft_jax.run.open import Run, Workdir
from reft_jax.types import InputError


@pytest.fixture
def run(tmp_path) -> Run:
    """A work directory whose stages are done."""
    for stage, done in {
        "sft": {"best": 7, "epochs": 40, "rows": 7356},
        "reft": {"best": 30, "iterations": 900, "questions": 7300},
        "self_train_offline": {"best": 3, "epochs": 20, "rows": 9000},
        "rerank_reft": {"rows": 500_000, "positive": 0.4},
    }.items():
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "done.json").write_text(json.dumps(done | {"seconds": 1.0, "checksum": "0"}))
    config = default_config()
    config.name = "GSM8K"
    tokenizer = SimpleNamespace(eos_token_id=2)
    inputs = Inputs(config, tmp_path / "CodeLlama-7b-hf", tokenizer, Data([], [], [], "a third split"))
    return Run(inputs, None, Workdir(tmp_path, None), None)


def test_a_policy(run):
    card = model_card(run, "reft", ["LICENSE", "USE_POLICY.md"])
    for part in (
        "# GSM8K: ReFT\n",
        "the licence and the use policy of CodeLlama-7b-hf apply to it. Copied from there: LICENSE, USE_POLICY.md.",
        '```\nQuestion:\n{question}\nAnswer reasoning:\ndef solution():\n    """{question}"""\n\n```\n',
        "1. SFT of CodeLlama-7b-hf on 7356 worked solutions (python), epoch 2 of a schedule of 40.\n",
        "2. ReFT: PPO on executed answers, 7300 questions, best iteration (30 of 900).\n",
        "Checkpoints chosen on: a third split.",
        "## Measured\n\nNot evaluated yet.\n",
    ):
        assert part in card, part
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rl.algorithm": "grpo"}, "GRPO"),
        ({"rl.algorithm": "dr_grpo", "lora.rank": 16}, "DrGRPO (LoRA of rank 16)"),
        ({"reward": "/home/me/mine.py:tidy"}, "PPO (reward mine.py:tidy)"),
        (
            {"rl.algorithm": "/home/me/own.py:Mine", "lora.rank": 4, "reward": "a/mine.py:tidy"},
            "own.py:Mine (LoRA of rank 4, reward mine.py:tidy)",
        ),
    ],
)
def test_the_card_and_the_step_name_what_reft_was(run, settings, words):
    """The algorithm, LoRA, and a reward of one's own, without the folders that they were in."""
    config = run.config
    config.update_from_flattened_dict(settings)
    card = model_card(run, "reft", [])
    assert f"2. ReFT: {words} on executed answers, 7300 questions, best iteration (30 of 900).\n" in card
    assert "/home/me" not in card
    assert steps(config, baselines=False)[1].title == f"ReFT: {words} from the warm-up model"


@pytest.fixture
def evaluated(run, monkeypatch) -> tuple[Run, dict[str, str]]:
    """A run with a report of its models, and their checksums by name."""
    there = {"sft": "1", "reft": "2", "rerank_reft": "3"}
    monkeypatch.setattr(export, "checksum", lambda run, name, memory: there.get(name, ""))
    (run.workdir.path / "report.json").write_text(json.dumps(full_report() | {"checksums": there}))
    return run, there


def test_a_reranker_and_what_was_measured(evaluated):
    run, _ = evaluated
    card = model_card(run, "rerank_reft", [])
    assert "# GSM8K: ReFT reranker" in card and "pipeline_tag: text-classification" in card
    assert "```\nQuestion:\n{question}\nAnswer reasoning:\n{completion}\n```" in card
    assert "3. A classifier on 500000 distinct samples of the warm-up model, from that model." in card
    assert "held no licence file" in card
    assert (
        f"500 test questions, 100 samples each, 95 % intervals in brackets.\n\n{markdown_table(full_report())}" in card
    )


@pytest.mark.parametrize("name", ["sft", "reft", "rerank_reft"])
def test_the_figures_of_another_model_are_not_in_the_card(evaluated, capsys, name):
    """A model trained again after `evaluate`, whichever of them is exported; and a report that does not say."""
    (run, there), path = evaluated, evaluated[0].workdir.path / "report.json"
    there[name] = "another"
    assert "## Measured\n\nNot evaluated yet.\n" in model_card(run, "reft", [])
    assert f"{path}: is of another {name} than there is now" in capsys.readouterr().out
    path.write_text(json.dumps(full_report()))
    assert "## Measured\n\nNot evaluated yet.\n" in model_card(run, "reft", [])
    assert "is of an older version" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[", "[]", '{"rows": ["a"]}', '{"rows": [], "n": 1}', '{"checksums": 3}'])
def test_a_damaged_report_is_named(run, text):
    (run.workdir.path / "report.json").write_text(text)
    with pytest.raises(InputError, match="report.json: not a report"):
        model_card(run, "reft", [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("warmup", "epoch 2 of a schedule of 40"),
        ("sft", "best epoch (7 of 40)"),
        ("self_train_offline", "SFT of CodeLlama-7b-hf on these, best epoch (3 of 20)"),
    ],
)
def test_how_the_others_came_about(run, name, words):
    assert words in model_card(run, name, [])


def test_nl_says_where_the_answer_is(run):
    run.config.data.format = "nl"
    card = model_card(run, "sft", [])
    assert "Answer reasoning:\n\n```" in card and "follows the last `Therefore, the answer is: `." in card
