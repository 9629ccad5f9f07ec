"""Is this checkpoint, on this machine, ready for a run? What a run relies on, each part with its figure.

Only the model is needed: the questions are generated. Sizes are small and do not depend on the config's batches.
Types, mesh, PPO coefficients and the executor's limits come from the config.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from reft_jax import executor
from reft_jax.algo.advantages import action_mask, token_rewards
from reft_jax.algo.algorithms import make_algorithm
from reft_jax.algo.losses import token_loss
from reft_jax.config import flatten
from reft_jax.engine.generate import Engine, check_cache, quantized
from reft_jax.model import families
from reft_jax.model.hf import checked, read_config
from reft_jax.model.hf_write import hf_tensors
from reft_jax.model.llama import Llama
from reft_jax.model.lora import make_lora, trained, whole
from reft_jax.model.safetensors import map_tensor
from reft_jax.parallel.mesh import on_mesh, put_rows, round_up, row_shards
from reft_jax.run.inputs import Data, Inputs, checked_tokenizer
from reft_jax.run.machine import LENGTHS, open_mesh, running_executor
from reft_jax.stages.models import as_base, base_policy, policy_shapes
from reft_jax.stages.rollout import program_limits
from reft_jax.store import origin, readable
from reft_jax.tasks import answers, prompts
from reft_jax.tasks.registry import Task
from reft_jax.tasks.tokenizer import decode, encode
from reft_jax.toy import problems
from reft_jax.train.batches import rollout_rows
from reft_jax.train.iteration import Iteration
from reft_jax.train.packing import Packing
from reft_jax.train.scoring import score_lines
from reft_jax.train.state import init_adapter, make_optimizer, new_state, state_shardings
from reft_jax.types import Completion, Example, Prompt

QUESTIONS = 4  # rolled out, scored and trained on
RESPONSE = 32  # tokens sampled for each
PAD_MULTIPLE = 64
# Differences that rounding alone makes between two compiled functions, in nats.
MEAN_GAP = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.05}
MAX_GAP = {"float32": 2e-3, "bfloat16": 1.0, "int8": 1.0}
HARM = 0.15  # nats per token: a layer whose absence improves the model by more is damaged (SmolLM2: at most 0.07)
PROGRAMS = {  # program: its expected value or outcome
    "def solution():\n    return 6 * 7": 42.0,
    "def solution():\n    return '1e3'": 1000.0,
    "def solution():\n    return math.sqrt(2)": 2**0.5,
    "def solution():\n    x = sympy.symbols('x')\n    return sympy.solve(2 * x - 1, x)[0]": 0.5,
    "def solution():\n    return 1 / 0": "exception",
    "def solution():\n    return float('nan')": "not_finite",
    "def solution():\n    return [1]": "wrong_type",
    "def solution(:": "syntax_error",
    "x = 1": "no_solution",
    "def solution():\n    import os\n    os._exit(0)": "killed",
    "def solution():\n    while True:\n        pass": "timeout",
}


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool
    figure: str


def run_check(folder: Path, config) -> bool:
    """Prints what guards programs here, then the findings as they come; whether everything passed.

    InputError if the folder cannot be loaded at all.
    """
    families.use(config.model.family)
    examples = problems.make_split(config.seed, "train", QUESTIONS, answer_format=config.data.format, skipped_share=0.0)
    folder = readable(folder)
    inputs = Inputs(config, folder, checked_tokenizer(folder), Data(examples, [], [], "generated"))
    limits = config.executor
    with running_executor(limits.workers, limits.memory_mb, limits.allow_unsandboxed):
        mesh = open_mesh(config)
        with on_mesh(mesh):
            return check_inputs(inputs, mesh)


def check_inputs(inputs: Inputs, mesh) -> bool:
    """Prints a table of the guards and the findings; whether everything passed. The executor runs already."""
    started, passed = time.monotonic(), True
    print(f"check {origin(inputs.base)}: {inputs.config.model.dtype}, mesh {dict(mesh.shape)}\n")
    for guard in executor.guarding():
        print(f"{'have' if guard.works else 'LACK'}  {'programs: ' + guard.name:<32}  {guard.meaning}")
    for finding in findings(inputs, mesh):
        passed &= finding.passed
        mark = "pass" if finding.passed else "FAIL"
        print(f"{mark}  {finding.name:<32}  {finding.figure}", flush=True)
    verdict = "everything passed" if passed else "NOT READY: see the lines marked FAIL"
    print(f"\n{verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    return passed


def findings(inputs: Inputs, mesh) -> Iterator[Finding]:
    """From the cheapest to the most expensive."""
    shapes, settings = read_config(inputs.base), flatten(inputs.config)
    shapes.check_lengths({key: settings[key] for key in LENGTHS})
    check_cache(inputs.config, shapes)
    yield check_tokenizer(inputs)
    yield check_executor(inputs)
    yield check_grading(inputs)
    model = Llama(shapes, dtype=jnp.dtype(settings["model.dtype"]), remat=settings["model.remat"])
    policy = base_policy(inputs, mesh, model)
    yield from check_weights(inputs, model, policy["lm"])
    yield from check_layers(inputs, mesh, model, policy["lm"])
    yield from check_iteration(inputs, mesh, model, policy, *roll_out(inputs, mesh, model, policy["lm"]))


def check_tokenizer(inputs: Inputs) -> Finding:
    how, examples = (inputs.config.data.format, inputs.task), inputs.data.train
    texts = [prompts.rollout_prompt(example.question, *how) for example in examples]
    texts += [prompts.sft_target(example, *how) for example in examples]
    found = [(text, decode(inputs.tokenizer, encode(inputs.tokenizer, text))) for text in texts]
    for example in examples:  # what is read after a prompt is the beginning of the answer
        begun = inputs.prompter.answer(inputs.prompter.prompt(example.question))
        found.append((inputs.prompter.prefix(example.question).strip(), begun))
    changed = [text for text, read in found if read != text]
    figure = f"{len(found) - len(changed)} of {len(found)} prompts and solutions come back as they were"
    return Finding("tokenizer round trip", not changed, figure + (f"; not {changed[0][:60]!r}" if changed else ""))


def check_executor(inputs: Inputs) -> Finding:
    limits, started = program_limits(inputs.config) | {"timeout_s": 2.0}, time.monotonic()
    results = executor.run_programs(list(PROGRAMS), **limits)
    got = [result.value if result.status == "ok" else result.status for result in results]
    checked = zip(PROGRAMS.items(), got, strict=True)
    wrong = [f"{program!r} gave {value}, not {expected}" for (program, expected), value in checked if value != expected]
    figure = f"{len(results) - len(wrong)} of {len(results)} programs in {time.monotonic() - started:.1f} s"
    return Finding("executor", not wrong, "; ".join([figure, *wrong]))


def check_grading(inputs: Inputs) -> Finding:
    """A worked solution earns 1; with another question's answer as the right one it earns 0.1; no solution earns 0.

    A task with rewards of its own says what a right answer, a wrong one and none earn.
    """
    how, examples = (inputs.config.data.format, inputs.task), inputs.data.train
    run_programs = partial(executor.run_programs, **program_limits(inputs.config))
    tries = [("I do not know.", example, False, False) for example in examples]  # text, example, answered, correct
    for example in examples:
        solution = prompts.sft_target(example, *how)
        tries.append((solution, example, True, True))
        if other := _with_another_answer(inputs.task.of(example.item_id), example, examples):
            tries.append((solution, other, True, False))
    texts, asked, *_ = zip(*tries, strict=True)
    verdicts, wrong = answers.grade(texts, asked, *how, run_programs=run_programs), 0
    for (_, example, *expected), (value, correct, reward, *_) in zip(tries, verdicts, strict=True):
        earned = inputs.task.of(example.item_id).reward(value, expected[1], example)
        wrong += [value is not None, correct, reward] != [*expected, earned]
    name = "rewards 1, 0.1 and 0" if type(inputs.task).reward is Task.reward else "rewards"
    return Finding(name, not wrong, f"{len(tries) - wrong} of {len(tries)} graded correctly")


def _with_another_answer(task: Task, example: Example, examples: list[Example]) -> Example | None:
    """The example with the first answer of another that would be wrong for it; None if all have the same."""
    values = (other.answer_value for other in examples)
    wrong = (value for value in values if not task.is_correct(task.target(value), example.answer_value))
    return next((example._replace(answer_value=value) for value in wrong), None)


def check_weights(inputs: Inputs, model: Llama, lm) -> Iterator[Finding]:
    """Per tensor: file -> our layout -> their layout gives the file's numbers; all are finite, and not all equal."""
    _, stored, _ = checked(inputs.base)
    changed, broken, count = [], [], 0
    for name, ours in hf_tensors(model.config, lm):
        if not np.array_equal(map_tensor(stored[name]).astype(np.float32), ours, equal_nan=True):
            changed.append(name)
        if bad := np.size(ours) - np.isfinite(ours).sum():
            broken.append(f"{name} has {bad} numbers that are NaN or infinite")
        elif np.ptp(ours) == 0 and "norm" not in name:
            broken.append(f"{name} is {ours.flat[0]} everywhere")
        count += 1
    figure = f"{count - len(changed)} of {count} tensors are the file's, bit for bit"
    yield Finding("weights round trip", not changed, "; ".join([figure, *changed[:3]]))
    figure = f"{count - len(broken)} of {count} tensors are finite and not constant"
    yield Finding("weights are numbers", not broken, "; ".join([figure, *broken[:3]]))


def check_layers(inputs: Inputs, mesh, model: Llama, lm) -> Iterator[Finding]:
    """The loss on worked solutions, with all layers and without each one: a damaged layer makes the model worse."""
    kind, task = inputs.config.data.format, inputs.task
    texts = [prompts.prompt_text(e.question, task) + prompts.sft_target(e, kind, task) for e in inputs.data.train]
    ids = [encode(inputs.tokenizer, text) for text in texts]
    ids = sorted(ids, key=len)[:2]
    decisions, size = [len(row) - 1 for row in ids], {"micro_batch": row_shards(mesh), "micro_batches": 2}
    packing = Packing(ids, [0] * len(ids), decisions, max_len=len(ids[-1]), multiple=PAD_MULTIPLE, **size)
    lines, weight = put_rows(mesh, (packing.lines, packing.spread(1 / sum(decisions))), axis=1)

    @jax.jit
    def loss(lm, lines, weight, without):
        """Mean cross-entropy with layer `without` adding nothing to the residual stream; -1: all layers."""
        kept, layers = jnp.arange(model.config.num_layers) != without, lm["layers"]
        added = layers.keys() & {"o", "o_bias", "down", "down_bias"}
        silenced = {name: jax.vmap(jnp.where, (0, 0, None))(kept, layers[name], 0.0) for name in added}
        lm = lm | {"layers": layers | silenced}
        logprob, _ = jax.lax.map(lambda lines: score_lines(model, {"lm": lm}, lines), lines)
        return token_loss(logprob, weight)

    whole, uniform = float(loss(lm, lines, weight, -1)), np.log(model.config.vocab_size)
    figure = f"{whole:.2f} nats per token on worked solutions; guessing costs {uniform:.2f}"
    yield Finding("the model knows language", whole < uniform, figure)
    if not np.isfinite(whole):
        yield Finding("every layer does no harm", False, "not tried: the loss is not a number")
        return
    losses = np.array([float(loss(lm, lines, weight, i)) for i in range(model.config.num_layers)])
    gains = np.nan_to_num(whole - losses, nan=np.inf)
    worst, helped = int(gains.argmax()), int((gains <= HARM).sum())
    figure = f"{helped} of {len(gains)}"
    if helped < len(gains):
        figure += f"; without layer {worst} the loss is {losses[worst]:.2f}: that layer is damaged"
    yield Finding("every layer does no harm", helped == len(gains), figure)


def roll_out(inputs: Inputs, mesh, model: Llama, lm) -> tuple[list[Prompt], list[Completion]]:
    """One short sampled response per question, or more if the mesh needs more rows."""
    count = round_up(QUESTIONS, row_shards(mesh))
    asked = inputs.prompts(inputs.data.train, -(-count // QUESTIONS))[:count]
    ends, seed = inputs.end_ids, inputs.config.seed
    size = {"slots": count, "pad_multiple": PAD_MULTIPLE}
    engine = Engine(model, mesh, **size, eos_id=ends, seed=seed, int8=quantized(inputs.config))
    max_len = max(len(prompt.tokens) for prompt in asked) + RESPONSE
    found = dict(engine.generate(lm, asked, max_len=max_len, temperature=inputs.config.rl.temperature))
    return asked, [found[i] for i in range(count)]


def check_iteration(
    inputs: Inputs, mesh, model: Llama, policy, asked: list[Prompt], completions: list[Completion]
) -> Iterator[Finding]:
    """Scores the rollout as a run does, then makes one PPO update, which takes `policy` over."""
    rl, dtype, rows = inputs.config.rl, inputs.config.model.dtype, len(asked)
    algorithm = make_algorithm(inputs.config)
    if algorithm.samples > 1:  # the few rows here are compared as if they were of one question
        algorithm = replace(algorithm, samples=rows)
    schedule = optax.constant_schedule(rl.learning_rate)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    abstract, lora, base = policy_shapes(model, value_head=algorithm.critic), make_lora(inputs.config), None
    if lora:
        base, head = as_base(policy["lm"], model), {name: x for name, x in policy.items() if name != "lm"}
        trains = {"lora": init_adapter(mesh, lora, abstract["lm"], inputs.config.seed)} | head
        policy, abstract = whole(trains, base, lora), trained(lora, abstract)
    shardings = state_shardings(mesh, optimizer, abstract)
    rewards = np.resize(np.array([1.0, 0.1, 0.0], np.float32), rows)
    rollout = rollout_rows(asked, completions, rewards, PAD_MULTIPLE)
    size = {"max_len": int(rollout.total_len.max()), "micro_batch": rows, "multiple": PAD_MULTIPLE}
    one = Iteration(model, mesh, optimizer, algorithm, shardings, lora, **size)
    reference = (base or policy["lm"]) if algorithm.reference else None
    scores, packing = one.score(policy, reference, rollout)

    sampled = np.concatenate([completion.logprobs for completion in completions])
    sampler = "int8" if quantized(inputs.config) else dtype
    yield gap("sampler and trainer agree", sampled - scores.logprob[packing.at], sampler)
    reference = scores.logprob if scores.ref_logprob is None else scores.ref_logprob
    if algorithm.reference:
        yield gap("KL to the reference is 0", scores.logprob[packing.at] - reference[packing.at], dtype)

    mask = np.asarray(action_mask(rollout.prompt_len, rollout.total_len, rollout.tokens.shape[1]))
    other = reference + np.random.default_rng(0).normal(size=mask.shape).astype(np.float32)
    paid, _, _ = token_rewards(rewards, scores.logprob, other, mask, kl_coef=rl.kl_coef)
    kl = np.where(mask, scores.logprob - other, 0.0).sum(1)
    error = np.abs(np.asarray(paid).sum(1) - (rewards - rl.kl_coef * kl)).max()
    figure = f"token rewards sum to score − β·KL within {error:.1e} (KL up to {np.abs(kl).max():.1f} nats)"
    yield Finding("rewards are conserved", bool(error < 1e-5), figure)

    batch, _ = one.make_batch(rollout, scores)
    state = new_state(mesh, optimizer, abstract, trains if lora else policy)
    _, metrics = one.update(state, rollout, batch, base=base)
    error, norm = float(metrics.get("ratio_error_max", 0.0)), float(metrics["grad_norm"])
    figure = f"|ρ − 1| at most {error:.1e}"
    yield Finding("ratio 1 on the first pass", error <= np.expm1(MAX_GAP[dtype]), figure)
    figure = f"loss {float(metrics['loss']):.3f}, gradient norm {norm:.3f}"
    yield Finding("an update is finite", bool(np.isfinite(norm) and norm > 0), figure)


def gap(name: str, difference: np.ndarray, dtype: str) -> Finding:
    """Compares log-probabilities of the same tokens that were computed twice."""
    mean, largest = np.abs(difference).mean(), np.abs(difference).max()
    passed = bool(mean <= MEAN_GAP[dtype] and largest <= MAX_GAP[dtype])
    return Finding(name, passed, f"mean {mean:.1e}, largest {largest:.1e} nats over {difference.size} tokens")
