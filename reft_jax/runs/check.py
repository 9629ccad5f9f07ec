"""Is this checkpoint, on this machine, ready for a run? What a run relies on, each part with its figure.

Nothing is needed beside the model: the questions are generated. Sizes are small and do not depend on the config's
batches; types, mesh, PPO coefficients and the executor's limits are the config's.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reft_jax import executor
from reft_jax.runs.setup import start_executor
from reft_jax.task import answers, prompts, synthetic
from reft_jax.task.tokenizer import check_vocabulary, decode, encode, encode_rollout, load_tokenizer
from reft_jax.types import Completion, Example, Prompt

QUESTIONS = 4  # rolled out, scored and trained on
RESPONSE = 32  # tokens sampled for each
PAD_MULTIPLE = 64
# Differences that rounding alone makes between two compiled programs, in nats.
MEAN_GAP = {"float32": 1e-4, "bfloat16": 0.05}
MAX_GAP = {"float32": 2e-3, "bfloat16": 1.0}
HARM = 0.15  # nats a token: a layer whose absence improves the model by more is damaged (SmolLM2: at most 0.07)
PROGRAMS = {  # program: what must become of it
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


@dataclass
class Machine:
    """The model on the mesh, and four questions rolled out with it. `policy` is {'lm', 'value_head'}, float32."""

    config: Any
    mesh: Any
    model: Any
    policy: Any
    prompts: list[Prompt]
    completions: list[Completion]


def run_check(folder: Path, config) -> bool:
    """Prints the table as it grows; whether everything passed. InputError if the folder cannot be loaded at all."""
    from reft_jax.model.hf import check_folder

    started = time.monotonic()
    vocab_size = check_folder(folder).vocab_size
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    start_executor(config.executor.workers, config.executor.memory_mb, config.executor.allow_unsandboxed)
    examples = synthetic.make_split(config.seed, "train", QUESTIONS, engine=config.data.engine, skipped_share=0.0)
    passed = True
    try:
        from reft_jax.parallel.mesh import make_mesh, on_mesh

        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        print(f"check {folder}: {config.model.dtype}, mesh {dict(mesh.shape)}\n")
        with on_mesh(mesh):
            for finding in findings(folder, config, mesh, tokenizer, examples):
                passed &= finding.passed
                mark = "pass" if finding.passed else "FAIL"
                print(f"{mark}  {finding.name:<32}  {finding.figure}", flush=True)
    finally:
        executor.shutdown()
    verdict = "everything passed" if passed else "NOT READY: see the lines marked FAIL"
    print(f"\n{verdict} ({time.monotonic() - started:.0f} s)")
    return passed


def findings(folder: Path, config, mesh, tokenizer, examples: list[Example]) -> Iterator[Finding]:
    """From the cheapest to the dearest."""
    yield check_tokenizer(tokenizer, examples, config.data.engine)
    yield check_executor(config)
    yield check_grading(config, examples)
    model, policy = load_policy(folder, config, mesh)
    yield from check_weights(folder, model, policy["lm"])
    yield from check_layers(mesh, model, policy["lm"], tokenizer, examples, config.data.engine)
    machine = roll_out(config, mesh, model, policy, tokenizer, examples)
    yield from check_iteration(machine)


def check_tokenizer(tokenizer, examples: list[Example], engine: str) -> Finding:
    texts = [prompts.rollout_prompt(example.question, engine) for example in examples]
    texts += [prompts.sft_target(example, engine) for example in examples]
    changed = [text for text in texts if decode(tokenizer, encode(tokenizer, text)) != text]
    figure = f"{len(texts) - len(changed)} of {len(texts)} prompts and solutions come back as they were"
    return Finding("tokenizer round trip", not changed, figure + (f"; not {changed[0][:60]!r}" if changed else ""))


def check_executor(config) -> Finding:
    limits, started = config.executor, time.monotonic()
    results = executor.run_programs(list(PROGRAMS), timeout_s=2.0, workers=limits.workers, memory_mb=limits.memory_mb)
    wrong = [
        f"{program!r} gave {result.value if result.status == 'ok' else result.status}, not {expected}"
        for (program, expected), result in zip(PROGRAMS.items(), results, strict=True)
        if expected != (result.value if result.status == "ok" else result.status)
    ]
    figure = f"{len(results) - len(wrong)} of {len(results)} programs in {time.monotonic() - started:.1f} s"
    return Finding("executor", not wrong, "; ".join([figure, *wrong]))


def check_grading(config, examples: list[Example]) -> Finding:
    """A worked solution earns 1, the next question's solution 0.1 or (by chance the same answer) 1, none 0."""
    engine, limits = config.data.engine, config.executor
    right = [prompts.sft_target(example, engine) for example in examples]
    others = [example._replace(answer_value=str(float(example.answer_value) + 1)) for example in examples]

    def run(programs, want):
        return executor.run_programs(programs, workers=limits.workers, memory_mb=limits.memory_mb, want=want)

    cases = ((right, examples, 1.0), (right, others, 0.1), (["I do not know."] * len(examples), examples, 0.0))
    rewards = [answers.grade(texts, asked, engine, run_programs=run) for texts, asked, _ in cases]
    wrong = sum(v.reward != want for verdicts, (*_, want) in zip(rewards, cases, strict=True) for v in verdicts)
    total = len(cases) * len(examples)
    return Finding("rewards 1, 0.1 and 0", not wrong, f"{total - wrong} of {total} graded rightly")


def load_policy(folder: Path, config, mesh) -> tuple:
    """The model in the config's compute dtype, and {'lm', 'value_head'} on the mesh as a run has it."""
    import jax.numpy as jnp

    from reft_jax.model.heads import ValueHead
    from reft_jax.model.hf import load_hf, read_config
    from reft_jax.model.llama import Llama
    from reft_jax.parallel.mesh import shardings
    from reft_jax.train.state import abstract_params, init_head

    shape = read_config(folder)
    model = Llama(shape, dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
    where = shardings(mesh, abstract_params(model, ValueHead(), "value_head"))
    _, lm = load_hf(folder, shardings=where["lm"])
    return model, {"lm": lm, "value_head": init_head(mesh, ValueHead(), shape.hidden_size, config.seed)}


def check_weights(folder: Path, model, lm) -> Iterator[Finding]:
    """Tensor by tensor: file -> ours -> their layout gives the file's numbers; all are finite and not all the same."""
    from reft_jax.model.hf import hf_tensors, stored_in
    from reft_jax.model.safetensors import read_tensor

    stored, changed, broken, count = stored_in(folder), [], [], 0
    for name, ours in hf_tensors(model.config, lm):
        if not np.array_equal(read_tensor(stored[name]).astype(np.float32), ours, equal_nan=True):
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


def check_layers(mesh, model, lm, tokenizer, examples: list[Example], engine: str) -> Iterator[Finding]:
    """The loss on worked solutions, with every layer and with each one taken out: a damaged one is better away."""
    import jax
    import jax.numpy as jnp

    from reft_jax.algo.losses import token_loss
    from reft_jax.parallel.mesh import put_rows, round_up, row_shards
    from reft_jax.train.batches import token_batch
    from reft_jax.train.scoring import next_token_logprobs

    ids = [encode(tokenizer, prompts.prompt_text(e.question) + prompts.sft_target(e, engine)) for e in examples]
    ids = sorted(ids, key=len)[: round_up(2, row_shards(mesh))]
    ids += ids[:1] * (round_up(len(ids), row_shards(mesh)) - len(ids))
    rows = put_rows(mesh, token_batch(ids, [1] * len(ids), PAD_MULTIPLE))

    @jax.jit
    def loss(lm, rows, without):
        """Mean cross-entropy with layer `without` adding nothing to the residual stream; -1: all layers."""
        kept = jnp.arange(model.config.num_layers) != without
        layers = lm["layers"]
        layers = layers | {
            name: jnp.where(kept.reshape(-1, *[1] * (layers[name].ndim - 1)), layers[name], 0.0)
            for name in ("o", "down")
        }
        lm = lm | {"layers": layers}
        hidden, _ = model.apply({"params": lm}, rows.tokens, method="hidden")
        start, width = jnp.zeros(len(ids), jnp.int32), rows.tokens.shape[1]
        logprob = next_token_logprobs(model, lm, hidden, rows.tokens, start, width)
        return token_loss(logprob, rows.target_mask) / rows.target_mask.sum()

    whole, uniform = float(loss(lm, rows, -1)), np.log(model.config.vocab_size)
    figure = f"{whole:.2f} nats a token on worked solutions; guessing costs {uniform:.2f}"
    yield Finding("the model knows language", whole < uniform, figure)
    if not np.isfinite(whole):
        yield Finding("every layer does no harm", False, "not tried: the loss is not a number")
        return
    losses = np.array([float(loss(lm, rows, i)) for i in range(model.config.num_layers)])
    gains = np.nan_to_num(whole - losses, nan=np.inf)
    worst = int(gains.argmax())
    helped = int((gains <= HARM).sum())
    figure = f"{helped} of {len(gains)}"
    if helped < len(gains):
        figure += f"; without layer {worst} the loss is {losses[worst]:.2f}: that layer is damaged"
    yield Finding("every layer does no harm", helped == len(gains), figure)


def roll_out(config, mesh, model, policy, tokenizer, examples: list[Example]) -> Machine:
    from reft_jax.engine.generate import Engine
    from reft_jax.parallel.mesh import round_up, row_shards

    count = round_up(QUESTIONS, row_shards(mesh))
    asked = [
        Prompt(example.item_id, sample, np.array(encode_rollout(tokenizer, example.question, config.data.engine)))
        for sample in range(count // QUESTIONS + 1)
        for example in examples
    ][:count]
    engine = Engine(
        model,
        mesh,
        batch=count,
        pad_multiple=PAD_MULTIPLE,
        eos_id=tokenizer.eos_token_id,
        seed=config.seed,
    )
    max_len = max(len(prompt.tokens) for prompt in asked) + RESPONSE
    found = dict(engine.generate(policy["lm"], asked, max_len=max_len, temperature=config.ppo.temperature))
    return Machine(config, mesh, model, policy, asked, [found[i] for i in range(count)])


def check_iteration(machine: Machine) -> Iterator[Finding]:
    """Scores the rollout as a run does, then takes one PPO update."""
    import jax
    import optax

    from reft_jax.algo.advantages import action_mask, token_rewards
    from reft_jax.model.heads import ValueHead
    from reft_jax.parallel.mesh import put_rows
    from reft_jax.train.batches import in_micro_batches, rollout_rows, window_width
    from reft_jax.train.scoring import make_scorer
    from reft_jax.train.state import abstract_params, make_optimizer, new_state, state_shardings
    from reft_jax.train.steps import ClipSettings, make_ppo_batch, make_ppo_step

    ppo, model, mesh, rows = machine.config.ppo, machine.model, machine.mesh, len(machine.prompts)
    scores = np.resize(np.array([1.0, 0.1, 0.0], np.float32), rows)
    rollout = rollout_rows(machine.prompts, machine.completions, scores, PAD_MULTIPLE)
    mask = np.asarray(action_mask(rollout.prompt_len, rollout.total_len, rollout.tokens.shape[1]))
    width, score = window_width(mask, PAD_MULTIPLE), make_scorer(model, ppo.temperature)
    one_batch = put_rows(mesh, in_micro_batches((rollout.tokens, rollout.prompt_len - 1), rows), axis=1)
    logprob, value = (np.asarray(x)[0] for x in score(machine.policy, *one_batch, width=width))
    reference = np.asarray(score({"lm": machine.policy["lm"]}, *one_batch, width=width)[0])[0]

    sampled = np.concatenate([completion.logprobs for completion in machine.completions])
    yield gap("sampler and trainer agree", sampled - logprob[mask], machine.config)
    yield gap("KL to the reference is 0", logprob[mask] - reference[mask], machine.config)

    other = reference + np.random.default_rng(0).normal(size=reference.shape).astype(np.float32)
    paid, _, _ = token_rewards(scores, logprob, other, mask, kl_coef=ppo.kl_coef)
    kl = np.where(mask, logprob - other, 0.0).sum(1)
    error = np.abs(np.asarray(paid).sum(1) - (scores - ppo.kl_coef * kl)).max()
    figure = f"token rewards sum to score − β·KL within {error:.1e} (KL up to {np.abs(kl).max():.1f} nats)"
    yield Finding("rewards are conserved", bool(error < 1e-5), figure)

    coefficients = {"kl_coef": ppo.kl_coef, "gamma": ppo.gamma, "lam": ppo.lam}
    batch, _ = make_ppo_batch(rollout, logprob, value, reference, **coefficients)
    schedule = optax.constant_schedule(ppo.learning_rate)
    optimizer = make_optimizer(schedule, weight_decay=ppo.weight_decay, clip_norm=ppo.clip_norm)
    abstract = abstract_params(model, ValueHead(), "value_head")
    clip = ClipSettings(ppo.clip, ppo.value_clip, ppo.vf_coef, ppo.temperature)
    step = make_ppo_step(model, optimizer, clip, state_shardings(mesh, optimizer, abstract))
    state = new_state(mesh, optimizer, abstract, machine.policy)
    micro_batches = put_rows(mesh, in_micro_batches(jax.device_get(batch), rows), axis=1)
    _, metrics = step(state, micro_batches, width)
    error, norm = float(metrics["ratio_max_error"]), float(metrics["grad_norm"])
    figure = f"|ρ − 1| at most {error:.1e}"
    yield Finding("ratio 1 on the first pass", error <= np.expm1(MAX_GAP[machine.config.model.dtype]), figure)
    figure = f"loss {float(metrics['loss']):.3f}, gradient norm {norm:.3f}"
    yield Finding("an update is finite", bool(np.isfinite(norm) and norm > 0), figure)


def gap(name: str, difference: np.ndarray, config) -> Finding:
    """Log-probabilities of the same tokens, computed twice."""
    mean, largest = np.abs(difference).mean(), np.abs(difference).max()
    dtype = config.model.dtype
    passed = bool(mean <= MEAN_GAP[dtype] and largest <= MAX_GAP[dtype])
    return Finding(name, passed, f"mean {mean:.1e}, largest {largest:.1e} nats over {difference.size} tokens")
