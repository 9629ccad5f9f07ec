"""ReFT: reinforcement learning on the training questions; the reward depends on the answer of the executed program.

arXiv 2401.08967, §3. The policy starts from the warm-up model, which is also the reference of the KL penalty.
"""

import time
from collections import Counter
from functools import partial

import jax
import numpy as np

from reft_jax.algo.algorithms import Algorithm, make_algorithm
from reft_jax.parallel.mesh import round_up
from reft_jax.run.executions import reinforced
from reft_jax.run.open import Run
from reft_jax.stages.loop import START, Training
from reft_jax.stages.models import abstract_policy, finished, load_model, sources, start_policy
from reft_jax.stages.rollout import Graded, open_rewards, roll_out_once
from reft_jax.tasks.rewards import Rewards
from reft_jax.train.batches import minibatches, rollout_rows
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.iteration import Iteration, Scores, gap_metrics, importance_weights
from reft_jax.train.packing import Packing, line_size
from reft_jax.train.state import TrainState, constant_schedule, make_optimizer
from reft_jax.types import Completion, Example, PPOBatch, Prompt, Rollout, SamplerGapError

PURPOSE = "reft rollout"  # in the audit log
PARTS = ("rollout", "reward", "score", "update")  # timed parts of an iteration; the rest of its seconds is "other"


def run_reft(run: Run) -> dict:
    """Trains from models/warmup, saves models/reft (best on dev). Returns {'best': iteration, 'best_dev_top1', …}."""
    if result := finished(run, "reft"):
        return result
    rl, questions, algorithm = run.config.rl, run.inputs.questions, make_algorithm(run.config)
    schedule = constant_schedule(rl.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    reference, made_from = None, None
    if algorithm.reference and not run.config.lora.rank:
        reference = load_model(run, "warmup")["lm"]
        made_from = {"path": "models/warmup", "checksum": digest(array_checksums(reference))}
    state_parts = abstract_policy(run), optimizer, partial(start_policy, run)
    of_warmup = Training(run, "reft", *state_parts, START, made_from, of="warmup")
    with of_warmup as training, open_rewards(run) as rewards:
        if algorithm.reference and training.lora:
            reference = training.base  # the adapter is off
        functions = make_iteration(run, optimizer, algorithm, training)
        for number, drawn in training.iterations(len(questions), shown=("reward", "kl")[: 1 + algorithm.reference]):
            models = training.params, reference, training.base
            state, metrics, item_ids, rollout = iterate(
                run, functions, training.state, models, [questions[i] for i in drawn], number, rewards
            )
            training.updated(state, numbers=metrics, pending=metrics, item_ids=item_ids, inputs=rollout._asdict())
        result = {"iterations": training.done, "questions": len(questions), "from": sources(run, "warmup")}
        return training.finish(run.workdir.model("reft"), result)


def make_iteration(run: Run, optimizer, algorithm: Algorithm, training: Training) -> Iteration:
    """The compiled functions of the run's iterations."""
    machine, rl = run.machine, run.config.rl
    size = line_size(run.config, rl.max_len, rl.micro_batch)
    return Iteration(machine.model, machine.mesh, optimizer, algorithm, training.shardings, training.lora, **size)


def iterate(
    run: Run, functions: Iteration, state: TrainState, models: tuple, examples: list[Example], number: int, rewards
) -> tuple[TrainState, dict[str, float], list[str], Rollout]:
    """One iteration on `examples`: the new state, metrics, the items in the order of the rollout, and the rollout.

    `state` is donated. models: the parameters {'lm', head} of `state`, of the reference and of the base (see
    `Training`); the last two may be None. rewards: as in `roll_out`.
    """
    (params, reference, base), rl, algorithm = models, run.config.rl, functions.algorithm
    start_time, timeouts_before = time.monotonic(), run.programs["timeout"]

    # Sample solutions, execute their programs, take the rewards. Training uses the sampled ids as they are.
    prompts, graded, metrics = sampled(run, params["lm"], examples, number, algorithm, rewards)
    item_ids = [prompt.item_id for prompt in prompts[:: algorithm.samples]]
    completions, paid = [one.completion for one in graded], [one.verdict.reward for one in graded]
    row_length = round_up(rl.max_len, run.config.data.pad_multiple)  # for every rollout, so that all have one shape
    rollout = rollout_rows(prompts, completions, paid, row_length)
    rollout_end = time.monotonic()

    # Log-probabilities under the policy and the reference, and values. Then KL penalty and advantages.
    scores, packing = functions.score(params, reference, rollout)
    batch, batch_metrics = jax.device_get(functions.make_batch(rollout, scores, minibatches=rl.minibatches))
    gap = trainer_gap(scores, packing, completions)
    batch_metrics |= gap_metrics(gap) | {"padding": packing.padding}
    if "reward" in metrics:  # of the first rollout, before questions were replaced
        batch_metrics["reward_trained"] = batch_metrics.pop("reward")
    log_rollouts(run, number, graded, mean_advantages(packing, batch), gap)
    check_gap(rl.max_gap, batch_metrics, number)
    if rl.sampler_correction != "none":
        batch = corrected(batch, packing, importance_weights(gap, rl.sampler_correction, rl.sampler_cap))
    score_end = time.monotonic()

    # PPO epochs; each minibatch is one clipped update.
    for rows in minibatches(run.config.seed, number, len(prompts), rl.ppo_epochs, rl.minibatches, algorithm.samples):
        state, numbers = functions.update(state, rollout, batch, rows, base)
        error = numbers.pop("ratio_error_max", 0.0)  # an algorithm with a loss of its own may not have it
        batch_metrics.setdefault("ratio_max_error_first", error)
    metrics |= jax.device_get(batch_metrics | numbers)
    update_end = time.monotonic()

    metrics |= {"seconds_score": score_end - rollout_end, "seconds_update": update_end - score_end}
    metrics |= {"seconds": update_end - start_time, "timeouts": run.programs["timeout"] - timeouts_before}
    metrics["seconds_other"] = metrics["seconds"] - sum(metrics[f"seconds_{part}"] for part in PARTS)
    return state, metrics, item_ids, rollout


def sampled(
    run: Run, lm, examples: list[Example], number: int, algorithm: Algorithm, rewards: Rewards | None
) -> tuple[list[Prompt], list[Graded], dict[str, float]]:
    """The rollout of iteration `number`: prompts, the graded response to each, and metrics.

    If the algorithm leaves questions out whose samples all have the same score, others are sampled in their place, at
    most `redraws` times. Shares and means of the metrics are those of the first rollout, whose questions nobody chose;
    so is `reward`, which is there only if `redraws` > 0. Seconds and tokens are sums, and redrawn is the number of
    questions that were replaced.
    """
    samples, seen, questions = algorithm.samples, Counter(), run.inputs.questions
    prompts, graded, metrics = roll_out_once(run, lm, examples, PURPOSE, number, samples, rewards, seen, logged=False)
    redraws = algorithm.redraws if algorithm.leaves_out else 0
    if redraws:
        metrics |= {"redrawn": 0, "reward": float(np.mean([one.verdict.reward for one in graded]))}
    for attempt in range(redraws):
        scores = np.array([one.verdict.reward for one in graded]).reshape(-1, samples)
        same = np.flatnonzero(scores.max(1) == scores.min(1))
        if not len(same):
            break
        draw = np.random.default_rng([run.config.seed, number, attempt]).integers(len(questions), size=len(same))
        others, replaced = [questions[i] for i in draw], []
        new_prompts, new_graded, more = roll_out_once(
            run, lm, others, PURPOSE, number, samples, rewards, seen, logged=False
        )
        for to, row in enumerate((same[:, None] * samples + np.arange(samples)).ravel()):
            replaced.append(graded[row].line)
            prompts[row], graded[row] = new_prompts[to], new_graded[to]
        run.workdir.executions.append(replaced)
        for name in ("seconds_rollout", "seconds_reward", "seconds_programs", "prompt_tokens", "tokens"):
            metrics[name] += more[name]
        metrics["redrawn"] += len(same)
    return prompts, graded, metrics


def log_rollouts(run: Run, number: int, graded: list[Graded], advantages: np.ndarray, gap: np.ndarray) -> None:
    """Logs the rollouts of iteration `number` with what was reinforced.

    advantages: float[B], the mean of each row. gap: float32[N], as `trainer_gap` returns it.
    """
    ends = np.cumsum([len(one.completion.logprobs) for one in graded])
    gaps = [np.abs(part).max(initial=0.0) for part in np.split(gap, ends[:-1])]
    lines = [one.line | reinforced(number, row, one.text, advantages[row], gaps[row]) for row, one in enumerate(graded)]
    run.workdir.executions.append(lines)


def mean_advantages(packing: Packing, batch: PPOBatch) -> np.ndarray:
    """The mean advantage of each row's actions, float[B]; 0 for a row without actions. packing: of the same rows."""
    rows, batch_size = packing.at[0], len(batch.advantage)
    sums = np.bincount(rows, np.asarray(batch.advantage)[packing.at], minlength=batch_size)
    return sums / np.maximum(np.bincount(rows, minlength=batch_size), 1)


def trainer_gap(scores: Scores, packing: Packing, completions: list[Completion]) -> np.ndarray:
    """log π_trainer − log π_sampler of the sampled tokens, float32[N], completion after completion."""
    return scores.logprob[packing.at] - np.concatenate([completion.logprobs for completion in completions])


def check_gap(most: float, metrics: dict[str, float], number: int) -> None:
    """SamplerGapError if trainer and sampler disagree on a larger share of the tokens than `rl.max_gap` allows."""
    if 0 < most < metrics["sampler_outside"]:
        raise SamplerGapError(
            f"reft {number}: trainer and sampler disagree: their ratio is outside [0.5, 2] on "
            f"{metrics['sampler_outside']:.2%} of the sampled tokens, rl.max_gap allows {most:.2%}; the largest gap "
            f"is {metrics['sampler_gap']:.2f} nats; run the command check on this model, or use model.dtype=float32"
        )


def corrected(batch: PPOBatch, packing: Packing, weights: np.ndarray) -> PPOBatch:
    """The batch with each action's advantage times its importance weight, float32[N].

    All losses of the package are proportional to the advantage, so this weighs the policy's loss and nothing else.
    """
    advantage = np.array(batch.advantage)
    advantage[packing.at] *= weights
    return batch._replace(advantage=advantage)
