"""Simulates what people do with a run, with the fake models of fakes.py.

`World` performs the acts with the package's own functions; only what needs a real model is replaced (`install`). Every
printed share is compared with the truth, which is computed from scratch and knows nothing of files.
"""

import json
import random
from pathlib import Path

from fakes import COLUMNS, POLICIES, Fakes, Killed, fake_run, printed, truth

from reft_jax.commands import evaluate, sweep
from reft_jax.config import default_config, flatten
from reft_jax.run.inputs import Data, shorten
from reft_jax.run.open import Run
from reft_jax.run.workdir import TITLES
from reft_jax.stages import models as stages
from reft_jax.stages import sample
from reft_jax.tasks.datasets import load_examples
from reft_jax.types import Example, InputError


class World:
    """One work directory, two data files, another folder of checkpoints and another folder for sweeps."""

    def __init__(self, folder: Path, seed: int, fakes: Fakes, capsys):
        self.folder, self.rng, self.fakes, self.capsys = folder, random.Random(seed), fakes, capsys
        self.config = default_config()
        self.config.update_from_flattened_dict({"sample.n": 3, "engine.slots": 8, "model.path": str(folder / "base")})
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        self.workdir, self.files = folder / "run", {name: folder / f"{name}.json" for name in ("test", "other")}
        for path in self.files.values():
            path.write_text(json.dumps([self.question(i) for i in range(self.rng.randint(3, 6))]))
        (self.workdir / "models").mkdir(parents=True)
        (self.workdir / "config.json").write_text(json.dumps({"model.path": str(folder / "base")}))
        for name in POLICIES:
            self.train(name)
        self.log: list[str] = []
        self.compared = 0

    def question(self, i: int) -> dict:
        asked = f"{self.rng.randrange(10**6)} and {i}?"
        return {"item_id": f"toy_{i}", "question": asked, "answer_value": str(self.rng.randrange(3))}

    def examples(self, name: str) -> list[Example]:
        found = load_examples(self.files[name], need_cot=False)
        return shorten(found, self.config.data.test_limit, self.config.seed)

    def run(self) -> Run:
        return fake_run(self.config, self.workdir, self.folder / "base", Data([], [], self.examples("test"), ""))

    # Acts: what a person does between two looks at a table.

    def train(self, name: str | None = None) -> None:
        name = name or self.rng.choice([*POLICIES, "rerank_reft", "rerank_sft"])
        self.fakes.save(self.workdir / "models" / name, str(self.rng.randrange(10**9)))

    def swap_models(self) -> None:
        a, b = (self.workdir / "models" / name for name in POLICIES)
        between = a.with_name("between")
        for old, new in ((a, between), (b, a), (between, b)):
            old.rename(new)

    def new_tokenizer(self) -> None:
        (self.folder / "base" / "tokenizer.json").write_text(str(self.rng.random()))

    def edit_file(self) -> None:
        path = self.files[self.rng.choice(list(self.files))]
        rows = json.loads(path.read_text())
        what, at = (
            self.rng.choice(("answer", "question", "shorten", "lengthen", "shuffle")),
            self.rng.randrange(len(rows)),
        )
        if what == "answer":
            rows[at]["answer_value"] = str((int(rows[at]["answer_value"]) + 1) % 3)
        elif what == "question":
            rows[at]["question"] += " And then?"
        elif what == "shorten" and len(rows) > 1:
            del rows[at]
        elif what == "lengthen":
            rows.append(self.question(100 + self.rng.randrange(10**4)))
        else:
            self.rng.shuffle(rows)
        path.write_text(json.dumps(rows))

    def change_setting(self) -> None:
        values = {
            "sample.n": (1, 2, 3, 4),
            "sample.temperature": (1.0, 0.5),
            "sample.top_k": (50, 0),
            "sample.max_len": (1024, 64),
            "data.format": ("python", "nl"),
            "data.test_limit": (0, 2, 3),
            "seed": (42, 7),
        }
        key = self.rng.choice([*values, "sample.n", "sample.n"])
        self.config.update_from_flattened_dict({key: self.rng.choice(values[key])})

    def damage_samples(self) -> None:
        """Deletes a file, a line or the last newline, tears the last line, drops the header, copies another over."""
        files = [path for path in self.folder.glob("*/samples/**/*.jsonl") if path.parent.name != "aside"]
        if not files:
            return
        path, other = self.rng.choice(files), self.rng.choice(files)
        lines = path.read_text().splitlines(keepends=True)
        what = self.rng.choice(("delete", "line", "newline", "tear", "header", "copy"))
        if what == "delete":
            path.unlink()
        elif what == "line" and len(lines) > 1:
            del lines[self.rng.randrange(1, len(lines))]
            path.write_text("".join(lines))
        elif what == "newline":
            path.write_text("".join(lines).rstrip("\n"))
        elif what == "tear":
            path.write_text("".join(lines)[: -self.rng.randrange(1, 20)])
        elif what == "header":
            path.write_text("".join(lines[1:]))
        elif other.name.split(".")[1:] == path.name.split(".")[1:]:
            path.write_text(other.read_text())

    def sample(self) -> None:
        name = self.rng.choice(POLICIES)
        if self.rng.random() < 0.5:
            self.config.sample.n = self.rng.randint(1, 5)
        if self.rng.random() < 0.3:
            self.dying(lambda: sample.run_sample(self.run(), name, "test"))
        else:
            sample.run_sample(self.run(), name, "test")
            self.evaluate(sampled=name)

    def dying(self, act) -> None:
        self.fakes.dies_after, self.fakes.drawn = self.rng.randrange(8), 0
        try:
            act()
        except Killed:
            pass
        finally:
            self.fakes.dies_after = None

    def evaluate(self, sampled: str = "") -> str:
        """What was printed. With `sampled`, the samples of that model must be in the table."""
        self.capsys.readouterr()
        report = evaluate.run_evaluate(self.run())
        there = {path.name: stages.checksum(self.run(), path.name) for path in (self.workdir / "models").iterdir()}
        assert report["checksums"] == there  # so that an exported card has the figures of these models or none
        out = self.capsys.readouterr().out
        [table] = printed(out)
        titles = {TITLES[name]: name for name in POLICIES}
        assert set(table) == set(titles), out
        for title, row in table.items():
            name, judge = titles[title], self.workdir / "models" / f"rerank_{titles[title]}"
            self.compare(row, self.workdir / "models" / name, judge if judge.exists() else None, "test", out)
            if "voting" not in row or row["n"] < self.config.sample.n:
                noted = f"{title}: " in out.split("\n\n")[-2]  # the files are named last
                assert noted or not any((self.workdir / "samples").glob("*_test.jsonl")), out
            assert (row["n"] or 0) <= self.config.sample.n, out
            if name == sampled:
                assert row["n"] == self.config.sample.n and "voting" in row, out
        return out

    def sweep(self) -> None:
        workdir = self.rng.choice((self.workdir, self.folder / "sweep"))
        names = self.rng.sample(("m", "m_x", "reft", "sft"), 2)
        folders = [self.workdir / "models" / self.rng.choice(POLICIES) for _ in names]
        judges = [self.workdir / "models" / f"rerank_{folder.name}" for folder in folders]
        judges = [judge if judge.exists() and self.rng.random() < 0.7 else None for judge in judges]
        data = dict(zip(self.rng.sample(("x_y", "y", "test", "reft_test"), 2), self.files, strict=True))
        models = ",".join(
            f"{name}={folder}" + (f"+{judge}" if judge else "")
            for name, folder, judge in zip(names, folders, judges, strict=True)
        )
        files = {name: str(self.files[which]) for name, which in data.items()}
        for _ in range(self.rng.choice((1, 2))):  # twice: the second time nothing is drawn
            self.run_sweep(
                workdir, models, files, dict(zip(names, zip(folders, judges, strict=True), strict=True)), data
            )

    def run_sweep(self, workdir: Path, models: str, files: dict, sources: dict, data: dict) -> None:
        def start():
            return sweep.run_sweep(
                self.config, workdir, sweep.parse_checkpoints(models), files, list(flatten(self.config))
            )

        self.capsys.readouterr()
        if self.rng.random() < 0.2:
            self.dying(lambda: self.refused(start, workdir))
            return
        if self.refused(start, workdir):
            return
        out = self.capsys.readouterr().out
        tables = printed(out)
        assert len(tables) == len(data), out
        for table, which in zip(tables, data.values(), strict=True):
            assert set(table) == set(sources), out
            for name, (folder, judge) in sources.items():
                assert table[name]["n"] == self.config.sample.n, out
                self.compare(table[name], folder, judge, which, out)

    def refused(self, start, workdir: Path) -> bool:
        """Whether a sweep was refused because a name stood for another model; its owner then drops the names."""
        try:
            start()
        except InputError as error:
            assert "has answers of another" in str(error), error
            (workdir / "sources.json").unlink()
            return True
        return False

    def compare(self, row: dict, folder: Path, judge: Path | None, which: str, out: str) -> None:
        examples = self.examples(which)
        weights, judging = (one and self.fakes.weights(one, self.folder / "base") for one in (folder, judge))
        expected = truth(self.fakes, weights, judging, self.config, examples, row["n"] or 1)
        for column in COLUMNS.values():
            if column in row:
                self.compared += 1
                assert row[column] == (expected[column], len(examples)), (column, self.log, expected, out)

    def act(self) -> None:
        """One act, drawn at random."""
        acts = [
            self.train,
            self.train,
            self.swap_models,
            self.edit_file,
            self.edit_file,
            self.change_setting,
            self.change_setting,
        ]
        acts += [self.damage_samples, self.damage_samples, self.sample, self.sample, self.sweep, self.sweep]
        act = self.rng.choice([*acts, self.new_tokenizer, self.evaluate, self.evaluate])
        self.log.append(act.__name__)
        act()
