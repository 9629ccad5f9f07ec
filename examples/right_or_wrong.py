"""1 for a correct answer and 0 for any other: no 0.1 for a wrong number, which the paper's reward gives.

    python -m reft_jax reft --config=… --workdir=… --config.reward=examples/right_or_wrong.py:right_or_wrong

GRPO and DAPO divide by the spread within a question. If no sample of it is right, a program that ends with any number
then counts as much as a right answer elsewhere. A weak model learns to write short programs that do not fail.
"""


def right_or_wrong(completion, example, verdict):
    return float(verdict.correct)
