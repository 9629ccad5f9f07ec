"""ReFT: reinforcement learning on the training questions; the reward depends on the answer of the executed program.

arXiv 2401.08967, §3. The policy starts from the warm-up model, which is also the reference of the KL penalty.
"""

import time
from functools import partial

import jax
import numpy as np

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.parallel.mesh import round_up
from reft_jax.run.open import Run
from reft_jax.stages.loop import Training
from reft_jax.stages.models import abstract_policy, finished, load_model, sources
from reft_jax.stages.rollout import open_rewards, roll_out_once
from reft_jax.train.batches import minibatches, rollout_rows
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.iteration import Iteration
from reft_jax.train.state import constant_schedule, make_optimizer

PARTS = ("rollout", "reward", "score", "update")  # timed parts of an iteration; the rest of its seconds is "other"


def run_reft(run: Run) -> dict:
    """Trains from models/warmup, saves models/reft (best on dev). Returns {'best': iteration, 'best_dev_top1', …}."""
    if result := finished(run, "reft"):
        return result
    rl, questions, algorithm = run.config.rl, run.inputs.questions, make_algorithm(run.config)
    schedule = constant_schedule(rl.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    reference = load_model(run, "warmup")["lm"]
    made_from = {"path": "models/warmup", "checksum": digest(array_checksums(reference))}
    start = {"best": 0, "best_dev_top1": -1.0}
    state_parts = abstract_policy(run), optimizer, partial(load_model, run, "warmup")
    with Training(run, "reft", *state_parts, start, made_from) as training, open_rewards(run) as rewards:
        size = {"micro_batch": rl.micro_batch, "max_len": rl.max_len, "multiple": run.config.data.pad_multiple}
        functions = Iteration(run.machine.model, run.machine.mesh, optimizer, algorithm, training.shardings, **size)
        row_length = round_up(rl.max_len, run.config.data.pad_multiple)  # for every rollout, so that all have one shape
        for number, drawn in training.iterations(len(questions), shown=("reward", "kl")):
            start_time, timeouts_before = time.monotonic(), run.programs["timeout"]
            state, examples = training.state, [questions[i] for i in drawn]
            item_ids = [example.item_id for example in examples]

            # Sample solutions, execute their programs, take the rewards. Training uses the sampled ids as they are.
            prompts, graded, metrics = roll_out_once(
                run, state.params["lm"], examples, "reft rollout", number, samples=algorithm.samples, rewards=rewards
            )
            completions, rewards = [one.completion for one in graded], [one.verdict.reward for one in graded]
            rollout = rollout_rows(prompts, completions, rewards, row_length)
            rollout_end = time.monotonic()

            # Log-probabilities under the policy and the reference, and values. Then KL penalty, GAE, whitening.
            scores, packing = functions.score(state.params, reference, rollout)
            batch, batch_metrics = jax.device_get(functions.make_batch(rollout, scores, minibatches=rl.minibatches))
            sampled = np.concatenate([completion.logprobs for completion in completions])
            batch_metrics["sampler_gap"] = np.abs(sampled - scores.logprob[packing.at]).max()
            batch_metrics["padding"] = packing.padding
            score_end = time.monotonic()

            # PPO epochs; each minibatch is one clipped update.
            for rows in minibatches(run.config.seed, number, len(prompts), rl.ppo_epochs, rl.minibatches):
                state, numbers = functions.update(state, rollout, batch, rows)
                error = numbers.pop("ratio_error_max", 0.0)  # an algorithm with a loss of its own may not have it
                batch_metrics.setdefault("ratio_max_error_first", error)
            metrics |= jax.device_get(batch_metrics | numbers)
            update_end = time.monotonic()

            metrics |= {"seconds_score": score_end - rollout_end, "seconds_update": update_end - score_end}
            metrics |= {"seconds": update_end - start_time, "timeouts": run.programs["timeout"] - timeouts_before}
            metrics["seconds_other"] = metrics["seconds"] - sum(metrics[f"seconds_{part}"] for part in PARTS)
            training.updated(state, numbers=metrics, pending=metrics, item_ids=item_ids, inputs=rollout._asdict())
        result = {"iterations": training.done, "questions": len(questions), "from": sources(run, "warmup")}
        return training.finish(run.workdir.model("reft"), result)
