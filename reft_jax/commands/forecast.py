"""What will a run be, on this machine? Its steps with rows, updates, files, memory and an estimate of the time.

`check --workdir` prints it after the lines of `check`. A few real steps are made, in a folder that is removed again.
"""

import math
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from reft_jax.algo.algorithms import make_algorithm
from reft_jax.commands.check import check_inputs
from reft_jax.commands.evaluate import run_evaluate
from reft_jax.commands.pipeline import Step, steps
from reft_jax.config import replaced
from reft_jax.model.lora import make_lora, trained
from reft_jax.parallel import hosts
from reft_jax.parallel.compilation import compile_seconds
from reft_jax.plan.table import table
from reft_jax.run.inputs import Inputs
from reft_jax.run.open import Run, checked_settings, open_run
from reft_jax.stages.loop import Training, schedule_of
from reft_jax.stages.models import abstract_policy, abstract_reranker, base_policy
from reft_jax.stages.reft import iterate, make_iteration, run_reft
from reft_jax.stages.rerank import run_rerank
from reft_jax.stages.rollout import open_rewards
from reft_jax.stages.sample import run_sample
from reft_jax.stages.self_train import OFFLINE, ONLINE, run_offline, run_online
from reft_jax.stages.sft import make_batch, run_sft
from reft_jax.train.checkpoints import whole_steps
from reft_jax.train.progress import clock
from reft_jax.train.state import abstract_state, constant_schedule, make_optimizer
from reft_jax.train.steps import make_step, sft_loss
from reft_jax.types import InputError

CHECKED = 100  # training questions that the lines of `check` look at
TRAINS = {run_sft: "sft", run_reft: "reft", run_offline: OFFLINE, run_online: ONLINE}


class Costs(NamedTuple):
    """Measured. Seconds: of a row in an SFT update; of a sampled token and its share of a program; of scoring a row by
    policy and reference; of a row in one pass of updates. memory: bytes at most. compiling: seconds of all.

    asked: how often an iteration asks for each of its questions: 1, or more if questions are replaced (rl.redraws)."""

    sft_row: float
    token: float
    score_row: float
    update_row: float
    memory: int
    compiling: float
    asked: float = 1.0


class Expected(NamedTuple):
    """Of one step: the rows that it reads, its updates, the seconds that it takes. Bytes: of the models that it makes,
    and at most besides them while it runs. saves: the number of its last saved step, of updates or iterations."""

    rows: str
    updates: int = 0
    seconds: float = 0.0
    models: int = 0
    working: int = 0
    saves: int = 0

    def seconds_after(self, step: int) -> float:
        """What is left after a saved step."""
        return self.seconds * max(0.0, 1 - step / self.saves) if self.saves else self.seconds


def run_forecast(config, workdir: Path, allowed: list[str], stage: str, baselines: bool) -> bool:
    """Prints the lines of `check` for the run's own model, then what the run will be. Writes nothing in `workdir`.

    stage: "pipeline", "sft" or "reft". Returns whether every line passed. InputError as from the run itself.
    """
    if hosts.count() > 1:
        raise InputError("check --workdir: runs on one host; `plan` says what a run on several will be")
    config = checked_settings(config, workdir.absolute(), [], allowed)
    config = replaced(config, {"tracking": "jsonl"})  # a service should not list a rehearsal as a run
    chain = steps(config, baselines=baselines)
    chain = [step for step in chain if stage in ("pipeline", TRAINS.get(step.function))]
    with tempfile.TemporaryDirectory() as scratch, open_run(config, Path(scratch), []) as run:
        passed = config.model.path == "toy" or check_inputs(few(run.inputs), run.machine.mesh)  # the toy is random
        print("making a few steps of the run, to see what they cost", flush=True)
        for line in Forecast(run, rehearse(run)).lines(chain, workdir):
            print(line)
    return passed


def few(inputs: Inputs) -> Inputs:
    """The inputs with the first training questions only."""
    return replace(inputs, data=replace(inputs.data, train=inputs.data.train[:CHECKED]))


def rehearse(run: Run) -> Costs:
    """Makes two SFT updates and two iterations of reinforcement learning, from the base model, with learning rate 0.
    The first of each compiles; the second is measured."""
    config, machine, algorithm, rl = run.config, run.machine, make_algorithm(run.config), run.config.rl
    optimizer = make_optimizer(constant_schedule(0.0, 0), weight_decay=0.0, clip_norm=1.0)
    dtype = machine.model.dtype if config.lora.rank else jnp.float32
    make_params = partial(base_policy, run.inputs, machine.mesh, machine.model, dtype)
    with Training(run, "rehearsal", abstract_policy(run), optimizer, make_params, {}) as training:
        update = make_step(sft_loss, machine.model, optimizer, training.shardings, training.lora)
        rows = run.inputs.sft_rows[: config.sft.batch_size]
        for _ in range(2):
            started = time.monotonic()
            packing, _, batch = make_batch(run, rows)
            training.state, numbers = update(training.state, batch, packing.count, training.base)
            jax.block_until_ready(numbers)
            sft_seconds = time.monotonic() - started
        reference = None
        if algorithm.reference:
            reference = training.base if training.lora else make_params()["lm"]
        functions, questions = make_iteration(run, optimizer, algorithm, training), run.inputs.questions
        asked = [questions[i % len(questions)] for i in range(rl.questions)]
        redrawn = 0
        with open_rewards(run) as rewards:
            for number in (1, 2):
                models = training.params, reference, training.base
                training.state, metrics, _, _ = iterate(run, functions, training.state, models, asked, number, rewards)
                redrawn += metrics.get("redrawn", 0)
    sampled = len(asked) * algorithm.samples
    return Costs(
        sft_row=sft_seconds / len(rows),
        token=(metrics["seconds_rollout"] + metrics["seconds_reward"]) / max(1, metrics["tokens"]),
        score_row=metrics["seconds_score"] / sampled,
        update_row=metrics["seconds_update"] / sampled / rl.ppo_epochs,
        memory=most_memory(),
        compiling=compile_seconds(),
        asked=1 + redrawn / (2 * len(asked)),
    )


def most_memory() -> int:
    """The most bytes in use so far: on a device, or in this process if its devices do not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


class Forecast:
    """What the steps of a run will be, given what a few of them cost."""

    def __init__(self, run: Run, costs: Costs):
        self.run, self.config, self.costs, data = run, run.config, costs, run.inputs.data
        self.tokens = float(np.mean([len(ids) - prompt for ids, prompt, _ in run.inputs.sft_rows]))
        self.completion = self.tokens * costs.token
        self.dev = len(data.dev) * self.completion
        self.asked = min(self.config.sample.train_limit or len(data.train), len(data.train))

    def lines(self, chain: list[Step], workdir: Path) -> Iterator[str]:
        """The table of the steps, and what stands below it."""
        costs, rl, rows, left, resumed = self.costs, self.config.rl, [], 0.0, []
        found = [self.expected(step, chain) for step in chain]
        for step, one in zip(chain, found, strict=True):
            stage = f"rerank_{step.arguments[0]}" if step.function is run_rerank else TRAINS.get(step.function)
            done = stage is not None and (workdir / stage / "done.json").exists()
            saved = 0 if done or stage is None else max(whole_steps(workdir / stage / "checkpoints"), default=0)
            seconds = one.seconds_after(saved)
            left += 0.0 if done else seconds
            resumed += [f"{stage} {saved} of {one.saves}"] if saved else []
            columns = one.rows, f"{one.updates or '-'}", size(one.models) if one.models else "-"
            rows.append([step.title, *columns, "done" if done else clock(seconds)])
        yield "\n" + table(["step", "rows", "updates", "models", "time"], rows) + "\n"
        models, working = size(sum(one.models for one in found)), size(max(one.working for one in found))
        where = "of this process" if jax.default_backend() == "cpu" else "per device"
        yield f"time       about {clock(left)} for what is not done, if this machine stays as fast as now"
        yield f"           without saving, and without compiling, which took {costs.compiling:.0f} s here"
        yield f"memory     {size(costs.memory)} {where} at most, in these steps"
        yield f"disk       {models} of models stay; at most {working} more while a stage runs"
        yield f"measured   an SFT row {costs.sft_row:.3g} s; {1 / costs.token:.3g} sampled tokens per second;"
        yield f"           scoring a row {costs.score_row:.3g} s; a row in each of {rl.ppo_epochs} passes of updates"
        yield f"           {costs.update_row:.3g} s"
        yield f"assumed    answers as long as the worked solutions ({self.tokens:.0f} tokens), all samples distinct"
        if resumed:
            yield f"           saved steps are not made again: {', '.join(resumed)}"
        if costs.asked > 1:
            yield f"           an iteration of ReFT asks {costs.asked:.3g} times its questions, as here (rl.redraws)"

    def expected(self, step: Step, chain: list[Step]) -> Expected:
        """What one step of the chain will read, make and cost."""
        config, data, costs = self.config, self.run.inputs.data, self.costs
        function, epochs = step.function, config.sft.stop_epoch or config.sft.epochs
        if function is run_sft:
            evaluated = {*range(config.sft.eval_every, epochs + 1, config.sft.eval_every), epochs}
            evaluated |= {config.sft.warmup_epoch} - {0}
            return self.supervised(len(self.run.inputs.sft_rows), epochs, len(evaluated), models=2)
        if function is run_offline:
            epochs = config.self_train.epochs
            rows = len(data.train) + self.asked * min(config.self_train.samples, config.sample.train_n)
            return self.supervised(rows, epochs, ceil(epochs / config.sft.eval_every), models=1)
        if function is run_online:
            passes, questions = config.self_train.updates, config.rl.questions
            seconds = questions * (self.completion + 2 * passes * costs.sft_row)  # its solution and its sample
            return self.iterations(questions, passes, seconds)
        if function is run_reft:
            rl = config.rl
            rows = rl.questions * make_algorithm(config).samples
            seconds = rows * (costs.asked * self.completion + costs.score_row + rl.ppo_epochs * costs.update_row)
            return self.iterations(rows, rl.ppo_epochs * rl.minibatches, seconds, costs.asked)
        if function is run_sample:
            train = step.arguments[1] == "train"
            count, n = (self.asked, config.sample.train_n) if train else (len(data.test), config.sample.n)
            return Expected(f"{count:,} × {n}", seconds=count * n * self.completion)
        if function is run_rerank:
            rows, epochs = self.asked * config.sample.train_n, config.rerank.epochs
            updates, sizes = epochs * ceil(rows / config.rerank.batch_size), self.sizes(abstract_reranker(self.run))
            return Expected(f"{rows:,}", updates, epochs * rows * costs.sft_row, *sizes, saves=updates)
        assert function is run_evaluate, step.title
        judged = sum(one.function is run_rerank for one in chain) * len(data.test) * config.sample.n
        greedy = (1 + sum(one.function in TRAINS for one in chain)) * len(data.test)  # the warm-up model too
        seconds = greedy * self.completion + judged * costs.score_row / 2  # by one model instead of two
        return Expected(f"{greedy:,} + {judged:,}", seconds=seconds)

    def supervised(self, rows: int, epochs: int, evaluations: int, models: int) -> Expected:
        seconds = epochs * rows * self.costs.sft_row + evaluations * self.dev
        size, working = self.sizes(abstract_policy(self.run))
        updates = epochs * ceil(rows / self.config.sft.batch_size)
        return Expected(f"{rows:,}", updates, seconds, models * size, working, saves=updates)

    def iterations(self, rows: int, updates: int, seconds: float, asked: float = 1.0) -> Expected:
        """rows, updates, seconds: of one iteration. asked: as in Costs."""
        plan, tokens = schedule_of(self.config.rl, len(self.run.inputs.questions)), self.config.rl.tokens
        made = min(plan.iterations, ceil(tokens / (rows * asked * self.tokens))) if tokens else plan.iterations
        seconds = made * seconds + (1 + ceil(made / plan.eval_every)) * self.dev
        sizes = self.sizes(abstract_policy(self.run))
        return Expected(f"{made} × {rows:,}", made * updates, seconds, *sizes, saves=made)

    def sizes(self, abstract) -> tuple[int, int]:
        """Bytes of a saved model, and of the saved steps and best models at the same time while it is trained."""
        trains = trained(make_lora(self.config), abstract)
        optimizer = make_optimizer(constant_schedule(0.0, 0), weight_decay=0.0, clip_norm=1.0)
        model, state = stored_bytes(trains), stored_bytes(abstract_state(optimizer, trains))
        return model, (self.config.keep_steps + 1) * (state + model)


def size(count: int) -> str:
    """Bytes, in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def stored_bytes(tree) -> int:
    """Bytes of a tree of abstract arrays."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
