"""ReFT: PPO on the training questions, with the executed program's answer as the reward (RECIPE §4)."""

import time

import jax
import numpy as np

from reft_jax.parallel.mesh import put_rows
from reft_jax.runs.setup import Run
from reft_jax.runs.stages import Training, abstract_policy, finish, finished, greedy, load_model, model_folder, top1
from reft_jax.train.batches import in_micro_batches, rollout_rows, rows_at, window_width
from reft_jax.train.checkpoints import save_params
from reft_jax.train.metrics import Progress
from reft_jax.train.scoring import CHUNK, make_scorer
from reft_jax.train.state import TrainState, constant_schedule, make_optimizer
from reft_jax.train.steps import ClipSettings, make_ppo_batch, make_ppo_step
from reft_jax.types import Example, Rollout


class Iteration:
    """The jitted parts of one PPO iteration, and the frozen reference."""

    def __init__(self, run: Run, optimizer, where):
        ppo = run.config.ppo
        self.run, self.reference = run, {"lm": load_model(run, "warmup")["lm"]}
        self.score = make_scorer(run.model, ppo.temperature)
        clip = ClipSettings(ppo.clip, ppo.value_clip, ppo.vf_coef, ppo.temperature)
        self.step = make_ppo_step(run.model, optimizer, clip, where)
        self.prepare = jax.jit(make_ppo_batch, static_argnames=("kl_coef", "gamma", "lam"))

    def rollout(self, lm, examples: list[Example], iteration: int) -> tuple[Rollout, dict]:
        """One sampled and graded response a question; the sampled ids are the trained ids."""
        run, ppo, started = self.run, self.run.config.ppo, time.monotonic()
        prompts, completions = run.prompts(examples), [None] * len(examples)
        for i, completion in run.engine.generate(
            lm, prompts, max_len=ppo.max_len, temperature=ppo.temperature, iteration=iteration
        ):
            completions[i] = completion
        sampled = time.monotonic()
        texts = [run.text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        verdicts = run.grade(texts, examples)
        metrics = {
            "train_correct": np.mean([verdict.correct for verdict in verdicts]),
            "no_answer": np.mean([verdict.value is None for verdict in verdicts]),
            "finished": np.mean([completion.finished for completion in completions]),
            "seconds_rollout": sampled - started,
            "seconds_reward": time.monotonic() - sampled,
        }
        scores = [verdict.reward for verdict in verdicts]
        return rollout_rows(prompts, completions, scores, run.config.data.pad_multiple), metrics

    def update(self, state: TrainState, rollout: Rollout, iteration: int) -> tuple[TrainState, dict]:
        """Scores the rows under policy and reference, then ppo_epochs × minibatches updates."""
        run, ppo, started = self.run, self.run.config.ppo, time.monotonic()
        width = window_width(rollout_actions(rollout), CHUNK)
        micro = in_micro_batches((rollout.tokens, rollout.prompt_len - 1), ppo.micro_batch)
        rows = put_rows(run.mesh, micro, axis=1)
        logprob, value = self.score(state.params, *rows, width=width)
        ref_logprob, _ = self.score(self.reference, *rows, width=width)
        scores = [np.asarray(x).reshape(rollout.tokens.shape) for x in (logprob, value, ref_logprob)]
        settings = {"kl_coef": ppo.kl_coef, "gamma": ppo.gamma, "lam": ppo.lam}
        batch, metrics = jax.device_get(self.prepare(rollout, *scores, **settings))
        scored = time.monotonic()
        for ppo_epoch in range(ppo.ppo_epochs):
            order = np.random.default_rng([run.config.seed, iteration, ppo_epoch]).permutation(ppo.prompts)
            for chosen in order.reshape(ppo.minibatches, -1):
                rows = in_micro_batches(jax.tree.map(lambda x, i=chosen: x[i], batch), ppo.micro_batch)
                state, numbers = self.step(state, put_rows(run.mesh, rows, axis=1), width)
                if ppo_epoch == 0:
                    metrics.setdefault("ratio_max_error_first", numbers["ratio_max_error"])
        metrics |= jax.device_get(numbers)
        del metrics["ratio_max_error"]
        times = {"seconds_score": scored - started, "seconds_update": time.monotonic() - scored}
        return state, metrics | times


def rollout_actions(rollout: Rollout) -> np.ndarray:
    """The action mask on the host, bool[B,T]."""
    t = np.arange(rollout.tokens.shape[1])[None]
    return (t >= rollout.prompt_len[:, None] - 1) & (t <= rollout.total_len[:, None] - 2)


def run_reft(run: Run) -> dict:
    """Trains from models/warmup, saves models/reft (best on dev). Returns {'best_iteration', 'best_dev_top1', …}."""
    if result := finished(run, "reft"):
        return result
    ppo, questions = run.config.ppo, run.questions
    iterations = ppo.iterations or ppo.epochs * len(questions) // ppo.prompts
    schedule = constant_schedule(ppo.learning_rate, ppo.lr_warmup)
    optimizer = make_optimizer(schedule, weight_decay=ppo.weight_decay, clip_norm=ppo.clip_norm)
    begin = {"best_iteration": 0, "best_dev_top1": -1.0}
    training = Training(run, "reft", abstract_policy(run), optimizer, lambda: load_model(run, "warmup"), begin)
    one, info = Iteration(run, optimizer, training.shardings), training.info
    progress = Progress("reft", iterations, "iteration", done0=training.done)
    for iteration in range(training.done + 1, iterations + 1):
        begun, timeouts = time.monotonic(), run.programs["timeout"]
        chosen = rows_at(run.config.seed, (iteration - 1) * ppo.prompts, ppo.prompts, len(questions))
        rollout, line = one.rollout(training.state.params["lm"], [questions[i] for i in chosen], iteration)
        training.state, numbers = one.update(training.state, rollout, iteration)
        line |= numbers | {"seconds": time.monotonic() - begun, "timeouts": run.programs["timeout"] - timeouts}
        if iteration % ppo.eval_every == 0 or iteration == iterations:
            params = training.state.params
            line["dev_top1"] = top1(greedy(run, params["lm"], run.data.dev, run.config.sample.max_len))
            if line["dev_top1"] > info["best_dev_top1"]:
                info |= {"best_iteration": iteration, "best_dev_top1": line["dev_top1"]}
                save_params(model_folder(run, "reft"), params)
        training.metrics.write(iteration, line)
        if iteration % ppo.save_every == 0 or iteration == iterations:
            training.save(iteration, iteration)
        progress.update(iteration, reward=line["reward"], kl=line["kl"], dev_top1=max(info["best_dev_top1"], 0.0))
    progress.close()
    training.close()
    return finish(run, "reft", info | {"iterations": iterations, "questions": len(questions)})
