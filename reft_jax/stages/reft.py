"""ReFT: PPO on the training questions, with the executed program's answer as the reward (arXiv 2401.08967, §3)."""

import time
from collections import Counter

import jax
import numpy as np

from reft_jax import executor
from reft_jax.algo.advantages import action_mask
from reft_jax.parallel.compilation import compiles
from reft_jax.parallel.mesh import put_rows, round_up
from reft_jax.run.open import Run
from reft_jax.stages.loop import Training, train_iterations
from reft_jax.stages.models import abstract_policy, finished, load_model, model_folder, sources
from reft_jax.stages.rollout import Clock, one_each, roll_out
from reft_jax.train.batches import rollout_rows, rows_at
from reft_jax.train.checksums import array_checksums, digest
from reft_jax.train.packing import Packing, pack_rollout
from reft_jax.train.scoring import make_scorer
from reft_jax.train.state import TrainState, constant_schedule, make_optimizer
from reft_jax.train.steps import ClipSettings, make_ppo_batch, make_ppo_step
from reft_jax.types import Example, Rollout

PARTS = ("rollout", "reward", "score", "update")  # of an iteration's seconds; the rest is "other"


class Iteration:
    """The jitted parts of one PPO iteration, and the frozen reference."""

    def __init__(self, run: Run, reference, optimizer, where):
        """`reference` is the parameters of a language model; `where` are the shardings of the state."""
        rl = run.config.rl
        self.run, self.reference = run, {"lm": reference}
        self.score = make_scorer(run.model, rl.temperature)
        clip = ClipSettings(rl.clip, rl.value_clip, rl.vf_coef, rl.temperature)
        self.step = make_ppo_step(run.model, optimizer, clip, where)
        self.prepare = jax.jit(make_ppo_batch, static_argnames=("kl_coef", "gamma", "lam"))

    def rollout(self, lm, examples: list[Example], iteration: int) -> tuple[Rollout, list[np.ndarray], dict]:
        """One sampled and graded response a question; the sampled ids are the trained ids.

        Also the sampler's own log-probabilities of each response, and metrics.
        """
        run, rl, clock, before = self.run, self.run.config.rl, Clock(), Counter(self.run.engine.counts)
        prompts = one_each(run, examples)
        sampling = {"max_len": rl.max_len, "temperature": rl.temperature, "iteration": iteration}
        found = dict(roll_out(run, lm, prompts, examples, "reft rollout", clock, **sampling))
        completions, _, verdicts = zip(*(found[i] for i in range(len(examples))), strict=True)
        decoded = run.engine.counts - before
        metrics = {
            "train_correct": np.mean([verdict.correct for verdict in verdicts]),
            "no_answer": np.mean([verdict.value is None for verdict in verdicts]),
            "finished": np.mean([completion.finished for completion in completions]),
            "seconds_program_p50": np.percentile(clock.programs or [0.0], 50),
            "seconds_program_p99": np.percentile(clock.programs or [0.0], 99),
            "seconds_programs": sum(clock.programs),
            "executor_retries": executor.counts()["retries"],
            "seconds_rollout": clock.decoding,
            "seconds_reward": clock.waiting,
            "prompt_tokens": decoded["prompt_tokens"],
            "slots_busy": decoded["tokens"] / decoded["slot_steps"],
        }
        scores = [verdict.reward for verdict in verdicts]
        longest = round_up(rl.max_len, run.config.data.pad_multiple)  # always: one shape
        rollout = rollout_rows(prompts, completions, scores, longest)
        return rollout, [completion.logprobs for completion in completions], metrics

    def update(
        self, state: TrainState, rollout: Rollout, sampler_logprobs: list[np.ndarray], iteration: int
    ) -> tuple[TrainState, dict]:
        """Scores the rows under policy and reference, then ppo_epochs × minibatches updates."""
        run, rl, started = self.run, self.run.config.rl, time.monotonic()
        length, packing = rollout.tokens.shape[1], self.pack(rollout)
        lines = put_rows(run.mesh, packing.lines, axis=1)
        scored = *self.score(state.params, lines, packing.count), self.score(self.reference, lines, packing.count)[0]
        scores = [packing.collect(x, length) for x in scored]  # log-probabilities, values, the reference's
        settings = {"kl_coef": rl.kl_coef, "gamma": rl.gamma, "lam": rl.lam, "minibatches": rl.minibatches}
        batch, metrics = jax.device_get(self.prepare(rollout, *scores, **settings))
        mask = np.asarray(action_mask(rollout.prompt_len, rollout.total_len, length))
        metrics["sampler_gap"] = np.abs(np.concatenate(sampler_logprobs) - scores[0][mask]).max()
        metrics["padding"] = packing.padding
        done = time.monotonic()
        for ppo_epoch in range(rl.ppo_epochs):
            order = np.random.default_rng([run.config.seed, iteration, ppo_epoch]).permutation(rl.questions)
            for chosen in order.reshape(rl.minibatches, -1):
                minibatch, old = jax.tree.map(lambda x, rows=chosen: x[rows], (rollout, batch))
                packing = self.pack(minibatch)
                rows = put_rows(run.mesh, (packing.lines, packing.spread_all(old)), axis=1)
                state, numbers = self.step(state, rows, packing.count)
                metrics.setdefault("ratio_max_error_first", numbers["ratio_max_error"])
        metrics = jax.device_get(metrics | numbers)
        del metrics["ratio_max_error"]
        times = {"seconds_score": done - started, "seconds_update": time.monotonic() - done}
        return state, metrics | times

    def pack(self, rollout: Rollout) -> Packing:
        """The rows in lines, with room for as many as the config allows."""
        rl = self.run.config.rl
        return pack_rollout(
            rollout,
            max_len=rl.max_len,
            micro_batch=rl.micro_batch,
            micro_batches=len(rollout.tokens) // rl.micro_batch,
            multiple=self.run.config.data.pad_multiple,
        )


def run_reft(run: Run) -> dict:
    """Trains from models/warmup, saves models/reft (best on dev). Returns {'best': iteration, 'best_dev_top1', …}."""
    if result := finished(run, "reft"):
        return result
    rl, questions = run.config.rl, run.questions
    schedule = constant_schedule(rl.learning_rate, rl.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=rl.weight_decay, clip_norm=rl.clip_norm)
    begin = {"best": 0, "best_dev_top1": -1.0}
    reference = load_model(run, "warmup")["lm"]
    made_from = {"path": "models/warmup", "checksum": digest(array_checksums(reference))}
    where = run, "reft", abstract_policy(run), optimizer
    with Training(*where, lambda: load_model(run, "warmup"), begin, made_from) as training:
        one = Iteration(run, reference, optimizer, training.shardings)

        def iterate(state, iteration):
            begun, timeouts, compiled = time.monotonic(), run.programs["timeout"], compiles()
            chosen = rows_at(run.config.seed, (iteration - 1) * rl.questions, rl.questions, len(questions))
            examples = [questions[i] for i in chosen]
            rollout, logprobs, line = one.rollout(state.params["lm"], examples, iteration)
            state, numbers = one.update(state, rollout, logprobs, iteration)
            line |= numbers | {"seconds": time.monotonic() - begun, "timeouts": run.programs["timeout"] - timeouts}
            line["seconds_other"] = line["seconds"] - sum(line[f"seconds_{part}"] for part in PARTS)
            line["compiles"] = compiles() - compiled
            return state, line, [example.item_id for example in examples], rollout._asdict()

        iterations = train_iterations(training, iterate, questions=len(questions), shown=("reward", "kl"))
        result = {"iterations": iterations, "questions": len(questions), "from": sources(run, "warmup")}
        return training.finish(model_folder(run, "reft"), result)
