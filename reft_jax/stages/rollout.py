"""Completions and their verdicts. Programs run while the engine decodes; only the last ones are waited for.

Every host has all completions. It runs its share of the programs and gets the other verdicts at the end.
"""

import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from reft_jax import executor
from reft_jax.parallel import hosts
from reft_jax.run.executions import execution
from reft_jax.run.open import Run
from reft_jax.run.watch import SILENT_ROLLOUTS, Tally
from reft_jax.store import local, short_hash
from reft_jax.tasks.registry import load_task
from reft_jax.tasks.rewards import RewardError, Rewards
from reft_jax.train.progress import Progress
from reft_jax.types import Completion, Example, Prompt, Verdict

LOGGED_AT_ONCE = 512  # lines of the audit log
POLL_S = 0.2  # how often to check whether to stop, while a program runs
SHOWN_AFTER_S = 5.0  # waiting for the last verdicts, before a line shows how many are left


class Graded(NamedTuple):
    """A completion, the text that was graded, what grading made of it, and its line for the audit log."""

    completion: Completion
    text: str
    verdict: Verdict
    line: dict = {}


class Clock:
    """Seconds of a rollout: decoding, while programs run too; then waiting for the last verdicts.

    programs: the run times of the distinct programs of every host.
    """

    def __init__(self):
        self.decoding, self.waiting = 0.0, 0.0
        self.programs: list[float] = []


class Grading:
    """Grades completions in the order in which they arrive; a context that ends with their programs.

    If the executor fails, InfrastructureError is raised here, and if a reward function does, RewardError: neither is
    ever a reward of 0. seconds: the run time of each distinct program, by the hash of its text, because hosts exchange
    these numbers. outcomes: how many programs ended in each way.

    Args:
        rewards: what gives the rewards; None: the task.
    """

    def __init__(self, run: Run, rewards: Rewards | None = None):
        self.config, self.guards = run.config, run.guards
        self.task = load_task(run.config.task, run.config.data.reading)
        self.under_way: deque[tuple[int, Example, str, Future | None]] = deque()
        self.rewards, self.unpaid = rewards, deque()  # (number, verdict, future of its reward)
        self.seconds: dict[str, float] = {}
        self.outcomes: Counter[str] = Counter()
        self._streams: dict[str, executor.Stream] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def submit(self, number: int, example: Example, text: str) -> None:
        """Starts to grade a completion; `collect` returns its verdict with this `number`."""
        future = None
        if self.config.data.format == "python":
            task = self.task.of(example.item_id)
            future = self._stream(task.returns).submit(task.program(text, example))
        self.under_way.append((number, example, text, future))

    def collect(self, wait: bool = False) -> Iterator[tuple[int, Verdict]]:
        """The verdicts that are known, by number, in the order of `submit`; with `wait`, all of them."""
        if self.rewards is None:
            yield from ((number, verdict) for number, _, _, verdict in self._verdicts(wait))
            return
        for number, example, text, verdict in self._verdicts(wait):
            self.unpaid.append((number, verdict, self.rewards.submit(text, example, verdict)))
        while self.unpaid and (wait or self.unpaid[0][2].done()):
            number, verdict, future = self.unpaid.popleft()
            paid = self._result(future)
            self.guards.step(alone=True)
            yield number, verdict._replace(reward=paid.reward, parts=paid.parts)

    def _verdicts(self, wait: bool) -> Iterator[tuple[int, Example, str, Verdict]]:
        """What is graded, with the task's reward."""
        while self.under_way and (wait or self.under_way[0][3] is None or self.under_way[0][3].done()):
            number, example, text, future = self.under_way.popleft()
            task = self.task.of(example.item_id)
            if future is None:
                verdict = task.judge(*task.stated(text), example)
            else:
                result = self._result(future)
                verdict = task.judge(*task.returned(result), example)
                self.outcomes.update([result.status] + ["cut at a blank line"] * result.cut)
                self.seconds[short_hash(text)] = result.ms / 1000
            self.guards.step(alone=True)
            yield number, example, text, verdict

    def _result(self, future: Future) -> Any:
        """Waits for a program or a reward. Raises Stopped if the run is asked to stop first; there is no verdict then.

        Prints where a reward function failed: the error itself is one line.
        """
        while True:
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                self.guards.check(alone=True)
            except executor.InfrastructureError:
                self.guards.check(alone=True)  # when the machine shuts down, the executor may end first
                raise
            except RewardError as error:
                print(f"\n{error.traceback.rstrip()}", file=sys.stderr, flush=True)
                raise

    def _stream(self, want: str) -> executor.Stream:
        if want not in self._streams:
            stream = executor.stream(want=want, **program_limits(self.config))
            self._streams[want] = self._stack.enter_context(stream)
        return self._streams[want]


def program_limits(config) -> dict[str, float]:
    """The limits of a program, as `executor.stream` and `executor.run_programs` take them."""
    limits = config.executor
    return {
        "timeout_s": limits.timeout_s,
        "workers": limits.workers,
        "memory_mb": limits.memory_mb,
        "program_kb": limits.program_kb,
    }


def roll_out(
    run: Run,
    lm,
    prompts: list[Prompt],
    examples: list[Example],
    purpose: str,
    clock: Clock | None = None,
    rewards: Rewards | None = None,
    logged: bool = True,
    **sampling,
) -> Iterator[tuple[int, Graded]]:
    """Yields (index of the prompt, graded completion) as verdicts come; with several hosts, after all have come.

    examples[i] is the question of prompts[i]. purpose: the name of the rollout in the audit log. rewards: what gives
    the rewards; None: the task. logged: whether to log here; if not, the caller does. sampling: arguments of
    `Engine.generate` (max_len, temperature, top_k, iteration).
    """
    clock, owners, alone, tally = clock or Clock(), shares(prompts), hosts.count() == 1, Tally()
    ended: dict[int, tuple[Completion, str]] = {}  # in the order in which rows ended
    mine: dict[int, Verdict] = {}
    with Grading(run, rewards) as grading, contextlib.closing(Log(run)) as log:

        def settled(verdicts, seconds) -> Iterator[tuple[int, Graded]]:
            for i, verdict in verdicts:
                completion, text = ended.pop(i)
                line = execution(purpose, examples[i], text, verdict, 1000 * seconds.get(short_hash(text), 0.0))
                if logged:
                    log.add(line)
                tally.add(completion, text, verdict)
                yield i, Graded(completion, text, verdict, line)

        begun = time.monotonic()
        for i, completion in run.machine.engine.generate(lm, prompts, **sampling):
            ended[i] = completion, run.inputs.text(prompts[i], completion)
            if owners[i] == hosts.number():
                grading.submit(i, examples[i], ended[i][1])
            if alone:
                yield from settled(grading.collect(), grading.seconds)
            else:
                mine |= grading.collect()
        clock.decoding, begun = time.monotonic() - begun, time.monotonic()
        rest = shown(grading.collect(wait=True), f"{purpose}: grading", len(grading.under_way) + len(grading.unpaid))
        if alone:
            yield from settled(rest, grading.seconds)
        else:
            mine |= rest
        verdicts, seconds = {}, {}
        for theirs in hosts.gather(f"verdicts of {purpose}", [mine, grading.seconds, grading.outcomes]):
            verdicts |= {int(i): Verdict(*verdict) for i, verdict in theirs[0].items()}
            seconds |= theirs[1]
            clock.programs += theirs[1].values()
            run.programs.update(theirs[2])
        clock.waiting = time.monotonic() - begun
        yield from settled([(i, verdicts[i]) for i in ended], seconds)
    run.silence.ended(purpose, tally, SILENT_ROLLOUTS if "iteration" in sampling else 1)


def shown(verdicts: Iterator[tuple[int, Verdict]], what: str, total: int) -> Iterator[tuple[int, Verdict]]:
    """Passes the verdicts on. If they take long, a line shows how many there are."""
    begun, progress = time.monotonic(), None
    for done, one in enumerate(verdicts, 1):
        yield one
        if time.monotonic() - begun > SHOWN_AFTER_S:
            progress = progress or Progress(what, total, "completion")
            progress.update(done)
    if progress:
        progress.close()


class Log:
    """Lines on their way to the audit log, written in batches."""

    def __init__(self, run: Run):
        self.executions, self.lines = run.workdir.executions, []

    def add(self, line: dict) -> None:
        self.lines.append(line)
        if len(self.lines) == LOGGED_AT_ONCE:
            self.close()

    def close(self) -> None:
        self.executions.append(self.lines)
        self.lines = []


def shares(prompts: list[Prompt]) -> list[int]:
    """The host that runs the program of each prompt. Hosts take questions in turn, so equal programs share a host."""
    turn: dict[str, int] = {}
    return [turn.setdefault(prompt.item_id, len(turn)) % hosts.count() for prompt in prompts]


def prompts_of_iteration(
    run: Run, examples: list[Example], samples: int = 1, seen: Counter | None = None
) -> list[Prompt]:
    """`samples` prompts per example for one iteration; the prompts of an example are next to each other.

    If an example comes twice, its prompts get different sample numbers: with equal ones its rows would be equal. seen:
    prompts of each item in earlier rollouts of the iteration; these are added to it.
    """
    seen, prompts = Counter() if seen is None else seen, []
    for prompt in run.inputs.prompts(examples, samples):
        prompts.append(prompt._replace(sample=seen[prompt.item_id]))
        seen[prompt.item_id] += 1
    return prompts


def roll_out_once(
    run: Run,
    lm,
    examples: list[Example],
    purpose: str,
    iteration: int,
    samples: int = 1,
    rewards: Rewards | None = None,
    seen: Counter | None = None,
    logged: bool = True,
) -> tuple[list[Prompt], list[Graded], dict[str, float]]:
    """The rollout of one training iteration: prompts, the graded response to each, and metrics.

    seen: as in `prompts_of_iteration`. logged: as in `roll_out`.
    """
    rl, clock, before = run.config.rl, Clock(), Counter(run.machine.engine.counts)
    prompts = prompts_of_iteration(run, examples, samples, seen)
    asked = [example for example in examples for _ in range(samples)]
    sampling = {"max_len": rl.max_len, "temperature": rl.temperature, "iteration": iteration}
    found = dict(roll_out(run, lm, prompts, asked, purpose, clock, rewards, logged, **sampling))
    graded = [found[i] for i in range(len(prompts))]
    decoded = run.machine.engine.counts - before
    return (
        prompts,
        graded,
        {
            "train_correct": top1(graded),
            "no_answer": np.mean([one.verdict.value is None for one in graded]),
            "finished": np.mean([one.completion.finished for one in graded]),
            "seconds_program_p50": np.percentile(clock.programs or [0.0], 50),
            "seconds_program_p99": np.percentile(clock.programs or [0.0], 99),
            "seconds_programs": sum(clock.programs),
            "executor_retries": executor.counts()["retries"],
            "seconds_rollout": clock.decoding,
            "seconds_reward": clock.waiting,
            "prompt_tokens": decoded["prompt_tokens"],
            "tokens": decoded["tokens"],
            "slots_busy": decoded["tokens"] / decoded["slot_steps"],
        }
        | reward_parts(graded),
    )


def reward_parts(graded: list[Graded]) -> dict[str, float]:
    """{"reward/NAME": mean of this part over the completions that have it}."""
    parts: dict[str, list[float]] = {}
    for one in graded:
        for name, part in (one.verdict.parts or {}).items():
            parts.setdefault(f"reward/{name}", []).append(part)
    return {name: float(np.mean(values)) for name, values in sorted(parts.items())}


@contextlib.contextmanager
def open_rewards(run: Run) -> Iterator[Rewards | None]:
    """The workers of the setting `reward`; None if it is empty and the task gives the rewards."""
    config = run.config
    if not config.reward:
        yield None
        return
    log = local(run.workdir.path / "logs") / f"rewards_{hosts.number()}.log"  # a process writes it, which needs a disk
    with Rewards(config.reward, config.reward_workers, config.reward_timeout_s, log) as rewards:
        yield rewards


def greedy(run: Run, lm, examples: list[Example], purpose: str) -> list[Graded]:
    """The greedy completion of each example, continued from the forced prefix."""
    sampling, found = {"max_len": run.config.sample.max_len, "temperature": 0.0}, {}
    progress = Progress(purpose, len(examples), "completion", first="evaluating")
    for i, graded in roll_out(run, lm, run.inputs.prompts(examples), examples, purpose, **sampling):
        found[i] = graded
        progress.update(len(found))
    progress.close()
    return [found[i] for i in range(len(examples))]


def top1(graded: list[Graded]) -> float:
    return float(np.mean([one.verdict.correct for one in graded]))
