"""`check`: a sound model passes, and every line of its table can fail."""

import contextlib
import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_policy, tiny_state

from reft_jax import executor, load_hf, save_hf
from reft_jax.algo import advantages
from reft_jax.commands import check
from reft_jax.config import check_config, load_config, replaced
from reft_jax.parallel.mesh import make_mesh, on_mesh
from reft_jax.run.inputs import Data, Inputs
from reft_jax.tasks import prompts
from reft_jax.tasks.tokenizer import encode, load_tokenizer, train_bpe
from reft_jax.toy import problems as synthetic
from reft_jax.train import iteration
from reft_jax.train.packing import Packing
from reft_jax.train.state import make_optimizer
from reft_jax.train.steps import make_step, sft_loss
from reft_jax.types import Example

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = synthetic.make_split(42, "train", 16, answer_format="python", skipped_share=0.0)
TEXTS = [prompts.prompt_text(example.question) + prompts.sft_target(example, "python") for example in EXAMPLES]
LINES = (
    "tokenizer round trip",
    "executor",
    "rewards 1, 0.1 and 0",
    "weights round trip",
    "weights are numbers",
    "the model knows language",
    "every layer does no harm",
    "sampler and trainer agree",
    "KL to the reference is 0",
    "rewards are conserved",
    "ratio 1 on the first pass",
    "an update is finite",
)


@pytest.fixture(scope="module")
def config():
    config = load_config(str(ROOT / "configs" / "quickstart.py"))
    config.mesh.cpu_devices = 0  # this process has its one device already; the real command below gets two
    return check_config(config)


@pytest.fixture(scope="module")
def taught():
    """(model, {'lm', 'value_head'}, tokenizer): tiny, after 40 updates on the generated texts."""
    tokenizer = train_bpe(TEXTS, 400)
    model, params = tiny_policy(vocab_size=len(tokenizer))
    optimizer = make_optimizer(optax.constant_schedule(1e-2), weight_decay=0.0, clip_norm=1.0)
    state, where = tiny_state(model, params, optimizer)
    step = make_step(sft_loss, model, optimizer, where)
    rows = [encode(tokenizer, text) for text in TEXTS]
    decisions, size = [len(row) - 1 for row in rows], {"micro_batch": len(rows), "micro_batches": 1}
    packing = Packing(rows, [0] * len(rows), decisions, max_len=max(map(len, rows)), multiple=64, **size)
    batch = packing.lines, packing.spread(1 / sum(decisions))
    for _ in range(40):
        state, metrics = step(state, batch, packing.count)
    assert metrics["loss"] < 0.7 * np.log(len(tokenizer))
    return model, state.params, tokenizer


def saved(taught, folder, change=lambda lm: lm):
    model, params, tokenizer = taught
    save_hf(folder, model, change(params["lm"]), tokenizer=tokenizer)
    return folder


def table(folder, config) -> tuple[bool, dict[str, str], str]:
    """(passed, {name: 'pass' or 'FAIL'}, all that was printed)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        passed = check.run_check(folder, config)
    rows = [line.split("  ") for line in said.getvalue().splitlines() if line[:6] in ("pass  ", "FAIL  ")]
    return passed, {name: mark for mark, name, *_ in rows}, said.getvalue()


def failed(marks: dict[str, str]) -> set[str]:
    assert tuple(marks) == LINES
    return {name for name, mark in marks.items() if mark == "FAIL"}


def test_a_sound_model_passes(taught, config, tmp_path):
    passed, marks, said = table(saved(taught, tmp_path / "model"), config)
    assert passed and not failed(marks), said
    assert all(f"  programs: {name} " in said for name in ("namespaces", "Landlock", "seccomp", "limits")), said


def test_a_layer_of_noise_is_named(taught, config, tmp_path):
    def noise(lm):
        down = lm["layers"]["down"]
        wild = down.at[1].set(3 * jax.random.normal(jax.random.key(0), down[1].shape))
        return lm | {"layers": lm["layers"] | {"down": wild}}

    folder = saved(taught, tmp_path / "model", noise)
    command = [sys.executable, "-m", "reft_jax", "check", "--config=configs/quickstart.py", f"--model={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "FAIL  every layer does no harm" in done.stdout and "layer 1 the loss" in done.stdout
    assert "NOT READY" in done.stdout and "'data': 2" in done.stdout  # the config's mesh, as a run has it


def test_a_tensor_that_is_no_number_is_named(taught, config, tmp_path):
    def spoil(lm):
        return lm | {"layers": lm["layers"] | {"q": lm["layers"]["q"].at[1, 0, 0, 0].set(jnp.nan)}}

    passed, marks, said = table(saved(taught, tmp_path / "model", spoil), config)
    assert not passed
    assert "model.layers.1.self_attn.q_proj.weight has 1 numbers that are NaN" in said
    assert {"weights are numbers", "the model knows language", "an update is finite"} <= failed(marks)


def test_an_untrained_model_does_not_know_language(config, tmp_path):
    tokenizer = train_bpe(TEXTS, 400)
    model, params = tiny_policy(vocab_size=len(tokenizer))
    save_hf(tmp_path / "model", model, params["lm"], tokenizer=tokenizer)
    passed, marks, _ = table(tmp_path / "model", config)
    assert not passed and "the model knows language" in failed(marks)


@pytest.fixture(scope="module")
def rolled_out(taught, config):
    """(inputs, mesh, model), policy, prompts, completions, as `findings` has them."""
    model, params, tokenizer = taught
    run = Inputs(config, Path(), tokenizer, Data(EXAMPLES[:4], [], [], "")), make_mesh(1, 1, 1), model
    with on_mesh(run[1]):
        policy = jax.tree.map(jnp.array, params)
        yield run, policy, *check.roll_out(*run, policy["lm"])


def halved_sampler(monkeypatch, completions):
    return [completion._replace(logprobs=completion.logprobs / 2) for completion in completions]


def truncated_scores(monkeypatch, completions):
    sound = advantages.token_rewards
    monkeypatch.setattr(check, "token_rewards", lambda score, *rest, **kw: sound(score.astype(int), *rest, **kw))
    return completions


def another_reference(monkeypatch, completions):
    sound = iteration.make_scorer

    def make(model, temperature):
        score = sound(model, temperature)

        def scaled(params, *rest, **kw):
            logprob, value = score(params, *rest, **kw)
            return (logprob, value) if "value_head" in params else (1.01 * logprob, value)

        return scaled

    monkeypatch.setattr(iteration, "make_scorer", make)
    return completions


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        (halved_sampler, "sampler and trainer agree"),
        (truncated_scores, "rewards are conserved"),
        (another_reference, "KL to the reference is 0"),
    ],
)
def test_a_planted_fault_of_an_iteration_is_found(monkeypatch, rolled_out, plant, line):
    run, policy, asked, completions = rolled_out
    for finding in check.check_iteration(*run, policy, asked, plant(monkeypatch, completions)):
        if finding.name == line:  # it stops here: an update would use the policy up
            assert not finding.passed, finding
            return
    raise AssertionError(f"no line {line}")


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_with_lora_the_update_trains_an_adapter_and_the_head_only(monkeypatch, rolled_out, config, algorithm):
    """Adapter, head, and the optimizer's two moments of each are all that the update holds; the base stays."""
    (inputs, mesh, model), policy, asked, completions = rolled_out
    policy, states = jax.tree.map(jnp.array, policy), []  # a copy: the update takes the head over
    changed = {"lora.rank": 3, "lora.targets": "q,down", "rl.algorithm": algorithm, "rl.learning_rate": 0.1}
    inputs = replace(inputs, config=check_config(replaced(config, changed)))
    before, update = jax.tree.map(np.array, policy["lm"]), iteration.Iteration.update

    def spied(self, state, *args, **kw):
        states.append(jax.tree.map(np.array, state))
        state, metrics = update(self, state, *args, **kw)
        states.append(jax.tree.map(np.array, state))
        return state, metrics

    monkeypatch.setattr(iteration.Iteration, "update", spied)
    if algorithm == "grpo":
        del policy["value_head"]
    found = list(check.check_iteration(inputs, mesh, model, policy, asked, completions))
    assert all(finding.passed for finding in found), found
    old, new = states[0].params, states[1].params
    assert new.keys() == {"lora"} | (policy.keys() - {"lm"})
    assert new["lora"].keys() == {"q_lora_a", "q_lora_b", "down_lora_a", "down_lora_b"}
    assert new["lora"]["q_lora_b"].shape == (2, 3, 4, 8)  # layers, rank, heads, head dimension
    assert not old["lora"]["q_lora_b"].any() and new["lora"]["q_lora_b"].any() and new["lora"]["down_lora_b"].any()
    held = sum(x.size for x in jax.tree.leaves(states[1].opt_state) if x.dtype == np.float32)
    assert held == 2 * sum(x.size for x in jax.tree.leaves(new))
    jax.tree.map(np.testing.assert_array_equal, policy["lm"], before)


OWN = """
from reft_jax.tasks.registry import Task
class Half(Task):
    def reward(self, value, correct, example):
        return 0.5 * correct
HALF = Half("half")
"""


@pytest.mark.parametrize(
    ("task", "solved", "figure"),
    [
        ("", {("gsm8k_1", "1,080"): "1080", ("gsm8k_2", "7"): "7"}, "6 of 6"),
        ("", {("mathqa_1", "b"): "'b'", ("mathqa_2", "e"): "'E'"}, "6 of 6"),
        ("{tmp}/own.py:HALF", {("x", "3"): "3"}, "2 of 2"),
        (f"{ROOT}/examples/unit_tests.py:UNIT_TESTS", {("1", "assert solution() == 3"): "3"}, "2 of 2"),
    ],
    ids=["commas", "letters", "rewards of its own", "tests"],
)
def test_the_questions_of_any_task_are_graded(config, taught, tmp_path, task, solved, figure):
    """`check --workdir` grades the questions of the run."""
    (tmp_path / "own.py").write_text(OWN)
    rows = [
        Example(item_id, "How many?", answer, f'def solution():\n    """How many?"""\n    return {value}')
        for (item_id, answer), value in solved.items()
    ]
    config = replaced(config, {"task": task.format(tmp=tmp_path)})
    inputs = Inputs(config, Path(), taught[2], Data(rows, [], [], ""))
    found = check.check_grading(inputs)
    assert found.passed and found.figure.startswith(figure), found
    assert found.name == ("rewards" if "own.py" in task else "rewards 1, 0.1 and 0")
    assert check.check_tokenizer(inputs).passed
    executor.shutdown()


def test_faults_of_tokenizer_executor_and_grading_are_found(monkeypatch, rolled_out, taught):
    inputs = rolled_out[0][0]
    monkeypatch.setitem(check.PROGRAMS, "def solution():\n    return 6 * 7", 43.0)
    found = check.check_executor(inputs)
    assert not found.passed and "gave 42.0, not 43.0" in found.figure
    sound = check.answers.grade
    monkeypatch.setattr(
        check.answers, "grade", lambda *a, **kw: [v._replace(reward=int(v.reward)) for v in sound(*a, **kw)]
    )
    found = check.check_grading(inputs)
    assert not found.passed and found.figure.startswith("8 of 12")
    monkeypatch.setattr(check, "decode", lambda tok, ids: taught[2].decode(ids).replace("\n    ", "\n"))
    assert not check.check_tokenizer(inputs).passed
    executor.shutdown()


@pytest.mark.long
def test_smollm2_passes_and_a_damaged_layer_of_it_is_named(smollm2, tmp_path):
    config = check_config(load_config(str(ROOT / "configs" / "svamp_smollm2.py")))
    passed, marks, said = table(smollm2, config)
    assert passed and not failed(marks), said

    model, lm = load_hf(smollm2)
    rng, layers = np.random.default_rng(0), {name: np.array(leaf) for name, leaf in lm["layers"].items()}
    for leaf in layers.values():
        leaf[11] = rng.permutation(leaf[11].ravel()).reshape(leaf[11].shape)
    save_hf(tmp_path / "model", model, lm | {"layers": layers}, tokenizer=load_tokenizer(smollm2))
    passed, marks, said = table(tmp_path / "model", config)
    assert not passed and failed(marks) == {"every layer does no harm"}
    assert "without layer 11 the loss" in said
