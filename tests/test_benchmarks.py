"""What benchmarks compute from results that are there already."""

import importlib.util
from pathlib import Path

import pytest
from absl import flags
from test_plan import CHIP, made_up, plan_of

from reft_jax.plan.table import to_json

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def load():
    """Imports a script. Its flags are forgotten afterwards: several scripts have one of the same name."""
    before = set(flags.FLAGS)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize(
    ("script", "ours", "theirs"),
    [("algorithms", ("dapo", "1"), ("ppo", "1")), ("quickstart_seeds", ("mixed", "1", "reft"), ("mixed", "1", "sft"))],
)
def test_answers_of_two_models_are_compared_question_by_question(load, monkeypatch, script, ours, theirs):
    """Each file has the order in which its model's answers ended."""
    module = load(script)
    right = {"toy_1": True, "toy_2": False, "toy_3": True}
    orders = iter((["toy_3", "toy_1", "toy_2"], ["toy_2", "toy_3", "toy_1"]))
    monkeypatch.setattr(module, "folder", lambda *_: Path("run"))
    monkeypatch.setattr(
        module, "read_records", lambda *_: [{"item_id": one, "is_correct": right[one]} for one in next(orders)]
    )
    assert module.answers(*ours).tolist() == module.answers(*theirs).tolist() == [True, False, True]


def test_a_row_of_plans_says_whether_the_run_fits(load):
    """15 % or 10 % of a chip's 1000 bytes to spare, of which a tenth must stay free; a clock of 2 per second."""
    module, names = load("plans"), ("SFT update", "PPO update", "decode, PPO", "decode, sampling")
    for peak, fits, spare in ((600, "yes", "15%"), (651, "no", "10%")):
        plan = plan_of(*(made_up(name, peak) for name in names))
        row = module.row("toy", "v5e:1x2", to_json(plan._replace(chip=CHIP._replace(clock=2.0)), 256, 128))
        assert len(row) == len(module.HEAD) and row[:3] == ["toy", "v5e:1x2", fits] and row[4] == spare
        assert row[5:9] == ["5e+03 / 0", "5e+03 / 0", "5 / 0", "5 / 0"]
