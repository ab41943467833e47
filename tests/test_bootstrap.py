"""The intervals of a test's metrics hold the metrics, are those of SciPy's bootstrap, and are the same every time."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import f1_score

from sgm_finetune.results import bootstrap as ours
from sgm_finetune.results.metrics import (
    classification_metrics,
    multilabel_metrics,
    regression_metrics,
    tagging_metrics,
)

TAGS = ("O", "B-PER", "I-PER", "B-LOC")


def drawn(number: int, num_labels: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Returns classes and predictions of which two thirds are right."""
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, num_labels, number)
    wrong = chance.random(number) < 1 / 3
    return truth.tolist(), np.where(wrong, chance.integers(0, num_labels, number), truth).tolist()


def sentences(number: int = 150) -> tuple[list[list[int]], list[list[int]]]:
    truth, predicted = drawn(6 * number, len(TAGS))
    return [truth[at : at + 6] for at in range(0, len(truth), 6)], [
        predicted[at : at + 6] for at in range(0, len(truth), 6)
    ]


def cases() -> dict:
    numbers = np.random.default_rng(0).normal(5, 2, 300)
    noisy = numbers + np.random.default_rng(1).normal(0, 1, 300)
    one, sets = drawn(400, 3), [np.eye(4, dtype=int)[row].tolist() for row in drawn(300, 4)]
    return {
        "class": (classification_metrics(*one, 3), ours.class_sums(*one, 3).intervals()),
        "classes": (multilabel_metrics(*sets), ours.set_sums(*sets).intervals()),
        "number": (
            regression_metrics(numbers.tolist(), noisy.tolist()),
            ours.number_sums(numbers.tolist(), noisy.tolist()).intervals(),
        ),
        "tags": (tagging_metrics(*sentences(), TAGS), ours.tag_sums(*sentences(), TAGS).intervals()),
    }


@pytest.mark.parametrize("kind", ["class", "classes", "number", "tags"])
def test_an_interval_is_around_its_metric(kind):
    metrics, intervals = cases()[kind]
    for name, (low, high) in intervals.items():
        assert low < metrics[name] < high
        assert high - low < 0.4
    assert cases()[kind][1] == intervals


@pytest.mark.parametrize("kind", ["class", "classes", "number", "tags"])
def test_without_resampling_the_statistics_are_the_metrics(kind, monkeypatch):
    monkeypatch.setattr(ours, "bootstrap", lambda rows, statistics: {
        name: [float(values[0])] * 2 for name, values in statistics(np.ones((1, rows.shape[0])) @ rows).items()
    })  # fmt: skip
    monkeypatch.setattr(ours, "wilson", lambda share, number: (share, share))
    metrics, intervals = cases()[kind]
    assert len(intervals) > 1
    for name, (low, _) in intervals.items():
        assert low == pytest.approx(metrics[name], abs=1e-9)


def test_macro_f1_has_the_interval_of_scipys_bootstrap():
    truth, predicted = drawn(300, 3)
    expected = scipy_bootstrap(
        (np.array(truth), np.array(predicted)),
        lambda one, other: f1_score(one, other, average="macro"),
        paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    assert ours.class_sums(truth, predicted, 3).intervals()["macro_f1"] == pytest.approx(expected, abs=0.01)


def test_a_test_of_one_example_or_one_class_has_intervals_too():
    assert ours.class_sums([0], [0], 2).intervals()["macro_f1"] == [0.5, 0.5]
    assert ours.number_sums([1.0], [1.0]).intervals() == {}
    assert ours.number_sums([1.0, 1.0], [1.0, 2.0]).intervals()["pearson"] == [0.0, 0.0]
    assert ours.tag_sums([[0]], [[0]], ("O", "X")).intervals()["accuracy"] == [1.0, 1.0]
