"""The task's reward, and 0.1 more for a solution that has the form of the worked ones.

python -m reft_jax reft --config=… --workdir=… --config.reward=examples/format_reward.py:format_reward
"""

import re

PROGRAM = re.compile(r"def solution\(\):\n(    .*\n|\n)+    return \w+")
TEXT = re.compile(r".+\nTherefore, the answer is: \S+", re.DOTALL)


def format_reward(completion, example, verdict):
    """completion: its text; example.question, .answer_value, …; verdict.value, .correct, .reward (the task's)."""
    tidy = 0.1 if PROGRAM.fullmatch(completion) or TEXT.fullmatch(completion) else 0.0
    return verdict.reward + tidy, {"answer": verdict.reward, "format": tidy}
