"""What the training stages share."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import tiny_policy

from reft_jax import save_hf
from reft_jax.config import check_config, default_config, load_config
from reft_jax.parallel.mesh import make_mesh, on_mesh
from reft_jax.run.inputs import Data, Inputs
from reft_jax.stages import loop
from reft_jax.stages.loop import Training
from reft_jax.stages.models import abstract_policy, base_policy, load_model, start_policy
from reft_jax.train.checkpoints import save_params
from reft_jax.train.metrics import read_metrics
from reft_jax.train.trackers import MetricsWriter

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"


def test_a_run_goes_on_with_the_value_head_of_an_exported_folder(tmp_path, capsys):
    model, params = tiny_policy()
    config = check_config(load_config(str(CONFIG)))
    save_hf(tmp_path / "exported", model, params["lm"], value_head=params["value_head"])
    save_hf(tmp_path / "bare", model, params["lm"])
    mesh = make_mesh(1, 1, 1)
    with on_mesh(mesh):
        found = {
            name: base_policy(Inputs(config, tmp_path / name, None, Data([], [], [], "")), mesh, model)
            for name in ("exported", "bare")
        }
    jax.tree.map(np.testing.assert_array_equal, found["exported"], params)
    assert "the value head is that of" in capsys.readouterr().out
    assert not np.any(found["bare"]["value_head"]["weight"])  # the quickstart's value_init is 0


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
@pytest.mark.parametrize("saved", ["value_head", ""])
def test_the_warm_up_model_has_the_heads_of_the_algorithm(tmp_path, algorithm, saved):
    """GRPO leaves a value head out; PPO makes one if the warm-up model was made without a critic."""
    config = load_config(str(CONFIG))
    config.rl.algorithm = algorithm
    model, params = tiny_policy(saved)
    mesh, inputs = make_mesh(1, 1, 1), SimpleNamespace(config=check_config(config), base=tmp_path)
    run = SimpleNamespace(config=inputs.config, machine=SimpleNamespace(mesh=mesh, model=model), inputs=inputs)
    run.workdir = SimpleNamespace(path=tmp_path, model=lambda name: tmp_path / name)
    with on_mesh(mesh):
        save_params(tmp_path / "warmup", params)
        found = start_policy(run)
    assert found.keys() == jax.tree.map(lambda x: 0, abstract_policy(run)).keys()
    assert ("value_head" in found) == (algorithm == "ppo")
    for name in params.keys() & found.keys():
        jax.tree.map(np.testing.assert_array_equal, found[name], params[name])
    assert load_model(run, "warmup").keys() == params.keys()


class Begun(Training):
    """A stage of PPO whose state is its iteration, and whose dev accuracies are known."""

    def __init__(self, tmp_path, monkeypatch, dev_top1: dict[int, float], **rl):
        config = default_config()
        config.rl.update({"questions": 64, "iterations": max(dev_top1), "eval_every": 1, "save_every": 1} | rl)
        inputs = Inputs(config, tmp_path, None, Data([], [], [], ""))
        self.run, self.folder = SimpleNamespace(config=config, inputs=inputs), tmp_path / "reft"
        self.done, self.state, self.pending = 0, SimpleNamespace(params={"lm": 0}), {}
        self.base = self.lora = self.adapter = None
        self.info, self.metrics = {"best": 0, "best_dev_top1": -1.0}, MetricsWriter(self.folder)
        self.kept, self.evaluated = [], []
        monkeypatch.setattr(loop, "save_params", lambda folder, *_: self.kept.append(folder.name))
        monkeypatch.setattr(loop, "greedy", lambda run, lm, *_: self.evaluated.append(lm) or [dev_top1[lm]])
        monkeypatch.setattr(loop, "top1", lambda graded: graded[0])

    def check_finite(self):
        pass

    def save(self):
        pass

    def train(self, rewards: dict[int, float], kl: float = 0.1) -> None:
        with self.metrics:
            for iteration, _ in self.iterations(64, shown=("reward", "kl")):
                line = {"reward": rewards.get(iteration, 0.4), "kl": kl * iteration, "tokens": 10}
                self.done, self.state, self.pending = iteration, SimpleNamespace(params={"lm": iteration}), line


def test_iteration_0_is_evaluated_and_wins_if_no_other_is_better(tmp_path, monkeypatch, capsys):
    stage = Begun(tmp_path, monkeypatch, {0: 0.4, 1: 0.2, 2: 0.4, 3: 0.0})
    stage.train({})
    assert stage.evaluated == [0, 1, 2, 3] and stage.kept == ["best_0"]
    assert (stage.info["best"], stage.info["best_dev_top1"], stage.info["start_dev_top1"]) == (0, 0.4, 0.4)
    assert [line["step"] for line in read_metrics(stage.folder)] == [1, 2, 3]
    assert "warning: reft: no iteration was better on dev than the warm-up model" in capsys.readouterr().err


def test_a_later_iteration_that_is_better_wins(tmp_path, monkeypatch, capsys):
    stage = Begun(tmp_path, monkeypatch, {0: 0.4, 1: 0.2, 2: 0.5, 3: 0.5})
    stage.train({})
    assert stage.kept == ["best_0", "best_2"] and stage.info["best"] == 2 and stage.info["start_dev_top1"] == 0.4
    assert "warning" not in capsys.readouterr().err


def test_a_stage_that_resumes_does_not_evaluate_iteration_0(tmp_path, monkeypatch):
    stage = Begun(tmp_path, monkeypatch, {0: 0.4, 1: 0.2, 2: 0.5, 3: 0.6})
    stage.done, stage.info = 2, {"best": 2, "best_dev_top1": 0.5, "start_dev_top1": 0.4}
    stage.train({})
    assert stage.evaluated == [3] and stage.info["start_dev_top1"] == 0.4


def test_a_stage_that_is_already_beyond_its_iterations_ends(tmp_path, monkeypatch):
    """`rl.iterations` was lowered on purpose, after it was stopped."""
    stage = Begun(tmp_path, monkeypatch, {0: 0.4, 1: 0.2, 2: 0.5}, eval_every=10)
    stage.done, stage.state, stage.pending = 3, SimpleNamespace(params={"lm": 2}), {"reward": 0.4, "kl": 0.2}
    stage.info = {"best": 0, "best_dev_top1": 0.4, "start_dev_top1": 0.4}
    stage.train({})
    assert stage.done == 3 and stage.evaluated == [2] and stage.info["best"] == 3


@pytest.mark.parametrize("lowered", [{"iterations": 3}, {"iterations": 2}, {"tokens": 30}])
def test_an_iteration_that_becomes_the_last_one_later_is_evaluated_once(tmp_path, monkeypatch, capsys, lowered):
    """It was written and saved without an evaluation; then `rl.iterations` or `rl.tokens` was lowered."""
    rl = {"eval_every": 10} | lowered
    for evaluated in ({}, {"evaluated": 3, "best": 3, "best_dev_top1": 0.5}):
        stage = Begun(tmp_path / str(len(evaluated)), monkeypatch, {0: 0.4, 3: 0.5, 9: 0.9}, **rl)
        stage.done, stage.state = 3, SimpleNamespace(params={"lm": 3})
        stage.info = {"best": 0, "best_dev_top1": 0.4, "start_dev_top1": 0.4, "tokens": 30} | evaluated
        stage.train({})
        assert stage.done == stage.info["best"] == 3 and stage.evaluated == ([] if evaluated else [3])
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "last"), [(20, 2), (21, 3), (100, 4)])
def test_the_iteration_that_reaches_the_tokens_is_the_last_and_is_evaluated(
    tmp_path, monkeypatch, capsys, tokens, last
):
    """Also after a resume, in which the iteration before is saved and not written yet."""
    dev, rl = dict.fromkeys(range(5), 0.4), {"tokens": tokens, "eval_every": 10}
    stage = Begun(tmp_path, monkeypatch, dev, **rl)
    stage.train({})
    assert stage.done == last and stage.evaluated == [0, last] and stage.info["tokens"] == 10 * last
    assert f"reft  {last}/{last} iterations  100 %" in capsys.readouterr().err  # not {last}/4
    for written in (1, 2):
        again = Begun(tmp_path / str(written), monkeypatch, dev, **rl)
        again.done, again.state, again.info["tokens"] = 2, SimpleNamespace(params={"lm": 2}), 10 * written
        again.pending = {"reward": 0.4, "kl": 0.2, "tokens": 10} if written == 1 else {}
        again.train({})
        assert again.done == last and again.info["tokens"] == 10 * last


def test_a_collapse_is_warned_of_as_it_happens_and_after_a_resume(tmp_path, monkeypatch, capsys):
    warning = "warning: reft: iteration 3 looks ruined: mean reward 0.000, 0.400 at the beginning; KL 27 nats per row"
    dev = dict.fromkeys(range(5), 0.4)
    Begun(tmp_path, monkeypatch, dev).train({3: 0.0, 4: 0.0}, kl=9)
    assert capsys.readouterr().err.count(warning) == 1
    stage = Begun(tmp_path / "again", monkeypatch, dev)  # the first two iterations were those of an earlier start
    for step in (1, 2):
        stage.metrics.write(step, {"reward": 0.4, "kl": 9 * step})
    stage.done, stage.info = 2, {"best": 2, "best_dev_top1": 0.5}
    stage.train({3: 0.0, 4: 0.0}, kl=9)
    assert capsys.readouterr().err.count(warning) == 1


def test_progress_expects_as_many_iterations_as_the_tokens_last_for():
    assert loop.expected(100, 0, 5, 50) == loop.expected(100, 1000, 0, 0) == 100
    assert loop.expected(100, 1000, 5, 60) == 84 and loop.expected(70, 1000, 5, 60.0) == 70  # 83.3: the last reaches it
    assert loop.expected(100, 50, 5, 60) == loop.expected(3, 0, 5, 60) == 5
