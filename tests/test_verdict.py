"""A run that ended no better than it began is told so, with its own numbers; intervals are those of SciPy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from sgm_finetune.results.intervals import interval_of, wilson
from sgm_finetune.results.verdict import shortfall


def accuracies(before: float, after: float, number: int = 200, **more) -> dict:
    tested = {"loss": 0.7, "num_examples": number, "majority_accuracy": 0.5}
    return {
        "before": {**tested, "accuracy": before}, "after": {**tested, "accuracy": after}, "steps": 7,
        "num_train": 200, "learning_rate": 0.0125, **more,
    }  # fmt: skip


@given(st.integers(1, 10**6).flatmap(lambda number: st.tuples(st.integers(0, number), st.just(number))))
def test_the_interval_of_a_share_is_that_of_scipy(right_of):
    right, number = right_of
    expected = binomtest(right, number).proportion_ci(method="wilson")
    assert wilson(right / number, number) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_a_stored_interval_comes_before_a_computed_one():
    assert interval_of({"accuracy": 0.5, "num_examples": 100, "intervals": {"accuracy": [0.4, 0.7]}}, "accuracy") == (
        0.4, 0.7,
    )  # fmt: skip
    assert interval_of({"accuracy": 0.5, "num_examples": 100, "num_words": 10**6}, "accuracy") == pytest.approx(
        (0.499, 0.501), abs=1e-4
    )
    assert interval_of({"r2": 0.5, "num_examples": 100}, "r2") is None


def test_a_worse_run_is_told_its_numbers():
    found = shortfall(accuracies(0.570, 0.520))
    assert found is not None
    assert found.line == (
        "This run ended no better than it began: accuracy 0.570 → 0.520 (95 % interval 0.451 to 0.588 on 200 test "
        "examples); always naming the most frequent class reaches 0.500."
    )
    assert found.advice[0] == (
        "Train for longer or on more data: this run took 7 steps on 200 training examples (training.epochs, "
        "data.num_train)."
    )
    assert "training.learning_rate=0.038 and 0.0042" in found.advice[1]
    assert "`sgm data`" in found.advice[2]


def test_a_gain_that_chance_can_cause_is_no_gain():
    assert shortfall(accuracies(0.50, 0.53)) is not None
    assert shortfall(accuracies(0.50, 0.53, number=20_000)) is None
    assert shortfall(accuracies(0.488, 0.828, number=1000)) is None


def test_a_clear_loss_is_no_gain_either():
    found = shortfall(accuracies(0.9, 0.5))
    assert found is not None
    assert not any("Test on more" in line for line in found.advice)


@pytest.mark.parametrize(
    ("before", "after", "better"),
    [
        ({"perplexity": 30.0, "exact_match": 0.5}, {"perplexity": 20.0, "exact_match": 0.4}, True),
        ({"perplexity": 20.0}, {"perplexity": 20.0}, False),
        ({"entity_f1": 0.0, "accuracy": 0.9}, {"entity_f1": 0.8, "accuracy": 0.9}, True),
        ({"r2": 0.5}, {"r2": 0.4}, False),
        ({"loss": 1.0}, {"loss": 0.9}, True),
        ({}, {}, True),
    ],
)
def test_each_task_is_judged_by_its_own_metric(before, after, better):
    tested = {"num_examples": 50}
    found = shortfall({"before": tested | before, "after": tested | after, "steps": 1})
    assert (found is None) == better


def test_an_older_run_without_counts_gets_advice_too():
    metrics = {"before": {"loss": 1.0}, "after": {"loss": 2.0}, "steps": 7}
    found = shortfall(metrics)
    assert found is not None
    assert found.advice[0].startswith("Train for longer or on more data: this run took 7 steps (")
