"""Voting, reranking and the upper bound: by hand, and against an evaluation of the authors' code."""

import json
from collections import defaultdict

import numpy as np
import pytest

from reft_jax.evaluation.voting import deduplicate, rerank_choice, upper_bound, vote, voted_correct
from reft_jax.tasks.registry import TASKS
from reft_jax.types import InputError


def prediction(completion, value, correct=False):
    return {"completion": completion, "solving_res": value, "correctness": correct}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 2.0], 2.0),
        ([3.0, 2.0], 3.0),  # a tie: the first seen
        ([3.0, 2.0, 2.0, 3.0], 3.0),  # not the first to reach the count
        ([2.0, 2.0049, 2.0049], 2.0049),  # values a grader would call equal are counted apart
        ([None, None, 7.0], 7.0),  # no answer is not an answer, however frequent
        ([float("nan"), float("inf"), float("inf"), 7.0], 7.0),
        (["b", "a", "a"], "a"),
        ([], None),
    ],
)
def test_vote(values, expected):
    assert vote(values) == expected


@pytest.mark.parametrize(("said", "expected"), [(["7", "7", "none", "none", "none", "c"], "c"), (["?"], None)])
def test_what_a_task_reads_as_no_answer_has_no_vote(said, expected):
    assert vote([TASKS["mathqa"].read(text) for text in said]) == expected


def test_repeated_completions_vote_each_time_but_are_reranked_once():
    predictions = [prediction("x", 1.0, True), prediction("y", 2.0), prediction("y", 2.0), prediction("z", 1.0, True)]
    assert not voted_correct([*predictions, prediction("y", 2.0)])  # 2 against 3 draws
    distinct = deduplicate(predictions)
    assert distinct == [predictions[0], predictions[1], predictions[3]]
    assert distinct[1] is predictions[1]


def test_a_question_without_any_valid_answer_is_wrong():
    predictions = [prediction("x", None), prediction("y", None)]
    assert not voted_correct(predictions)
    assert rerank_choice(predictions, [0.9, 0.8]) is None
    assert not upper_bound(predictions)
    assert not voted_correct([])


def test_rerank_takes_the_most_probable_valid_completion_and_the_first_of_equals():
    predictions = [prediction("a", None), prediction("b", 1.0), prediction("c", 2.0, True), prediction("d", 3.0)]
    assert rerank_choice(predictions, [0.9, 0.2, 0.7, 0.7]) == 2
    assert rerank_choice(predictions, np.array([0.9, 0.2, 0.1, 0.1])) == 1


def test_rerank_refuses_probabilities_that_cannot_be_compared():
    predictions = [prediction("a", 1.0), prediction("b", 2.0)]
    with pytest.raises(InputError, match="completion 1: .*NaN"):
        rerank_choice(predictions, [0.5, float("nan")])
    with pytest.raises(ValueError, match="2 predictions but 3"):
        rerank_choice(predictions, [0.5, 0.4, 0.3])


def test_upper_bound_needs_one_correct_prediction():
    assert upper_bound([prediction("a", 1.0), prediction("b", 2.0, True)])


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/rerank_0/rerank.json").read_text())


def test_votes_equal_those_of_the_authors_question_by_question(golden):
    # Their sampling script counts the values of all predictions, repeats included, and stores what it found.
    ties = 0
    for question in golden["samples"]:
        values = [p["solving_res"] for p in question["predictions"]]
        assert vote(values) == question["most_voted_answer"]
        assert voted_correct(question["predictions"]) == question["is_correct"]
        counts = sorted((values.count(value) for value in set(values) - {None}), reverse=True)
        ties += counts[:1] == counts[1:2]
    assert ties > 0  # the file does try the rule for ties


def test_evaluation_equals_that_of_the_authors_exactly(golden):
    # Their reranker evaluation deduplicates each question's predictions by text, in order, and runs the model on each
    # (`rows`). cls_acc: share of all rows whose argmax of the two logits equals the correctness flag. rerank_acc: flag
    # of the row with the highest softmax probability of class 1 among those with a value. upper_bound: any flag true.
    # vote_acc: not voted again over the distinct rows; it is the sampling script's `is_correct` of each question.
    logits = defaultdict(list)
    for row in golden["rows"]:
        logits[row["item_id"]].append(row["logits"])

    voted, reranked, bound, classified = [], [], [], []
    for question in golden["samples"]:
        distinct = deduplicate(question["predictions"])
        own = np.array(logits[question["item_id"]], np.float32)
        assert len(own) == len(distinct)
        probability = 1 / (1 + np.exp(own[:, 0] - own[:, 1]))
        classified += [(p > 0.5) == d["correctness"] for p, d in zip(probability, distinct, strict=True)]
        choice = rerank_choice(distinct, probability)
        reranked.append(choice is not None and distinct[choice]["correctness"])
        voted.append(voted_correct(question["predictions"]))
        bound.append(upper_bound(question["predictions"]))

    assert [row["completion"] for row in golden["rows"]] == [
        p["completion"] for question in golden["samples"] for p in deduplicate(question["predictions"])
    ]
    ours = {"vote_acc": voted, "rerank_acc": reranked, "upper_bound": bound, "cls_acc": classified}
    assert {name: sum(flags) / len(flags) for name, flags in ours.items()} == golden["expected"]
    assert sum(voted) / len(voted) == golden["voting_accuracy"]
