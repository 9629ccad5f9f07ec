"""The whole chain as a user runs it, shortened: real processes, one work directory."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from test_services import sha256, trackio_has, wandb_has

ROOT = Path(__file__).resolve().parents[1]
TINY = """
toy.train_rows=48 toy.dev_rows=6 toy.test_rows=7 toy.vocab_size=400 toy.layers=1 toy.hidden_size=16 toy.mlp_size=32
toy.heads=2 sft.epochs=2 sft.warmup_epoch=1 sft.eval_every=1 rl.iterations=3 rl.questions=16 rl.micro_batch=8
rl.minibatches=1 rl.value_init=1.0 rl.save_every=1 rl.eval_every=2 rl.max_prompt=192 rl.max_len=224
sft.max_len=224 sample.max_len=224 sample.n=2 sample.train_n=2 sample.train_limit=8 engine.slots=16 rerank.epochs=1
rerank.batch_size=16 rerank.micro_batch=8 rerank.max_len=448 data.pad_multiple=224
""".split()


TRACKERS = [name for name in ("wandb", "trackio") if find_spec(name)]
TRACKED = f"--config.tracking={','.join(['jsonl', 'tensorboard', *TRACKERS])}"


def command(name: str, workdir: Path, *arguments: str) -> list[str]:
    settings = [f"--config.{setting}" for setting in TINY]
    config = f"--config={ROOT / 'configs/quickstart.py'}"
    return [sys.executable, "-m", "reft_jax", name, config, f"--workdir={workdir}", *settings, *arguments]


def run(name: str, workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(name, workdir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def tracked_here(tmp_path_factory):
    """Trackers that keep what they get in a folder of this file."""
    os.environ["WANDB_MODE"], os.environ["TRACKIO_DIR"] = "offline", str(tmp_path_factory.mktemp("trackio"))
    yield
    del os.environ["WANDB_MODE"], os.environ["TRACKIO_DIR"]


@pytest.fixture(scope="module")
def finished(tracked_here, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    done = run("pipeline", workdir, TRACKED)
    assert done.returncode == 0, done.stderr
    return workdir, done


def metrics(workdir: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def test_pipeline_leaves_report_curves_and_table(finished):
    workdir, done = finished
    report = json.loads((workdir / "report.json").read_text())
    assert [row["model"] for row in report["rows"]] == ["SFT warm-up", "SFT", "ReFT"]
    for row in report["rows"]:
        assert row["top1"]["total"] == 7
    for row in report["rows"][1:]:
        assert row["voting"]["total"] == row["rerank"]["total"] == row["upper_bound"]["total"] == 7
        assert row["voting"]["correct"] <= row["upper_bound"]["correct"]
    assert "voting@2" in done.stdout and "voting@2" in (workdir / "report.md").read_text()
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "voting@2" in (workdir / "report.html").read_text()
    assert list((workdir / "reft" / "tb").glob("events.*"))
    assert json.loads((workdir / "config.json").read_text())["seed"] == 42
    assert "jax" in json.loads((workdir / "versions.json").read_text())


def test_ppo_starts_at_the_reference(finished):
    lines = metrics(finished[0], "reft")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["kl"] == 0  # policy and reference are the same weights, scored by the same program
    assert all(line["ratio_max_error_first"] < 1e-5 for line in lines)
    assert lines[1]["kl"] != 0


def test_the_warm_up_model_is_evaluated_as_iteration_0_and_the_best_on_dev_is_handed_on(finished):
    """One dev accuracy of three is the best, the earlier one of equals; the report names its iteration."""
    workdir, done = finished
    result = json.loads((workdir / "reft" / "done.json").read_text())
    found = [(0, result["start_dev_top1"])]
    found += [(line["step"], line["dev_top1"]) for line in metrics(workdir, "reft") if "dev_top1" in line]
    assert [iteration for iteration, _ in found] == [0, 2, 3]
    assert (result["best"], result["best_dev_top1"]) == max(found, key=lambda one: one[1])
    arrays = [json.loads((workdir / "models" / name / "arrays.json").read_text()) for name in ("reft", "warmup")]
    assert (arrays[0] == arrays[1]) == (result["best"] == 0)
    assert f"ReFT: best iteration {result['best']} of 3" in (workdir / "report.md").read_text()
    told = "reft: no iteration was better on dev than the warm-up model, which becomes the result" in done.stderr
    assert told == (result["best"] == 0)


def test_a_report_says_first_what_made_it(finished):
    workdir, _ = finished
    title, blank, *lines = (workdir / "report.md").read_text().splitlines()[:7]
    assert title.startswith("# ") and not blank
    assert [line.partition(":")[0] for line in lines] == ["- made", "- with", "- model", "- data", "- curves"]
    assert "reft_jax 0." in lines[1] and ", jax 0." in lines[1]
    assert lines[2:] == [
        "- model: toy, made from seed 42",
        "- data: train toy (48 rows), dev toy (6 rows), test toy (7 rows)",
        "- curves: [curves.png](curves.png)",
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_lands_in_each_tracker(finished, name):
    """Each stage's numbers with their names and steps, the table's, config, versions, report, curves; no warning."""
    if name not in TRACKERS:
        pytest.skip(f"needs reft_jax[{name}]")
    workdir, done = finished
    config = json.loads((workdir / "config.json").read_text())
    versions = json.loads((workdir / "versions.json").read_text())
    config |= {f"versions.{name}": version for name, version in versions.items()}
    rows = json.loads((workdir / "report.json").read_text())["rows"]
    columns = ("top1", "voting", "rerank", "upper_bound")
    counts = {f"{row['model']}/{column}": row[column] for row in rows for column in columns}
    table = {what: found["correct"] / found["total"] for what, found in counts.items() if found}
    assert len(table) == 9
    results = ["report.md", "report.json", "curves.png"]
    told = {one: (metrics(workdir, one), ["metrics.jsonl"]) for one in ("sft", "reft", "rerank_sft", "rerank_reft")}
    for stage, (lines, files) in (told | {"": ([{"step": 1} | table], results)}).items():
        folder = workdir / stage
        run_id = json.loads((folder / "tracking.json").read_text())["run_id"]
        has = wandb_has(folder) if name == "wandb" else trackio_has(run_id, workdir)
        assert (has.ids, has.lines) == ([run_id], lines)
        assert has.configs == [config]
        assert has.files == {file: sha256(folder / file) for file in files}
    assert len(told["reft"][0]) == 3 and "is switched off" not in done.stderr


def test_what_takes_long_is_announced(finished):
    """Compiling and evaluating are lines of their own; no rate counts what was compiled in it."""
    told = finished[1].stderr
    for line in (
        "sft  0/6 steps  compiling\n",
        "reft  0/3 iterations  compiling\n",
        "reft dev  0/6 completions  evaluat",
    ):
        assert line in told


def test_solve_takes_a_model_of_a_work_directory(finished):
    workdir, _ = finished
    solve = [sys.executable, "-m", "reft_jax", "solve", f"--model={workdir / 'models' / 'reft'}", "2 and 3?"]
    solved = subprocess.run(solve, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert solved.returncode == 0, solved.stderr
    assert solved.stdout.startswith('def solution():\n    """2 and 3?"""') and "\nanswer: " in solved.stdout
    solve[4] = f"--model={workdir / 'models' / 'rerank_reft'}"
    refused = subprocess.run(solve, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "is a reranker" in refused.stderr


def test_second_run_does_nothing_again(finished):
    workdir, _ = finished
    files = [p for p in workdir.rglob("*") if p.is_file() and "report" not in p.name and "wandb" not in p.parts]
    before = {p: p.stat().st_mtime_ns for p in files}
    again = run("pipeline", workdir, TRACKED)
    assert again.returncode == 0, again.stderr
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {str(p.relative_to(workdir)) for p in before if before[p] != after[p]}
    assert changed <= {"curves.png", "trackers.log", "tracking.json"}  # the table is another step of the results
    for stage in ("sft", "reft", "rerank_sft", "rerank_reft"):
        assert f"{stage}: done already, {workdir / stage / 'done.json'}\n" in again.stdout
    assert f"reft samples on test: done already, {workdir / 'samples' / 'reft_test.jsonl'}\n" in again.stdout


def test_a_work_directory_with_old_names_of_settings_is_exported_and_evaluated(finished, tmp_path):
    workdir, _ = finished
    config, before = workdir / "config.json", json.loads((workdir / "report.json").read_text())
    text = config.read_text()
    old = text.replace('"rl.questions"', '"ppo.prompts"').replace('"rl.', '"ppo.').replace("data.format", "data.engine")
    config.write_text(old)
    done = run("export", workdir, "--model=sft", f"--out_dir={tmp_path / 'sft'}")
    assert done.returncode == 0, done.stderr
    assert config.read_text() == old and (tmp_path / "sft" / "model.safetensors").exists()
    done = run("evaluate", workdir, TRACKED)
    assert done.returncode == 0, done.stderr
    assert config.read_text() == text
    assert json.loads((workdir / "report.json").read_text())["rows"] == before["rows"]


def test_every_verdict_is_in_the_audit_log_and_can_be_graded_again(finished):
    workdir, _ = finished
    command = [sys.executable, "-m", "reft_jax", "evaluate", "--replay", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "reft rollout: 48," in done.stdout and "sft samples on test: 14," in done.stdout
    logged = 2 * 6 + 3 * 16 + 3 * 6 + 3 * 7 + 2 * 14 + 16  # SFT dev, rollouts, ReFT dev, top-1, samples: test, train
    assert f"{logged} of {logged} verdicts are what the log says" in done.stdout
    assert all(line["seconds_program_p99"] >= line["seconds_program_p50"] > 0 for line in metrics(workdir, "reft"))


def test_export_gives_a_folder_that_transformers_and_solve_load(finished, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    workdir, _ = finished
    done = run("export", workdir, "--model=reft", f"--out_dir={tmp_path / 'reft'}")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "reft" / "README.md").read_text()
    assert "ReFT: PPO on executed answers" in card and "| Model | top-1 | voting@2 | rerank@2 |" in card
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "reft", dtype=torch.float32)
    tokens = np.arange(12)[None] % 300

    from reft_jax import load_hf

    model, params = load_hf(tmp_path / "reft")
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model.apply({"params": params}, tokens), expected, atol=1e-4)
    solve = [sys.executable, "-m", "reft_jax", "solve", f"--model={tmp_path / 'reft'}", "Ann has 2 pens. How many?"]
    solved = subprocess.run(solve, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert solved.returncode == 0, solved.stderr
    assert solved.stdout.startswith('def solution():\n    """Ann has 2 pens. How many?"""')
    assert "\nanswer: " in solved.stdout


# --- `check --workdir`: what it says of a run is what the run did


def cells(printed: str) -> dict[str, list[str]]:
    """The other cells of each row of the table, by its first cell."""
    rows = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in rows[2:]}


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_it_says_what_the_run_was_and_writes_nothing(finished):
    workdir = finished[0]
    before = listing(workdir)
    again = run("check", workdir, TRACKED)
    assert again.returncode == 0, again.stderr
    assert listing(workdir) == before
    table = cells(again.stdout)
    done = {name: json.loads((workdir / name / "done.json").read_text()) for name in ("sft", "reft", "rerank_sft")}
    rows, epochs = done["sft"]["rows"], done["sft"]["epochs"]
    assert table["SFT: warm-up and best checkpoint"][0] == str(rows)
    assert table["ReFT: PPO from the warm-up model"][0] == "3 × 16"
    assert table["samples of SFT on test questions"][0] == "7 × 2"
    assert int(table["reranker for SFT"][0]) >= done["rerank_sft"]["rows"]
    assert table["evaluation"][0] == "21 + 28"  # greedy answers of three models, samples that two rerankers judge
    updates = {name: int(row[1]) for name, row in table.items() if row[1] != "-"}
    assert updates["SFT: warm-up and best checkpoint"] == epochs * -(-rows // 16)
    assert updates["ReFT: PPO from the warm-up model"] == 3 * 2  # iterations, passes of one minibatch each
    assert {name for name, row in table.items() if row[-1] == "done"} == set(updates)
    assert "memory" in again.stdout and "sampled tokens per second" in again.stdout
