"""The command `sweep`: interrupted sweeps end with the same table, files alone give it, released names are found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config, tiny_policy

from reft_jax import __main__, executor
from reft_jax.commands.sweep import Source, check_stage, find, parse_checkpoints
from reft_jax.model.hf_write import save_hf
from reft_jax.tasks.tokenizer import train_bpe
from reft_jax.train.checkpoints import save_params
from reft_jax.types import InputError

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"Codellama-7b-hf-{stage}-GSM8k" for stage in ("SFT-warmup", "SFT", "SFT-Rerank", "ReFT", "ReFT-Rerank")]
QUESTIONS = 24
SETTINGS = [
    f"--config.{setting}"
    for setting in (
        "model.dtype=float32 data.pad_multiple=96 engine.slots=8 sample.n=8 sample.max_len=96 rerank.batch_size=16 "
        "rerank.micro_batch=8 rerank.max_len=192 data.format=nl"
    ).split()
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny checkpoints under the released names, rerankers as sequence classifiers, and two data files."""
    folder = tmp_path_factory.mktemp("sweep")
    tokenizer = train_bpe(
        ["Question:\nAnn has 1 apple and buys 2.\nAnswer reasoning:\nTherefore, the answer is: 3"], 300
    )
    shape = dict(vocab_size=len(tokenizer), max_position_embeddings=192)
    for seed, name in enumerate(NAMES):
        head = "rerank_head" if "Rerank" in name else "value_head"
        model, params = tiny_policy(head, **shape)
        # An answer is more likely than not: weights that favour one token after another would never end.
        rng = np.random.default_rng(seed)
        params["lm"]["embed"] = params["lm"]["embed"] + 0.1 * rng.normal(size=params["lm"]["embed"].shape)
        heads = {head: params[head]} if head == "rerank_head" else {}
        save_hf(folder / name, model, params["lm"], tokenizer=tokenizer, **heads)
    for data in ("gsm8k", "svamp"):
        rows = [
            {"item_id": f"{data}_{i}", "question": f"Ann has {i} apples and buys {len(data)}.", "answer_value": str(i)}
            for i in range(QUESTIONS)
        ]
        (folder / f"{data}.json").write_text(json.dumps(rows))
    return folder


def command(folder: Path, workdir: Path) -> list[str]:
    paths = [str(folder / name) for name in NAMES]
    models = f"warm={paths[0]},{paths[1]}+{paths[2]},reft={paths[3]}+{paths[4]}"
    data = f"--data={folder / 'gsm8k.json'},second={folder / 'svamp.json'}"
    config = [f"--config={ROOT / 'configs/paper.py'}:gsm8k,nl", *SETTINGS, f"--config.compiled={folder / 'compiled'}"]
    return [sys.executable, "-m", "reft_jax", "evaluate", *config, f"--workdir={workdir}", f"--models={models}", data]


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    workdir = folder / "whole"
    done = subprocess.run(command(folder, workdir), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "voting@8" in done.stdout and "rerank@8" in done.stdout
    return workdir


def test_a_sweep_is_a_table_a_data_file(finished):
    reports = json.loads((finished / "sweep.json").read_text())
    assert [report["title"].rpartition(": ")[2] for report in reports] == ["gsm8k", "second"]
    for report in reports:
        assert [row["model"] for row in report["rows"]] == ["warm", NAMES[1], "reft"]
        assert [row["rerank"] is None for row in report["rows"]] == [True, False, False]
        for row in report["rows"]:
            assert row["top1"]["total"] == row["voting"]["total"] == QUESTIONS
            points = row["curve"]
            assert [point["k"] for point in points] == [1, 2, 4, 8]
            bounds = [point["upper_bound"] for point in points]
            assert bounds == sorted(bounds) and bounds[-1] == row["upper_bound"]["correct"] / QUESTIONS
        pairs = {(found["a"], found["b"]) for found in report["comparisons"] if found["column"] == "rerank"}
        assert pairs == {("reft", NAMES[1])}
    page = (finished / "report.html").read_text()
    assert page.count("voting@8") == page.count("<tbody>") == 2 and NAMES[1] in page
    samples = [json.loads(line) for line in (finished / "samples/gsm8k/reft.jsonl").read_text().splitlines()]
    assert len({p["completion"] for record in samples[1:] for p in record["predictions"]}) > 20


def test_with_greedy_there_are_no_samples(folder, finished, tmp_path):
    words = [word.replace("+" + str(folder / NAMES[2]), "").replace("+" + str(folder / NAMES[4]), "")
             for word in command(folder, tmp_path)[3:]]  # fmt: skip
    __main__.run_command([*words, "--greedy"])
    for ours, whole in zip(*(json.loads((at / "sweep.json").read_text()) for at in (tmp_path, finished)), strict=True):
        assert [row["top1"] for row in ours["rows"]] == [row["top1"] for row in whole["rows"]]
        assert not any(row["n"] or row["voting"] for row in ours["rows"])
    files = [path.relative_to(tmp_path) for path in (tmp_path / "samples").glob("*/*")]
    assert len(files) == 6 and all(path.name.endswith(".greedy.jsonl") for path in files)
    for path in files:
        ours, whole = (sorted((at / path).read_text().splitlines()) for at in (tmp_path, finished))
        assert ours == whole
    with pytest.raises(InputError, match="--greedy: the reranker of .* would get no samples"):
        __main__.run_command([*command(folder, tmp_path / "other")[3:], "--greedy"])


def kill_when(process: subprocess.Popen, there) -> None:
    deadline = time.monotonic() + 300
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_sweep_that_was_killed_twice_ends_with_the_same_table(folder, finished):
    workdir = folder / "killed"
    for file in ("gsm8k/warm.greedy.jsonl", f"second/{NAMES[1]}.jsonl"):
        path = workdir / "samples" / file
        process = subprocess.Popen(
            command(folder, workdir), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        kill_when(process, lambda path=path: path.exists() and path.stat().st_size)
        assert path.stat().st_size and not (workdir / "sweep.json").exists()
    with (workdir / "samples" / "second" / f"{NAMES[1]}.jsonl").open("a") as file:
        file.write('{"item_id": "svamp_')  # a line torn by the crash
    done = subprocess.run(command(folder, workdir), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for path in (finished / "samples").glob("*/*"):
        at = path.relative_to(finished)
        ours, theirs = ((folder / at).read_text().splitlines() for folder in (workdir, finished))
        assert sorted(ours) == sorted(theirs)  # questions stand in the order in which they were finished
    for name in ("sweep.md", "sweep.json"):
        assert (workdir / name).read_bytes() == (finished / name).read_bytes()


def test_the_table_comes_from_the_files_alone(finished, tmp_path, monkeypatch, capsys):
    """No model, no program: nothing is executed, and no JAX array is made."""

    def reached(*args, **kwargs):
        raise AssertionError("a program was run")

    monkeypatch.setattr(executor, "start", reached)
    monkeypatch.setattr(executor, "run_programs", reached)
    __main__.run_command(["evaluate", f"--samples={finished / 'samples'}", f"--out_dir={tmp_path / 'again'}"])
    assert "differ from what the file says" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "sweep.json").read_text())
    whole = json.loads((finished / "sweep.json").read_text())
    for report, other in zip(again, whole, strict=True):
        for row in report["rows"]:
            same = next(one for one in other["rows"] if Path(row["model"]).name == one["model"])
            assert row | {"model": ""} == same | {"model": ""}


def test_a_name_that_stood_for_another_folder_is_refused(folder, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    argv = [
        argument.replace(f"reft={folder / NAMES[3]}", f"reft={folder / NAMES[0]}")
        for argument in command(folder, workdir)
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "has answers of another model reft" in done.stderr and "choose another" in done.stderr


def test_the_released_checkpoints_are_found_by_name(folder, tmp_path):
    """The script on folders of the released names and layout: a dry run of the table."""
    for name in NAMES:  # the other spelling
        (tmp_path / name.replace("GSM8k", "GSM8K")).symlink_to(folder / name)
    classifier = json.loads((folder / NAMES[2] / "config.json").read_text())
    assert classifier["architectures"] == ["LlamaForSequenceClassification"]
    assert classifier["hidden_size"] == tiny_config().hidden_size
    env = os.environ | {"MODEL_DIR": str(tmp_path), "DATA": str(folder / "gsm8k.json"), "REFT_PYTHON": sys.executable}
    env["WORKDIR"] = str(tmp_path / "run")
    argv = [str(ROOT / "launch/eval_released.sh"), *SETTINGS, f"--config.compiled={folder / 'compiled'}"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    [report] = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["SFT-warmup", "SFT", "ReFT"]
    assert all(row["rerank"]["total"] == QUESTIONS for row in report["rows"][1:])
    (tmp_path / "Codellama-7b-hf-ReFT-GSM8K").unlink()
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "no Codellama-7b-hf-ReFT-GSM8k in" in done.stderr


def test_a_model_of_a_work_directory_is_a_checkpoint_too(folder, tmp_path):
    run = tmp_path / "run"
    (run / "models").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model.path": str(folder / NAMES[0])}))
    save_params(run / "models" / "reft", {"x": np.zeros(2)})
    assert find(str(run / "models" / "reft")) == Source(run / "models" / "reft", folder / NAMES[0])
    (run / "config.json").write_text(json.dumps({"model.path": "toy"}))
    assert find(str(run / "models" / "reft")).base == run / "toy" / "model"


def test_a_stages_reranker_is_no_policy_and_a_policy_no_reranker(tmp_path):
    for name in ("sft", "rerank_sft"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"model.path": "base"}')
    policy, reranker = tmp_path / "models" / "sft", tmp_path / "models" / "rerank_sft"
    [found] = parse_checkpoints(f"{policy}+{reranker}")
    assert found.model.is_stage and found.reranker.is_stage and found.reranker.base == Path("base")
    with pytest.raises(InputError, match="rerank_sft: a reranker, which writes no text; write --models="):
        parse_checkpoints(str(reranker))
    with pytest.raises(InputError, match="sft: no reranker; write --models="):
        parse_checkpoints(f"{policy}+{policy}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not the settings of a run"):
        parse_checkpoints(str(policy))


def test_a_stages_model_of_another_kind_or_shape_is_found_before_anything_is_made(folder, tmp_path):
    """Whatever its folder is called."""
    sft = folder / NAMES[1]
    shape = dict(vocab_size=json.loads((sft / "config.json").read_text())["vocab_size"], max_position_embeddings=192)
    save_params(tmp_path / "reft", tiny_policy("value_head", **shape)[1])
    save_params(tmp_path / "rerank", tiny_policy("rerank_head", **shape)[1])
    save_params(tmp_path / "other", tiny_policy("value_head", **shape | {"hidden_size": 32})[1])
    (tmp_path / "empty").mkdir()
    check_stage(Source(tmp_path / "reft", sft))
    check_stage(Source(tmp_path / "rerank", sft, reranker=True))
    for name, reranker, says in (
        ("rerank", False, r"\['rerank_head'\]|\['value_head'\]"),
        ("reft", True, r"\['rerank_head'\]|\['value_head'\]"),
        ("other", False, r"has shape \(\d+, 32\), but \(\d+, 24\) is needed"),
        ("empty", False, "empty: no model can be read there"),
    ):
        with pytest.raises(InputError, match=says):
            check_stage(Source(tmp_path / name, sft, reranker))
