"""Completions and their verdicts: programs run while the engine decodes on, so that only the last are waited for."""

import contextlib
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from reft_jax import executor
from reft_jax.runs.executions import execution
from reft_jax.runs.setup import Run
from reft_jax.task import answers
from reft_jax.types import Completion, Example, Prompt, Verdict

LOGGED_AT_ONCE = 512  # lines of the audit log


class Graded(NamedTuple):
    """A completion, the text that was graded, and what grading made of it."""

    completion: Completion
    text: str
    verdict: Verdict


class Clock:
    """Where the time of a rollout goes, in seconds: decoding (with what hides behind it), then waiting for verdicts.

    programs: the run time of each program, counted once if it came twice.
    """

    def __init__(self):
        self.decoding, self.waiting = 0.0, 0.0
        self.programs: list[float] = []


class Grading:
    """Takes completions as they come and gives verdicts back in that order; a context that ends with its programs.

    An executor that fails raises InfrastructureError here: it is never a reward of 0.
    """

    def __init__(self, run: Run, purpose: str):
        self.run, self.purpose = run, purpose
        self.under_way: deque[tuple[int, Example, str, Future | None]] = deque()
        self.lines: list[dict] = []
        self.seconds: dict[str, float] = {}  # by program
        self._streams: dict[str, executor.Stream] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)
        self.run.executions.append(self.lines)

    def submit(self, number: int, example: Example, text: str) -> None:
        """`number` comes back with the verdict."""
        future = None
        if self.run.config.data.engine == "python":
            future = self._stream(answers.wanted(example)).submit(text)
        self.under_way.append((number, example, text, future))

    def ready(self, wait: bool = False) -> Iterator[tuple[int, str, Verdict]]:
        """(number, text, verdict) of those that are known and, with `wait`, of all."""
        while self.under_way and (wait or self.under_way[0][3] is None or self.under_way[0][3].done()):
            number, example, text, future = self.under_way.popleft()
            if future is None:
                verdict = answers.judge(*answers.stated(text, example), example)
            else:
                result = future.result()
                verdict = answers.judge(*answers.returned(result, example), example)
                self.run.programs.update([result.status] + ["cut at a blank line"] * result.cut)
                self.seconds[text] = result.ms / 1000
            took = self.seconds.get(text, 0.0)
            self.lines.append(execution(self.purpose, example, text, verdict, 1000 * took))
            if len(self.lines) == LOGGED_AT_ONCE:
                self.run.executions.append(self.lines)
                self.lines = []
            yield number, text, verdict

    def _stream(self, want: str) -> executor.Stream:
        if want not in self._streams:
            limits = self.run.config.executor
            self._streams[want] = self._stack.enter_context(
                executor.stream(
                    timeout_s=limits.timeout_s, workers=limits.workers, memory_mb=limits.memory_mb, want=want
                )
            )
        return self._streams[want]


def roll_out(
    run: Run, lm, prompts: list[Prompt], examples: list[Example], purpose: str, clock: Clock | None = None, **sampling
) -> Iterator[tuple[int, Graded]]:
    """Yields (index of the prompt, what became of it) as verdicts come; `examples[i]` is what prompts[i] asks.

    `sampling` is the engine's: max_len, temperature, top_k, iteration. `purpose` names the rollout in the audit log.
    """
    clock, completions = clock or Clock(), {}
    with Grading(run, purpose) as grading:

        def graded(wait: bool):
            for i, text, verdict in grading.ready(wait):
                yield i, Graded(completions.pop(i), text, verdict)

        begun = time.monotonic()
        for i, completion in run.engine.generate(lm, prompts, **sampling):
            completions[i] = completion
            grading.submit(i, examples[i], run.text(prompts[i], completion))
            yield from graded(wait=False)
        clock.decoding, begun = time.monotonic() - begun, time.monotonic()
        yield from graded(wait=True)
    clock.waiting = time.monotonic() - begun
    clock.programs = list(grading.seconds.values())


def one_each(run: Run, examples: list[Example]) -> list[Prompt]:
    """A prompt of each example for one iteration; one that comes twice is sampled under another number, or both rows
    would be the same."""
    seen, prompts = Counter(), []
    for prompt in run.prompts(examples):
        prompts.append(prompt._replace(sample=seen[prompt.item_id]))
        seen[prompt.item_id] += 1
    return prompts


def greedy(run: Run, lm, examples: list[Example], purpose: str) -> list[Graded]:
    """The greedy completion of each example, continued from the forced prefix."""
    max_len = run.config.sample.max_len
    found = dict(roll_out(run, lm, run.prompts(examples), examples, purpose, max_len=max_len, temperature=0.0))
    return [found[i] for i in range(len(examples))]


def top1(graded: list[Graded]) -> float:
    return float(np.mean([one.verdict.correct for one in graded]))
