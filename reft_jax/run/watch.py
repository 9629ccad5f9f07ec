"""Warns of a run that does not fail but is slow or useless: its settings do not fit this machine or each other, no
completion has an answer, or the policy is ruined.
"""

import math
import re
from collections import Counter, deque
from pathlib import Path

from reft_jax.train.progress import remark
from reft_jax.types import Completion, Verdict

SHOWN_CHARS = 160
SILENT_ROLLOUTS = 3  # training rollouts without an answer before the warning; a single evaluation is enough
QUESTIONS = 64  # that a mean reward needs to be reliable: the samples of one question are alike
GONE, AWAY = 0.25, 1.0  # ruined below this share of the first mean reward and above this KL in nats per row
CPU_BFLOAT16 = {"avx512_bf16", "amx_bf16"}  # what /proc/cpuinfo calls the instructions of x86
CPUINFO = Path("/proc/cpuinfo")


def warn_of_settings(config, platform: str) -> None:
    """Prints what is probably not meant. platform: of the mesh's devices, as JAX names it."""
    if platform == "cpu" and config.model.dtype == "bfloat16" and _lacks_bfloat16():
        told = f"this CPU has none of the instructions for it ({', '.join(sorted(CPU_BFLOAT16))})"
        remark(f"warning: model.dtype=bfloat16 is probably slow: {told}; set --config.model.dtype=float32")
    int8 = [f"engine.{part}=int8" for part in ("weights", "cache") if getattr(config.engine, part) == "int8"]
    if int8 and config.rl.sampler_correction == "none":
        told = "updates do not see how far its rollouts are from the trained model"
        remark(f"warning: {' '.join(int8)}: {told}; set --config.rl.sampler_correction=tis")


def _lacks_bfloat16() -> bool:
    """Whether this is an x86 CPU without instructions for bfloat16; other CPUs name their instructions otherwise."""
    flags = re.search(r"^flags\s*:(.*)", CPUINFO.read_text(), re.M) if CPUINFO.exists() else None
    return flags is not None and not CPU_BFLOAT16 & set(flags[1].split())


class Tally:
    """The verdicts of one rollout: their number, and the reasons of those without an answer."""

    def __init__(self):
        self.total, self.reasons, self.examples = 0, Counter(), {}

    def add(self, completion: Completion, text: str, verdict: Verdict) -> None:
        self.total += 1
        if verdict.value is None:
            reason = verdict.status + ("" if completion.finished else ", cut at the length limit")
            self.reasons[reason] += 1
            self.examples.setdefault(reason, text)


class Silence:
    """Warns once if `patience` rollouts of one purpose in a row have no answer at all."""

    def __init__(self):
        self._silent: Counter[str] = Counter()

    def ended(self, purpose: str, tally: Tally, patience: int) -> None:
        """Counts a finished rollout of this purpose; prints the warning if it is due."""
        if not tally.total:
            return
        self._silent[purpose] = self._silent[purpose] + 1 if tally.reasons.total() == tally.total else 0
        if self._silent[purpose] == patience:
            [(reason, count)] = tally.reasons.most_common(1)
            rollouts = f" in each of {patience} iterations" * (patience > 1)
            told = f"{tally.total} of {tally.total} completions had no answer{rollouts}, most often: {reason} ({count})"
            remark(f"warning: {purpose}: {told}; one ends in {tally.examples[reason][-SHOWN_CHARS:]!r}")


class Collapse:
    """Finds the first PPO iteration at which the reward is lost and the policy is far from its reference."""

    def __init__(self, questions: int):
        """questions: per iteration. The numbers of enough iterations to have QUESTIONS of them are averaged."""
        self._last: deque[tuple[float, float]] = deque(maxlen=math.ceil(QUESTIONS / questions))
        self._first, self._told = None, False

    def add(self, line: dict) -> str:
        """Takes one line of the metrics; returns a message at the first ruined iteration, else ""."""
        if line.get("reward") is None or line.get("kl") is None:
            return ""
        self._last.append((float(line["reward"]), float(line["kl"])))
        if len(self._last) < self._last.maxlen:
            return ""
        reward, kl = (sum(numbers) / len(numbers) for numbers in zip(*self._last, strict=True))
        if self._first is None:
            self._first = reward
        if self._told or not (reward < GONE * self._first and kl > AWAY):
            return ""
        self._told = True
        return f"mean reward {reward:.3f}, {self._first:.3f} at the beginning; KL {kl:.3g} nats per row"
