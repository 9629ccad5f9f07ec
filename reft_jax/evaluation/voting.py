"""Judges n sampled completions of one question: voting, reranking, upper bound.

A *prediction* is a dict with keys `completion` (str), `solving_res` (float, str or None: the value the completion
ends in) and `correctness` (bool). A *question record* is a dict with keys `item_id`, `question`, `answer_value`,
`predictions` (the n predictions in sampling order), `most_voted_answer` (`vote` of the values) and `is_correct`
(`voted_correct`). These are the authors' key names, so that sample files can be exchanged.

Voting counts all n predictions, repeats included: a completion drawn twice is two votes. Reranking looks at each
distinct completion once.
"""

import math
from collections import Counter
from collections.abc import Sequence

from reft_jax.types import InputError

Value = float | str | None


def is_valid(value: Value) -> bool:
    """Whether a value can be voted for or reranked: a finite number, or text.

    `Task.read` gives None for anything else. Numbers in files of the authors' code may also be NaN or infinite.
    """
    return value is not None and (isinstance(value, str) or math.isfinite(value))


def deduplicate(predictions: Sequence[dict]) -> list[dict]:
    """Returns the predictions with distinct completion texts, in order. It keeps the first of equal ones."""
    first: dict[str, dict] = {}
    for prediction in predictions:
        first.setdefault(prediction["completion"], prediction)
    return list(first.values())


def vote(values: Sequence[Value]) -> Value:
    """The most frequent valid value, compared exactly. In a tie the first one wins. None if no value is valid."""
    counts = Counter(value for value in values if is_valid(value))
    return max(counts, key=counts.__getitem__, default=None)  # keys are in order of appearance; max keeps the first


def voted_correct(predictions: Sequence[dict]) -> bool:
    """Whether the voted value is correct; False if no value is valid.

    Correctness depends on the value only, so any prediction with the voted value decides.
    """
    voted = vote([prediction["solving_res"] for prediction in predictions])
    if voted is None:
        return False
    return next(prediction["correctness"] for prediction in predictions if prediction["solving_res"] == voted)


def rerank_choice(predictions: Sequence[dict], probabilities: Sequence[float]) -> int | None:
    """Index of the prediction that the reranker chooses; None if none has a valid value (counted as wrong).

    predictions: the result of `deduplicate`. probabilities: of class 1 (correct), one per prediction. It chooses the
    highest probability among the valid predictions; in a tie the first one wins. Raises ValueError if the lengths
    differ, InputError if a probability is NaN (comparisons with NaN would choose silently).
    """
    if len(predictions) != len(probabilities):
        raise ValueError(f"{len(predictions)} predictions but {len(probabilities)} probabilities")
    for i, probability in enumerate(probabilities):
        if math.isnan(probability):
            raise InputError(f"completion {i}: the reranker's probability is NaN; its weights are broken, retrain it")
    valid = (index for index, prediction in enumerate(predictions) if is_valid(prediction["solving_res"]))
    return max(valid, key=probabilities.__getitem__, default=None)


def upper_bound(predictions: Sequence[dict]) -> bool:
    """Whether any prediction is correct, which a perfect reranker would choose."""
    return any(prediction["correctness"] for prediction in predictions)
