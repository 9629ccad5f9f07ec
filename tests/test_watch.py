"""Warnings of a run: no answers at all, and a ruined policy."""

from pathlib import Path

import pytest

from reft_jax.config import check_config, default_config, load_config
from reft_jax.run import watch
from reft_jax.run.open import open_run
from reft_jax.run.watch import Collapse, Silence, Tally, warn_of_settings
from reft_jax.types import Completion, Verdict

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


def tally(*statuses: str, finished: bool = True) -> Tally:
    """Of completions whose text is their number; those that are "ok" have an answer."""
    found = Tally()
    for i, status in enumerate(statuses):
        completion = Completion("toy_0", i, (), (), finished)
        found.add(completion, f"text {i}", Verdict(3.0 if status == "ok" else None, False, 0.0, status))
    return found


def test_an_evaluation_without_one_answer_is_warned_of_with_its_reason_and_an_example(capsys):
    Silence().ended("sft dev", tally("no_solution", "syntax_error", "syntax_error"), patience=1)
    assert capsys.readouterr().err == (
        "warning: sft dev: 3 of 3 completions had no answer, most often: syntax_error (2); one ends in 'text 1'\n"
    )
    Silence().ended("sft dev", tally("no_answer", finished=False), patience=1)
    assert "most often: no_answer, cut at the length limit (1)" in capsys.readouterr().err


def test_one_answer_is_enough(capsys):
    Silence().ended("sft dev", tally("no_answer", "ok", "no_answer"), patience=1)
    Silence().ended("sft dev", tally(), patience=1)
    assert capsys.readouterr().err == ""


def test_training_is_warned_of_once_after_some_rollouts_in_a_row(capsys):
    silence, warned = Silence(), []
    for statuses in ["no_answer"] * 2 + ["ok"] + ["no_answer"] * 5:
        silence.ended("reft rollout", tally(statuses), patience=3)
        silence.ended("reft dev", tally("ok"), patience=1)  # another purpose is counted alone
        warned.append(capsys.readouterr().err)
    assert [bool(text) for text in warned] == [False] * 5 + [True] + [False] * 2
    assert "1 of 1 completions had no answer in each of 3 iterations" in warned[5]


def settings(**changed):
    written = default_config()
    written.model.path, written.data.train, written.data.test = "m", "train.json", "test.json"
    written.update_from_flattened_dict({key.replace("_", ".", 1): value for key, value in changed.items()})
    return check_config(written)


OLD_CPU = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16_of_another_name\nbugs\t\t: amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    ("cpuinfo", "platform", "dtype", "warned"),
    [
        (OLD_CPU, "cpu", "bfloat16", True),
        (OLD_CPU, "cpu", "float32", False),
        (OLD_CPU, "tpu", "bfloat16", False),
        (OLD_CPU.replace("avx2", "avx512_bf16"), "cpu", "bfloat16", False),
        (OLD_CPU.replace("avx2", "amx_bf16"), "cpu", "bfloat16", False),
        (ARM, "cpu", "bfloat16", False),
        (None, "cpu", "bfloat16", False),
    ],
)
def test_bfloat16_on_a_cpu_without_instructions_for_it(tmp_path, monkeypatch, capsys, cpuinfo, platform, dtype, warned):
    monkeypatch.setattr(watch, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    warn_of_settings(settings(model_dtype=dtype), platform)
    told = (
        "warning: model.dtype=bfloat16 is probably slow: this CPU has none of the instructions for it "
        "(amx_bf16, avx512_bf16); set --config.model.dtype=float32\n"
    )
    assert capsys.readouterr().err == told * warned


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"engine_weights": "int8"}, "engine.weights=int8"),
        ({"engine_cache": "int8"}, "engine.cache=int8"),
        ({"engine_weights": "int8", "engine_cache": "int8"}, "engine.weights=int8 engine.cache=int8"),
        ({"engine_weights": "int8", "rl_sampler_correction": "tis"}, ""),
        ({"engine_weights": "int8", "rl_sampler_correction": "mis"}, ""),
        ({}, ""),
    ],
)
def test_int8_rollouts_without_a_correction(capsys, changed, named):
    warn_of_settings(settings(**changed), "tpu")
    told = (
        f"warning: {named}: updates do not see how far its rollouts are from the trained model; "
        "set --config.rl.sampler_correction=tis\n"
    )
    assert capsys.readouterr().err == told * bool(named)


def test_a_run_warns_when_it_starts_and_a_command_that_only_reads_does_not(tmp_path, capsys):
    written = load_config(str(CONFIG))
    written.toy.update(train_rows=8, dev_rows=2, test_rows=2, vocab_size=400)
    written.sft.max_len, written.mesh.cpu_devices, written.engine.weights = 224, 0, "int8"
    written.rl.update(max_prompt=192, max_len=224, questions=4, micro_batch=4, minibatches=1)
    for read_only in (False, True):
        with open_run(check_config(written), tmp_path / "run", [], read_only=read_only):
            assert ("warning: engine.weights=int8: " in capsys.readouterr().err) != read_only


def collapsed_at(rewards, kls, prompts=64) -> list[int]:
    collapse = Collapse(prompts)
    lines = [{"reward": r, "kl": k} for r, k in zip(rewards, kls, strict=True)]
    return [i for i, line in enumerate(lines, 1) if collapse.add(line)]


@pytest.mark.parametrize(
    ("rewards", "kls", "ruined"),
    [
        ([0.4, 0.0, 0.0], [0, 308, 309], [2]),  # told once
        ([0.4, 0.1, 0.09], [0, 5, 5], [3]),  # a quarter of the first is not below a quarter of it
        ([0.4, 0.0, 0.0], [0, 0.5, 1.0], []),  # still close to the reference: a bad batch
        ([0.4, 0.5, 0.45], [0, 20, 30], []),  # far away, and better
        ([0.0, 0.0, 0.0], [0, 20, 30], []),  # there never was a reward
    ],
)
def test_a_collapse_is_a_reward_that_is_gone_and_a_policy_far_away(rewards, kls, ruined):
    assert collapsed_at(rewards, kls) == ruined


def test_few_rows_are_looked_at_together():
    """16 rows an iteration: four are a mean that can be believed."""
    assert collapsed_at([0.4] * 4 + [0.0] * 4, [9.0] * 8, prompts=16) == [8]


def test_what_is_said_of_a_collapse_and_lines_without_a_reward():
    collapse = Collapse(questions=64)
    assert collapse.add({"step": 1, "loss": 2.0}) == ""
    assert collapse.add({"reward": 0.4, "kl": 0.0}) == ""
    assert collapse.add({"reward": 0.01, "kl": 308.4}) == (
        "mean reward 0.010, 0.400 at the beginning; KL 308 nats per row"
    )
