"""Self-training: the rows that it trains on, its loss against a slow version, and that a killed run resumes."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from faults.starts import VARYING
from test_pipeline import ROOT, command, metrics, run
from tiny import tiny_policy, tiny_state

from reft_jax.config import default_config
from reft_jax.parallel.mesh import make_mesh
from reft_jax.run.inputs import Data, Inputs
from reft_jax.stages.rollout import Graded
from reft_jax.stages.self_train import offline_rows, online_batch
from reft_jax.tasks.tokenizer import decode, train_bpe
from reft_jax.train.packing import pack_targets
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import SelfTrainBatch, make_step, self_train_loss
from reft_jax.types import Completion, Example, Prompt, Verdict

GOLD = "def solution():\n    return 3"
EXAMPLES = [Example(f"svamp_{i}", f"{i} and 3?", "3", GOLD) for i in range(3)]
TOKENIZER = train_bpe([GOLD, "Question:\n1 and 3?\nAnswer reasoning:\n"], 300)


def text_run(examples=EXAMPLES, **settings) -> SimpleNamespace:
    """The parts of a run that rows are made of."""
    config = default_config()
    config.data.pad_multiple = 32
    config.update_from_flattened_dict(settings)
    return SimpleNamespace(config=config, inputs=Inputs(config, Path(), TOKENIZER, Data(examples, [], [], "")))


def predictions(*texts: str, correct: bool = True) -> list[dict]:
    return [{"completion": text, "solving_res": 3.0, "correctness": correct} for text in texts]


def targets(rows) -> list[str]:
    assert all(ids[-1] == TOKENIZER.eos_token_id for ids, _, _ in rows)
    return [decode(TOKENIZER, ids[prompt_len:]) for ids, prompt_len, _ in rows]


# --- which rows


def test_offline_rows_are_the_gold_solution_and_the_first_distinct_correct_samples():
    first = [
        "def solution():\n    return 1 + 2",
        "def solution():\n    return 4 - 1",
        "def solution():\n    return 6/2",
    ]
    repeats = predictions(first[0], f" {first[0]}\n", first[1], first[0], first[2])
    wrong = predictions("def solution():\n    return 4", correct=False)
    records = [
        {"item_id": "svamp_0", "predictions": wrong + repeats},
        {"item_id": "svamp_1", "predictions": wrong + predictions(GOLD, first[2])},
    ]
    rows = offline_rows(text_run(**{"self_train.samples": 2}), records)
    assert targets(rows) == [GOLD, first[0], first[1], GOLD, first[2], GOLD]
    prompts = [decode(TOKENIZER, ids[:prompt_len]) for ids, prompt_len, _ in rows]
    assert prompts == [f"Question:\n{i} and 3?\nAnswer reasoning:\n" for i in (0, 0, 0, 1, 1, 2)]


def test_offline_rows_of_nl_end_in_the_answer_phrase_once():
    run = text_run([EXAMPLES[0]._replace(answer_cot="1 + 2 = 3.")], **{"data.format": "nl"})
    said = "It is 3.\nTherefore, the answer is: 3"
    rows = offline_rows(run, [{"item_id": "svamp_0", "predictions": predictions(said)}])
    assert targets(rows) == ["1 + 2 = 3.\nTherefore, the answer is: 3", said]


def test_offline_rows_that_are_too_long_are_left_out_whole(capsys):
    records = [{"item_id": "svamp_0", "predictions": predictions(GOLD + "  # and so on" * 200)}]
    rows = offline_rows(text_run(**{"sft.max_len": 512, "data.max_dropped": 0.5}), records)
    assert targets(rows) == [GOLD] * 3
    assert "sft.max_len=512: 1 of 4 rows are longer and left out" in capsys.readouterr().out


def graded(correct: list[bool]) -> tuple[list[Prompt], list[Graded]]:
    """A response of 4 tokens, the last one EOS, to a prompt of 6, a question."""
    prompts = [Prompt(e.item_id, 0, np.arange(10, 16)) for e in EXAMPLES]
    tokens = np.array([20, 21, 22, TOKENIZER.eos_token_id], np.int32)
    verdicts = [Verdict(3.0 if right else 4.0, right, 1.0 if right else 0.1, "ok") for right in correct]
    return prompts, [Graded(Completion("", 0, tokens, np.zeros(4), True), "", verdict) for verdict in verdicts]


ONLINE = {"rl.questions": 4, "rl.micro_batch": 2, "rl.max_len": 64}


def decided(packing, weights) -> dict[tuple, float]:
    """{(the token before, the token decided on): what it weighs}, of one half."""
    tokens, places = packing.lines.tokens, packing.lines.decisions
    return {
        (int(tokens[m, b, place]), int(tokens[m, b, place + 1])): float(weights[m, b, w])
        for (m, b, w), place in np.ndenumerate(places)
        if place >= 0 and weights[m, b, w]
    }


def test_online_trains_responses_of_correct_rows_and_gold_targets_half_each():
    run, gold = text_run(**ONLINE), [text_run().inputs.row(e, GOLD) for e in EXAMPLES]
    packing, weights = online_batch(run, *graded([True, False, True]), gold)
    # Two correct rows of 4 tokens: the decision after the prompt's last token is the first, EOS is the last.
    eos = TOKENIZER.eos_token_id
    expected = dict.fromkeys([(15, 20), (20, 21), (21, 22), (22, eos)], 0.5 / 8)
    assert decided(packing, weights.sampled) == pytest.approx(expected)
    gold_tokens = sum(len(ids) - prompt_len for ids, prompt_len, _ in gold)
    assert np.count_nonzero(weights.gold) == gold_tokens
    assert weights.gold.max() == pytest.approx(0.5 / gold_tokens)
    assert not np.any((weights.gold > 0) & (weights.sampled > 0))
    assert packing.lines.tokens.shape[:2] == (4, 2)  # room for 8 rows, a line each, whatever is correct


def test_online_without_a_correct_row_is_half_of_the_gold_loss():
    run, gold = text_run(**ONLINE), [text_run().inputs.row(e, GOLD) for e in EXAMPLES]
    packing, weights = online_batch(run, *graded([False] * 3), gold)
    assert not np.any(weights.sampled)
    assert weights.gold.sum() == pytest.approx(0.5)
    assert not np.isin(20, packing.lines.tokens)


# --- the loss

MODEL, PARAMS = tiny_policy()
LONGEST = 24
forward = jax.jit(lambda tokens: MODEL.apply({"params": PARAMS["lm"]}, tokens))


def numpy_cross_entropy(rows) -> float:
    """The mean over the target tokens of all rows, row by row from full logits."""
    costs = []
    for ids, prompt_len in rows:
        logits = np.asarray(forward(np.pad(ids, (0, LONGEST - len(ids)))[None]))[0].astype(np.float64)
        for place in range(prompt_len, len(ids)):
            before = logits[place - 1]
            costs.append(np.log(np.exp(before - before.max()).sum()) + before.max() - before[ids[place]])
    return float(np.mean(costs))


@pytest.fixture(scope="module")
def step():
    optimizer = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0)
    _, where = tiny_state(MODEL, PARAMS, optimizer, make_mesh(1, 1, 1))
    jitted = make_step(self_train_loss, MODEL, optimizer, where)
    return lambda batch, count: jitted(tiny_state(MODEL, PARAMS, optimizer)[0], batch, count)


@pytest.mark.parametrize("correct", [3, 0])
def test_the_online_loss_equals_a_slow_twin(step, correct):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 61, length).tolist(), prompt) for length, prompt in ((12, 3), (7, 6), (20, 9), (15, 2))]
    sampled, gold = (rows * 2)[:correct], rows
    packing = pack_targets([*sampled, *gold], max_len=LONGEST, micro_batch=2, micro_batches=4, multiple=8)
    is_gold = packing.at[0] >= correct
    halves = [packing.spread(0.5 * half / max(1, half.sum())) for half in (~is_gold, is_gold)]
    _, numbers = step((packing.lines, SelfTrainBatch(*halves)), packing.count)
    expected = {
        "sampled_loss": 0.5 * numpy_cross_entropy(sampled) if sampled else 0.0,
        "gold_loss": 0.5 * numpy_cross_entropy(gold),
    }
    found = {name: float(numbers[name]) for name in (*expected, "loss")}
    assert found == pytest.approx(expected | {"loss": sum(expected.values())}, rel=1e-5)
    assert float(numbers["grad_norm"]) > 0


# --- killed


@pytest.fixture(scope="module")
def warmed_up(tmp_path_factory):
    """A work directory whose SFT is done, to be copied, and the settings of its runs."""
    folder = tmp_path_factory.mktemp("self_train")
    settings = [f"--config.compiled={folder / 'compiled'}", "--config.self_train.epochs=3"]
    done = run("sft", folder / "sft", *settings)
    assert done.returncode == 0, done.stderr
    return folder, settings


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_killed_self_training_goes_on_where_it_was(warmed_up, kind):
    """SIGKILL once an epoch or iteration is saved; the same command ends with the uninterrupted run's metrics."""
    folder, settings = warmed_up
    whole, killed = folder / f"{kind}_whole", folder / f"{kind}_killed"
    for workdir in (whole, killed):
        shutil.copytree(folder / "sft", workdir)
    settings, stage = [*settings, f"--kind={kind}"], f"self_train_{kind}"
    done = run("self-train", whole, *settings)
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen(
        command("self-train", killed, *settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline, saved = time.monotonic() + 300, []
    while not saved and process.poll() is None and time.monotonic() < deadline:
        saved = list((killed / stage / "checkpoints").glob("*/manifest.json"))  # which a step has when it is whole
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved and not (killed / stage / "done.json").exists()
    done = run("self-train", killed, *settings)
    assert done.returncode == 0, done.stderr
    assert f"{stage}: resuming after" in done.stdout

    ours, theirs = metrics(killed, stage), metrics(whole, stage)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        same = [key for key in other if not key.startswith(VARYING)]
        assert [mine[key] for key in same] == [other[key] for key in same]
    results = [json.loads((workdir / stage / "done.json").read_text()) for workdir in (killed, whole)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
    assert (killed / "models" / stage).is_dir()
