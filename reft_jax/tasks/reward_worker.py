"""A process that computes rewards: runs a function of the user's on one completion at a time. Imports no JAX.

    python -m reft_jax.tasks.reward_worker path.py:NAME FD

It reads requests from standard input and writes replies to standard output, a line of JSON each. What the function
prints goes to standard error, so that it cannot be taken for a reply. On SIGABRT it writes to the descriptor FD where
the function is, and ends. It also ends with its parent.
"""

import ctypes
import faulthandler
import inspect
import json
import math
import numbers
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from reft_jax import plugins
from reft_jax.types import Example, InputError, Verdict

PR_SET_PDEATHSIG = 1
LARGEST = 3.4e38  # in float32, the type of rewards in training


def main(name: str, fd: str) -> None:
    """Answers {"ready": true} when the function is loaded, then every request until the input ends."""
    faulthandler.enable(int(fd))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # SIGABRT is no crash to look into
    end_with_parent()
    requests, replies = own_streams()
    try:
        reward = load_reward(name)
    except InputError as error:
        reply(replies, {"error": str(error)})
        return
    reply(replies, {"ready": True})
    for line in requests:
        text, example, verdict = json.loads(line)
        reply(replies, answer(reward, text, Example(*example), Verdict(*verdict)))


def end_with_parent() -> None:
    """Lets a signal to the parent's group be the parent's matter, and dies when the parent does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere it ends when the function returns: its input has ended
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def own_streams() -> tuple[TextIO, TextIO]:
    """Requests and replies. Descriptor 0 becomes empty, 1 becomes standard error, whoever writes to it."""
    requests, replies = os.fdopen(os.dup(0), encoding="ascii"), os.fdopen(os.dup(1), "w", encoding="ascii")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)
    return requests, replies


def load_reward(name: str) -> Callable:
    """The function that the setting `reward` names. InputError if there is none that takes three arguments."""
    reward = plugins.load(name, "reward")
    try:
        inspect.signature(reward).bind(None, None, None)
    except TypeError as error:
        raise InputError(
            f"reward={name!r} must be a function of (completion, example, verdict) that returns a number ({error})"
        ) from error
    return reward


def answer(reward: Callable, text: str, example: Example, verdict: Verdict) -> dict:
    """{"reward", "parts"}, or {"error", "traceback"} if the function fails or returns no number."""
    try:
        paid, parts = checked(reward(text, example, verdict))
        return {"reward": paid, "parts": parts}
    except BaseException as error:  # also of sys.exit: no reward may be lost without a word
        frames = error.__traceback__.tb_next  # without this function
        told = "".join(traceback.format_exception(type(error), error, frames))
        return {"error": " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"), "traceback": told}


def checked(result: Any) -> tuple[float, dict[str, float]]:
    """The reward and its named parts. Raises TypeError or ValueError unless all are finite numbers."""
    paid, parts = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(parts, dict) or not all(isinstance(name, str) and name for name in parts):
        raise TypeError(f"a reward is a number, or (number, {{name: number}}); this is {result!r}")
    return _number("the reward", paid), {name: _number(f"the part {name!r}", part) for name, part in parts.items()}


def _number(what: str, value: Any) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{what} is {value!r}; it must be a number")
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"{what} is {value!r}; it must be finite, in float32 too")
    return float(value)


def reply(replies: TextIO, value: dict) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
