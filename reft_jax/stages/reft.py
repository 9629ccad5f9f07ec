"""ReFT: reinforcement learning on the training questions; the executed program's answer is the reward.

arXiv 2401.08967, §3. The warm-up model is where the policy starts, and the reference that it is kept close to.
"""

import time
from functools import partial

import jax
import numpy as np

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.parallel.compilation import compiles
from reft_jax.parallel.mesh import round_up
from reft_jax.run.open import Run
from reft_jax.stages.loop import Training
from reft_jax.stages.models import abstract_policy, finished, load_model, sources
from reft_jax.stages.rollout import roll_out_once
from reft_jax.train.batches import minibatches, rollout_rows
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.iteration import Iteration
from reft_jax.train.state import constant_schedule, make_optimizer

PARTS = ("rollout", "reward", "score", "update")  # of an iteration's seconds; the rest is "other"


def run_reft(run: Run) -> dict:
    """Trains from models/warmup, saves models/reft (best on dev). Returns {'best': iteration, 'best_dev_top1', …}."""
    if result := finished(run, "reft"):
        return result
    rl, questions, algorithm = run.config.rl, run.inputs.questions, make_algorithm(run.config.rl)
    schedule = constant_schedule(rl.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    reference = load_model(run, "warmup")["lm"]
    made_from = {"path": "models/warmup", "checksum": digest(array_checksums(reference))}
    start = {"best": 0, "best_dev_top1": -1.0}
    policy = abstract_policy(run), optimizer, partial(load_model, run, "warmup")
    with Training(run, "reft", *policy, start, made_from) as training:
        size = {"micro_batch": rl.micro_batch, "max_len": rl.max_len, "multiple": run.config.data.pad_multiple}
        one = Iteration(run.machine.model, run.machine.mesh, optimizer, algorithm, training.shardings, **size)
        longest = round_up(rl.max_len, run.config.data.pad_multiple)  # always, so that rollouts have one shape
        for number, drawn in training.iterations(len(questions), shown=("reward", "kl")):
            started, timeouts, compiled = time.monotonic(), run.programs["timeout"], compiles()
            state, examples = training.state, [questions[i] for i in drawn]
            item_ids = [example.item_id for example in examples]

            # Sample solutions, execute them, take the rewards. The sampled ids are the ids that are trained on.
            where = run, state.params["lm"], examples, "reft rollout", number
            prompts, graded, line = roll_out_once(*where, samples=algorithm.samples)
            completions, rewards = [one.completion for one in graded], [one.verdict.reward for one in graded]
            rollout = rollout_rows(prompts, completions, rewards, longest)

            rolled_out = time.monotonic()
            scores, packing = one.score(state.params, reference, rollout)
            batch, metrics = jax.device_get(one.make_batch(rollout, scores, minibatches=rl.minibatches))
            sampled = np.concatenate([completion.logprobs for completion in completions])
            metrics["sampler_gap"] = np.abs(sampled - scores.logprob[packing.at]).max()
            metrics["padding"] = packing.padding

            scored = time.monotonic()
            for rows in minibatches(run.config.seed, number, len(prompts), rl.ppo_epochs, rl.minibatches):
                state, numbers = one.update(state, rollout, batch, rows)
                metrics.setdefault("ratio_max_error_first", numbers.pop("ratio_error_max"))
            metrics = jax.device_get(metrics | numbers)
            ended = time.monotonic()

            line |= metrics | {"seconds_score": scored - rolled_out, "seconds_update": ended - scored}
            line |= {"seconds": ended - started, "timeouts": run.programs["timeout"] - timeouts}
            line["seconds_other"] = line["seconds"] - sum(line[f"seconds_{part}"] for part in PARTS)
            line["compiles"] = compiles() - compiled
            training.updated(state, line, line, item_ids, rollout._asdict())
        result = {"iterations": training.done, "questions": len(questions), "from": sources(run, "warmup")}
        return training.finish(run.workdir.model("reft"), result)
