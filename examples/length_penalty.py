"""The task's reward, less a little for each character of a long solution that is correct.

    python -m reft_jax reft --config=… --workdir=… --config.reward=examples/length_penalty.py:length_penalty

A wrong solution is not punished for its length: else a model learns to give up early.
"""

FREE = 400  # characters, the question in a program's docstring not counted
PER_CHARACTER = 0.001
MOST = 0.5  # so that a long correct solution is still better than a wrong one


def length_penalty(completion, example, verdict):
    own = completion.replace(example.question.strip(), "", 1)
    penalty = min(MOST, PER_CHARACTER * max(0, len(own) - FREE)) if verdict.correct else 0.0
    return verdict.reward - penalty, {"answer": verdict.reward, "length": -penalty}
