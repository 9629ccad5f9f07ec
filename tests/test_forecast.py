"""`check --workdir`: what it says of a run is what the run does; it writes nothing there."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny import tiny_model

from reft_jax.commands import forecast
from reft_jax.commands.forecast import Costs, Forecast
from reft_jax.commands.pipeline import steps
from reft_jax.config import load_config
from reft_jax.train.progress import clock
from reft_jax.train.state import abstract_params
from reft_jax.types import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def by_hand(monkeypatch):
    """10 SFT rows with answers of 4 and 6 tokens, 8 PPO questions, 5 dev and 6 test questions; round costs."""
    config = load_config(str(ROOT / "configs" / "quickstart.py"))
    config.sft.update(epochs=3, warmup_epoch=1, eval_every=2, batch_size=4)
    config.rl.update(iterations=4, questions=8, micro_batch=4, ppo_epochs=2, minibatches=2, eval_every=2)
    config.sample.update(n=3, train_n=2, train_limit=7)
    config.rerank.update(epochs=2, batch_size=4)
    rows = [([0] * 14, 10, "a")] * 5 + [([0] * 16, 10, "b")] * 5
    data = SimpleNamespace(train=[None] * 10, dev=[None] * 5, test=[None] * 6)
    inputs = SimpleNamespace(sft_rows=rows, data=data, questions=[None] * 8)
    monkeypatch.setattr(forecast, "abstract_policy", lambda run: {})
    monkeypatch.setattr(forecast, "abstract_reranker", lambda run: {})
    costs = Costs(sft_row=7.0, token=0.2, score_row=2.0, update_row=3.0, memory=2**30, compiling=1.0)
    return Forecast(SimpleNamespace(config=config, inputs=inputs), costs)


@pytest.mark.parametrize(
    "title, rows, updates, seconds",
    [
        # a completion: 5 tokens of 0.2 s; dev: 5 completions
        ("SFT: warm-up and best checkpoint", "10", 9, 3 * 10 * 7 + 3 * 5),  # evaluated after epochs 1, 2 and 3
        ("ReFT: PPO from the warm-up model", "4 × 8", 16, 4 * 8 * (1 + 2 + 2 * 3) + 3 * 5),  # after 0, 2 and 4
        ("samples of the warm-up model on training questions", "7 × 2", 0, 14),
        ("samples of ReFT on test questions", "6 × 3", 0, 18),
        ("reranker for ReFT", "14", 8, 2 * 14 * 7),
        ("evaluation", "18 + 36", 0, 18 + 36 * 2 / 2),  # greedy: the warm-up model, SFT, ReFT
    ],
)
def test_rows_updates_and_seconds_by_hand(by_hand, title, rows, updates, seconds):
    chain = steps(by_hand.run.config, baselines=False)
    (step,) = [one for one in chain if one.title == title]
    found = by_hand.expected(step, chain)
    assert (found.rows, found.updates) == (rows, updates) and found.seconds == pytest.approx(seconds)


def test_sampled_tokens_end_a_stage_earlier(by_hand):
    """An iteration samples 8 answers of 5 tokens, twice as many if it asks twice; there are 4 iterations at most."""
    for tokens, asked, made in ((80, 1.0, 2), (81, 1.0, 3), (81, 2.0, 2), (1000, 1.0, 4)):
        by_hand.config.rl.tokens, by_hand.costs = tokens, by_hand.costs._replace(asked=asked)
        chain = steps(by_hand.run.config, baselines=False)
        (step,) = [one for one in chain if one.title.startswith("ReFT")]
        assert by_hand.expected(step, chain).rows == f"{made} × 8"


def test_a_stage_that_is_done_is_not_counted(by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(Forecast, "sizes", lambda self, abstract: (2**30, 2**31))
    chain = steps(by_hand.run.config, baselines=False)[:2]
    first = "\n".join(by_hand.lines(chain, tmp_path))
    assert "about 0:08:48 for what is not done" in first and "done |" not in first  # 225 and 303 s, as above
    assert "3.0 GiB of models stay; at most 2.0 GiB more" in first
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "done.json").write_text("{}")
    assert "about 0:05:03 for what is not done" in "\n".join(by_hand.lines(chain, tmp_path))


def test_saved_steps_of_a_stage_are_not_counted(by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(Forecast, "sizes", lambda self, abstract: (2**30, 2**31))
    for step, file in {"sft/checkpoints/3": "manifest.json", "sft/checkpoints/6": "step.json"}.items():
        (tmp_path / step).mkdir(parents=True)  # 6 is not whole
        (tmp_path / step / file).write_text("{}")
    (tmp_path / "reft" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "reft" / "checkpoints" / "1" / "manifest.json").write_text("{}")
    said = "\n".join(by_hand.lines(steps(by_hand.run.config, baselines=False)[:2], tmp_path))
    seconds = 225 * (1 - 3 / 9) + 303 * (1 - 1 / 4)  # 9 updates and 4 iterations
    assert f"about {clock(seconds)} for what is not done" in said and clock(seconds) == "0:06:17"
    assert "saved steps are not made again: sft 3 of 9, reft 1 of 4" in said
    assert "asks" not in said


def test_questions_that_are_drawn_again_are_counted(by_hand, tmp_path, monkeypatch):
    monkeypatch.setattr(Forecast, "sizes", lambda self, abstract: (0, 0))
    by_hand.costs = by_hand.costs._replace(asked=2.5)
    chain = steps(by_hand.run.config, baselines=False)[:2]
    assert by_hand.expected(chain[1], chain).seconds == pytest.approx(4 * 8 * (2.5 * 1 + 2 + 2 * 3) + 3 * 5)
    said = "\n".join(by_hand.lines(chain, tmp_path))
    assert "an iteration of ReFT asks 2.5 times its questions, as here (rl.redraws)" in said


def test_the_rehearsal_counts_questions_that_are_drawn_again(monkeypatch):
    """Of 8 questions 8 and 4 were drawn again in its two iterations."""
    redrawn = iter([8, 4])

    def iterate(run, functions, state, models, asked, number, rewards):
        seconds = dict.fromkeys(("seconds_rollout", "seconds_reward", "seconds_score", "seconds_update"), 1.0)
        return state, seconds | {"tokens": 10, "redrawn": next(redrawn)}, [], None

    config = load_config(str(ROOT / "configs" / "quickstart.py"))
    config.rl.update(questions=8, micro_batch=4, minibatches=2)
    training = SimpleNamespace(state={}, shardings=None, lora=None, base=None, params={})
    for name, made in {
        "Training": lambda *args: nullcontext(training),
        "abstract_policy": lambda run: {},
        "base_policy": lambda *args: {"lm": {}},
        "make_step": lambda *args: lambda state, batch, count, base: (state, 0.0),
        "make_batch": lambda run, rows: (SimpleNamespace(count=1), None, None),
        "make_iteration": lambda *args: None,
        "open_rewards": lambda run: nullcontext(),
        "iterate": iterate,
    }.items():
        monkeypatch.setattr(forecast, name, made)
    machine = SimpleNamespace(mesh=None, model=SimpleNamespace(dtype=None))
    inputs = SimpleNamespace(sft_rows=[1, 2], questions=[1, 2, 3])
    found = forecast.rehearse(SimpleNamespace(config=config, machine=machine, inputs=inputs))
    assert found.asked == 1 + 12 / 16 and found.token == 0.2


def test_with_lora_the_disk_holds_adapters_only(by_hand):
    """Of rank 3 on the query matrices [2 layers, 24, 4 heads, 8] and the down projections [2, 40, 24]; float32."""
    abstract = abstract_params(tiny_model()[0])
    by_hand.config.lora.update(rank=3, targets="q,down")
    by_hand.config.keep_steps = 2
    adapter = 4 * 2 * 3 * ((24 + 4 * 8) + (40 + 24))
    model, working = by_hand.sizes(abstract)
    assert model == adapter
    assert working == pytest.approx(3 * 4 * adapter, abs=100)  # 3 steps, with two moments, and 3 models; counters
    by_hand.config.lora.rank = 0
    assert by_hand.sizes(abstract)[0] == 4 * sum(x.size for x in jax.tree.leaves(abstract)) > 4 * adapter


def test_it_runs_on_one_host(monkeypatch):
    monkeypatch.setattr(forecast.hosts, "count", lambda: 2)
    with pytest.raises(InputError, match="runs on one host; `plan`"):
        forecast.run_forecast(None, Path("runs/x"), [], "pipeline", False)
