"""Stored answers are used again only for the same model, the same question and the same settings."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from acts import World
from fakes import Fakes, fake_run, printed, save_fake

from reft_jax.commands import evaluate, sweep
from reft_jax.config import default_config
from reft_jax.evaluation.provenance import rewrite
from reft_jax.evaluation.records import read_file
from reft_jax.run.inputs import Data
from reft_jax.run.open import Run
from reft_jax.stages import models as stages
from reft_jax.stages import sample
from reft_jax.train import checksums
from reft_jax.train.checkpoints import save_params
from reft_jax.train.checksums import model_checksum
from reft_jax.types import Example, InputError


@pytest.fixture
def world(tmp_path, monkeypatch, capsys) -> World:
    """SFT and ReFT with a reranker, sampled and evaluated: 6 questions, 3 samples each."""
    fakes = Fakes()
    fakes.install(monkeypatch)
    world = World(tmp_path, 0, fakes, capsys)
    world.train("rerank_reft")
    world.files["test"].write_text(json.dumps([world.question(i) for i in range(6)]))
    look(world, "sft", "reft")
    return world


def look(world: World, *sampled: str) -> str:
    """Samples these models, evaluates, compares every share with the truth; what was printed meanwhile."""
    world.capsys.readouterr()
    for name in sampled:
        sample.run_sample(world.run(), name, "test")
    said = world.capsys.readouterr().out
    return said + world.evaluate(sampled=sampled[-1] if sampled else "")


def file(world: World, name: str) -> Path:
    return world.workdir / "samples" / name


def asides(world: World) -> list[str]:
    return sorted(path.name for path in world.workdir.glob("samples/aside/*"))


def test_the_header_says_what_made_a_file(world):
    [header] = read_file(file(world, "reft_test.jsonl"), "samples").headers
    made, recorded = header["made_by"], header["recorded"]
    assert made == {
        "model": stages.checksum(world.run(), "reft"),
        "format": "python",
        "temperature": 1.0,
        "top_k": 50,
        "max_len": 1024,
        "seed": 42,
        "dtype": "bfloat16",
    }
    assert (recorded["n"], recorded["rows"]) == (3, 6) and len(recorded["data"]) == 16
    assert {"reft_jax", "jax", "commit"} <= recorded["versions"].keys()
    [header] = read_file(file(world, "reft_test.greedy.jsonl"), "greedy").headers
    assert (header["made_by"]["temperature"], header["recorded"]["n"]) == (0.0, 1)
    [header] = read_file(file(world, "reft_test.rerank.jsonl"), "rerank").headers
    assert header["made_by"]["reranker"] == stages.checksum(world.run(), "rerank_reft")


def test_a_second_look_draws_nothing(world):
    world.fakes.drawn = 0
    look(world, "sft", "reft")
    assert world.fakes.drawn == 0 and asides(world) == []


def test_the_other_reading_is_shown_beside_the_table_and_nothing_stored_changes(world, capsys):
    before = {path: path.read_text() for path in world.workdir.rglob("*.jsonl")}
    report = evaluate.run_evaluate(world.run(), both_readings=True)
    rows = {row["model"]: row for row in report["rows"]}
    assert {one["column"] for one in report["readings"]} == {"top1", "voting", "rerank", "upper_bound"}
    for one in report["readings"]:
        assert one["strict"] == rows[one["model"]][one["column"]]
        assert one["lenient"] == {"correct": 0, "total": 6}  # these completions state no answer
    assert "## Strict and lenient reading" in (world.workdir / "report.md").read_text()
    assert {path: path.read_text() for path in world.workdir.rglob("*.jsonl")} == before
    assert "readings" not in evaluate.run_evaluate(world.run())


def test_a_model_that_was_trained_again_is_asked_again(world, capsys):
    old = file(world, "reft_test.greedy.jsonl").read_text()
    world.train("reft")
    evaluate.run_evaluate(world.run())
    said = capsys.readouterr().out
    assert "reft_test.greedy.jsonl: its answers were made by something else (model " in said
    assert (file(world, "aside") / "reft_test.1.greedy.jsonl").read_text() == old  # nothing is thrown away
    assert "ReFT: 0 of 6 test questions are sampled (reft_test.jsonl: its answers were made by something" in said
    assert "`sample --model=reft`" in " ".join(said.split())
    [table] = printed(said)
    assert "voting" not in table["ReFT"] and "voting" in table["SFT"]
    assert "moved to" in look(world, "reft")
    assert asides(world) == ["reft_test.1.greedy.jsonl", "reft_test.1.jsonl", "reft_test.1.rerank.jsonl"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample.temperature", 0.5),
        ("sample.top_k", 7),
        ("sample.max_len", 9),
        ("seed", 1),
        ("data.format", "nl"),
        ("model.dtype", "float32"),
        ("engine.weights", "int8"),
        ("engine.cache", "int8"),
    ],
)
def test_other_settings_draw_other_samples(world, key, value):
    world.config.update_from_flattened_dict({key: value})
    said = look(world, "reft")
    assert "reft_test.jsonl: its answers were made by something else" in said and f"-> {value}" in said
    assert "reft_test.1.jsonl" in asides(world)


def test_a_changed_answer_or_question_is_asked_again_alone(world):
    rows = json.loads(world.files["test"].read_text())
    rows[1]["answer_value"], rows[2]["question"] = "1" if rows[1]["answer_value"] != "1" else "2", "Another?"
    world.files["test"].write_text(json.dumps(rows))
    world.capsys.readouterr()
    evaluate.run_evaluate(world.run())
    assert "4 of 6 test questions are sampled (reft_test.jsonl: 2 have another" in " ".join(
        world.capsys.readouterr().out.split()
    )
    world.fakes.drawn = 0
    said = look(world, "reft")
    assert "reft_test.jsonl: 2 of 6 questions differ from the stored ones (the first is 'toy_" in said
    assert world.fakes.drawn == 2 * 3  # no greedy answer: evaluate has asked again already
    assert len(read_file(file(world, "reft_test.jsonl"), "samples").records) == 6


def test_a_table_is_about_the_rows_asked_for(world):
    world.config.data.test_limit = 2
    world.fakes.drawn = 0
    said = look(world, "reft")
    assert "2 test questions" in said and world.fakes.drawn == 0
    world.config.data.test_limit = 0
    assert "6 test questions" in look(world, "reft") and world.fakes.drawn == 0  # the others were kept


def test_more_samples_are_added_to_those_that_are_there(world):
    before = read_file(file(world, "reft_test.jsonl"), "samples").records
    world.config.sample.n = 5
    world.capsys.readouterr()
    evaluate.run_evaluate(world.run())
    assert "ReFT: 3 of 5 samples are drawn of every question" in world.capsys.readouterr().out
    world.fakes.drawn = 0
    assert "6 of 6 questions have fewer than 5 samples; more are drawn" in look(world, "reft")
    assert world.fakes.drawn == 6 * 2
    stored = read_file(file(world, "reft_test.jsonl"), "samples")
    after = {record["item_id"]: record["predictions"] for record in stored.records}
    assert all(after[one["item_id"]][:3] == one["predictions"] for one in before) and not stored.repeats
    world.config.sample.n = 2  # fewer: the first ones
    look(world, "reft")
    assert world.fakes.drawn == 6 * 2


def test_more_samples_that_are_interrupted_are_kept(world):
    world.config.sample.n = 5
    world.fakes.dies_after, world.fakes.drawn = 10, 0
    with pytest.raises(BaseException, match="^$"):
        sample.run_sample(world.run(), "reft", "test")
    world.fakes.dies_after = None
    stored = read_file(file(world, "reft_test.jsonl"), "samples")
    kept = sum(len(record["predictions"]) - 3 for record in stored.records)
    assert stored.repeats and 0 < kept < 12 and len(stored.headers) == 2
    world.fakes.drawn = 0
    look(world, "reft")
    assert world.fakes.drawn == 12 - kept


def test_a_missing_line_is_told_and_made_again(world):
    path = file(world, "reft_test.jsonl")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    world.capsys.readouterr()
    evaluate.run_evaluate(world.run())
    assert "ReFT: 5 of 6 test questions are sampled; `sample --model=reft`" in world.capsys.readouterr().out
    path.unlink()
    evaluate.run_evaluate(world.run())
    assert "ReFT: 0 of 6 test questions are sampled; `sample --model=reft`" in world.capsys.readouterr().out
    look(world, "reft")


def test_a_last_line_without_its_newline_is_kept(world):
    for name in ("reft_test.jsonl", "reft_test.greedy.jsonl", "reft_test.rerank.jsonl"):
        path = file(world, name)
        path.write_text(path.read_text().rstrip("\n"))
    world.fakes.drawn = 0
    world.config.sample.n = 4  # appends to the file
    look(world, "reft")
    assert world.fakes.drawn == 6


def test_a_file_that_does_not_say_what_made_it_moves_aside(world):
    path = file(world, "reft_test.greedy.jsonl")
    rewrite(path, [], read_file(path, "greedy").records)  # as an older version wrote it
    said = look(world)
    assert "reft_test.greedy.jsonl: it does not say what made it; moved to" in said
    assert asides(world) == ["reft_test.1.greedy.jsonl"]


def test_samples_copied_over_those_of_another_model_are_not_its(world):
    shutil.copy(file(world, "sft_test.jsonl"), file(world, "reft_test.jsonl"))
    assert "reft_test.jsonl: its answers were made by something else (model" in look(world, "reft")


def test_scores_of_other_completions_are_given_again(world):
    path = file(world, "reft_test.jsonl")
    stored = read_file(path, "samples")
    stored.records[0]["predictions"][0]["completion"] += " "  # another machine may draw so
    rewrite(path, stored.headers, stored.records)
    evaluate.run_evaluate(world.run())
    said = world.capsys.readouterr().out
    assert "reft_test.rerank.jsonl: 1 of 6 questions differ from the stored ones" in said


def test_a_reranker_that_was_trained_again_scores_again(world):
    for _ in range(5):  # by chance one may choose as the other
        world.train("rerank_reft")
        said = look(world)
        assert "reft_test.rerank.jsonl: its answers were made by something else (reranker " in said


def test_other_versions_are_told(world, monkeypatch):
    monkeypatch.setattr(sample, "commit", lambda: "abc-dirty")
    said = look(world)
    assert said.count("samples: has answers made with other versions (commit ") == 1 and "-> abc-dirty" in said


# --- a model's checksum


def test_a_saved_model_is_known_by_its_arrays_wherever_it_lies(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    memory = tmp_path / "checksums.json"
    for name, values in (("a", [1.0, 2.0]), ("same", [1.0, 2.0]), ("other", [2.0, 1.0])):
        save_params(tmp_path / name, {"x": np.array(values, np.float32)})
    found = {name: model_checksum(tmp_path / name, base, memory) for name in ("a", "same", "other")}
    assert found["a"] == found["same"] != found["other"]
    (base / "tokenizer.json").write_text("{}")
    assert model_checksum(tmp_path / "a", base, memory) != found["a"]
    cut = tmp_path / "a" / "arrays.json"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(InputError, match="a: the model is damaged .* restore it from a copy or remove it"):
        model_checksum(tmp_path / "a", base, memory)


def test_a_hugging_face_folder_is_hashed_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    folder, memory, hashed = tmp_path / "model", tmp_path / "checksums.json", []
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (folder / name).write_text("12345678")
    hash_file = checksums._hash
    monkeypatch.setattr(checksums, "_hash", lambda path: hashed.append(path.name) or hash_file(path))
    monkeypatch.setattr(checksums, "SETTLED_NS", 0)

    def checksum() -> tuple[str, list[str]]:
        hashed.clear()
        return model_checksum(folder, folder, memory), sorted(hashed)

    first, seen = checksum()
    assert seen == ["config.json", "model.safetensors", "tokenizer.json"]
    assert checksum() == (first, [])
    (folder / "README.md").write_text("another")
    assert checksum() == (first, [])
    at = (folder / "model.safetensors").stat()
    (folder / "model.safetensors").write_text("12345679")  # the same size, and the time set back
    os.utime(folder / "model.safetensors", ns=(at.st_atime_ns, at.st_mtime_ns))
    second, seen = checksum()
    assert second != first and seen == ["model.safetensors"]
    memory.write_text("{")  # torn: forgotten
    assert checksum()[0] == second
    shutil.copytree(folder, tmp_path / "moved")
    assert model_checksum(tmp_path / "moved", tmp_path / "moved", memory) == second
    monkeypatch.setattr(checksums, "SETTLED_NS", 10**18)  # a file this new may change without a trace
    assert checksum()[1] == ["config.json", "model.safetensors", "tokenizer.json"]


# --- finished stages

COUNTS = {"best": 1, "epochs": 2, "iterations": 3, "rows": 4, "positive": 0.5}
OLDER = COUNTS | {"seconds": 1.0, "checksum": "0"}  # without data and sources, as earlier versions wrote it


def stage_run(tmp_path: Path, train: str = "1 and 2?", dev: str = "3 and 4?", **settings) -> Run:
    config = default_config()
    config.update_from_flattened_dict(settings)
    (tmp_path / "base").mkdir(exist_ok=True)
    data = Data([Example("toy_0", train, "3", "x")], [Example("toy_1", dev, "7")], [], "")
    return fake_run(config, tmp_path, tmp_path / "base", data)


def finish(run: Run, stage: str, *sources: str) -> None:
    (run.workdir.path / stage).mkdir(exist_ok=True)
    result = OLDER | {"data": run.inputs.data_made, "from": stages.sources(run, *sources)}
    (run.workdir.path / stage / "done.json").write_text(json.dumps(result))


def test_a_finished_stage_knows_the_data_it_was_trained_on(tmp_path, capsys):
    finish(stage_run(tmp_path), "sft")
    assert stages.finished(stage_run(tmp_path), "sft")["best"] == 1
    assert "chosen on other dev questions" not in capsys.readouterr().out
    other = stage_run(tmp_path, train="5 and 6?")
    for command in (
        lambda: stages.finished(other, "sft"),
        lambda: stages.finished(other, "reft"),  # which begins from its models
        lambda: sample.run_sample(other, "warmup", "train"),
    ):
        with pytest.raises(InputError, match="sft: this stage was trained on other rows than .* bring them back"):
            command()
    assert evaluate.others(other, {"sft": stages.done(other, "sft")}) == [
        "sft: was trained with other train questions than there are now."
    ]
    assert stages.finished(stage_run(tmp_path, dev="5 and 6?"), "sft")
    assert "chosen on other dev questions" in capsys.readouterr().out
    stages.finished(stage_run(tmp_path, train="5 and 6?", **{"data.train_limit": 1}), "sft")  # changed on purpose
    (tmp_path / "sft" / "done.json").write_text(json.dumps(OLDER))
    stages.finished(other, "sft")


def test_a_finished_stage_knows_the_models_it_was_trained_from(tmp_path):
    run = stage_run(tmp_path)
    for name in ("warmup", "reft"):
        save_fake(tmp_path / "models" / name, name)
    finish(run, "rerank_reft", "reft", "warmup")
    assert stages.finished(run, "rerank_reft")
    save_fake(tmp_path / "models" / "reft", "trained again")
    with pytest.raises(InputError, match=r"rerank_reft: .* trained from another model \(models/reft was .* remove"):
        stages.finished(run, "rerank_reft")
    [note] = evaluate.others(run, {"rerank_reft": stages.done(run, "rerank_reft")})
    assert note.startswith("rerank_reft: was trained from another model than there is now (models/reft was ")


# --- sweeps


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a"],
        ["a", "A"],
        ["a/b"],
        [""],
        [".."],
        [".a"],
        ["a.greedy"],
        ["a.rerank"],
        ["a.jsonl"],
        ["aside"],
        ["a" * 300],
    ],
)
def test_names_that_could_collide_are_refused(names):
    with pytest.raises(InputError, match="write NAME=PATH"):
        sweep.check_names("--data", names)


def test_every_model_and_data_file_of_a_sweep_has_a_file_of_its_own(world):
    config, models = world.config, world.workdir / "models"
    arguments = f"m={models / 'sft'},m_x={models / 'reft'},reft={models / 'reft'}"
    files = {"x_y": str(world.files["test"]), "y": str(world.files["other"]), "test": str(world.files["other"])}
    before = {path: path.read_bytes() for path in (world.workdir / "samples").glob("*.jsonl")}
    world.fakes.drawn = 0
    checkpoints = sweep.parse_checkpoints(arguments)
    reports = sweep.run_sweep(config, world.workdir, checkpoints, files, list(config_keys(config)))
    rows = len(world.examples("test")) + 2 * len(world.examples("other"))
    assert world.fakes.drawn == 3 * rows * (1 + config.sample.n)  # in a run's own folder, and its samples stay
    assert {path: path.read_bytes() for path in before} == before
    assert [report["test_questions"] for report in reports] == [6, len(world.examples("other"))] + [
        len(world.examples("other"))
    ]
    sources = json.loads((world.workdir / "sources.json").read_text())
    assert sources["model m_x"] == sources["model reft"] == stages.checksum(world.run(), "reft")


def config_keys(config) -> list[str]:
    from reft_jax.config import flatten

    return list(flatten(config))
