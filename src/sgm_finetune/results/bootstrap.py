"""The 95 % intervals of a test's metrics, from its predictions.

A share of examples has Wilson's interval. Any other metric has the percentile interval of the bootstrap: it is computed
again for `NUM_RESAMPLES` test sets, each drawn from the examples with replacement. Every metric here is a function of
sums over examples, so an example is a row of numbers, and a resample only weighs the rows anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array, hstack

from sgm_finetune.results.intervals import wilson

NUM_RESAMPLES = 1000
_AT_ONCE = 20
"""Resamples that are in memory together."""

Intervals = dict[str, list[float]]
"""Name of a metric -> [low, high]: lists, as JSON reads them back."""
Statistics = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Sums over examples (resamples x columns) -> name of a metric -> its value in each resample."""
Compare = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The values of a metric before and after -> its change."""


@dataclass(frozen=True)
class Sums:
    """Examples as rows of numbers, and the metrics as functions of the sums of rows."""

    rows: np.ndarray | csr_array
    """Examples x columns."""
    statistics: Statistics
    shares: tuple[str, ...] = ()
    """Metrics that are a share of the examples, each of which has Wilson's interval."""

    @property
    def number(self) -> int:
        """The number of examples."""
        return _shape(self.rows)[0]

    def values(self) -> dict[str, float]:
        """The metrics on all examples."""
        whole = np.ones((1, self.number)) @ self.rows
        return {name: float(values[0]) for name, values in self.statistics(whole).items()}

    def intervals(self) -> Intervals:
        """The interval of each metric."""
        if not self.shares:
            return bootstrap(self.rows, self.statistics)
        values = self.values()
        shares = {name: list(wilson(values[name], self.number)) for name in self.shares}
        return shares | {
            name: ends for name, ends in bootstrap(self.rows, self.statistics).items() if name not in shares
        }


def mean(outcomes: Sequence[float]) -> Sums:
    """The mean outcome of the examples, or the share of those that are true: the metric "mean"."""
    rows = np.stack([np.ones(len(outcomes)), np.asarray(outcomes, dtype=float)], axis=1)
    return Sums(rows, lambda sums: {"mean": sums[:, 1] / sums[:, 0]})


def changes(before: Sums, after: Sums, compare: Compare = lambda old, new: new - old) -> Intervals:
    """The interval of each metric's change. Both have the same examples in the same order, so a resample draws an
    example with what it was before and after: what is hard for both moves the change little."""
    width, pair = _shape(before.rows)[1], (before.rows, after.rows)
    rows = csr_array(hstack(pair)) if isinstance(before.rows, csr_array) else np.hstack(pair)  # type: ignore[call-overload]

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        old, new = before.statistics(sums[:, :width]), after.statistics(sums[:, width:])
        return {name: compare(old[name], new[name]) for name in new}

    return bootstrap(rows, statistics)


def bootstrap(rows: np.ndarray | csr_array, statistics: Statistics, seed: int = 0) -> Intervals:
    """Returns the interval of each of the `statistics` of the sums of `rows` (examples x columns)."""
    generator, number = np.random.default_rng(seed), _shape(rows)[0]
    found: dict[str, list[np.ndarray]] = {}
    for _ in range(NUM_RESAMPLES // _AT_ONCE):
        drawn = [np.bincount(generator.integers(0, number, number), minlength=number) for _ in range(_AT_ONCE)]
        for name, values in statistics(np.stack(drawn) @ rows).items():
            found.setdefault(name, []).append(values)
    return {name: np.quantile(np.concatenate(values), (0.025, 0.975)).tolist() for name, values in found.items()}


def _shape(rows: np.ndarray | csr_array) -> tuple[int, int]:
    """(examples, columns)."""
    shape: Any = rows.shape
    return shape


def class_sums(truth: Sequence[int], predicted: Sequence[int], num_labels: int) -> Sums:
    """Accuracy and macro-F1 where an example has one class."""
    counts = _class_counts(np.asarray(truth), np.asarray(predicted), np.arange(len(truth)), num_labels)

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        hits, _, right = np.split(sums, 3, axis=1)
        return {"accuracy": _ratio(hits.sum(1), right.sum(1)), "macro_f1": _f1(sums).mean(1)}

    return Sums(counts, statistics, ("accuracy",))


def set_sums(truth: Sequence[Sequence[float]], predicted: Sequence[Sequence[int]]) -> Sums:
    """Accuracy, micro- and macro-F1 where an example has a set of classes."""
    right, named = np.asarray(truth, dtype=int), np.asarray(predicted, dtype=int)
    whole = np.stack([np.ones(len(right), dtype=int), (right == named).all(1)], axis=1)

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        number, equal, counts = sums[:, 0], sums[:, 1], sums[:, 2:]
        return {"accuracy": _ratio(equal, number), "micro_f1": _micro_f1(counts), "macro_f1": _f1(counts).mean(1)}

    return Sums(np.concatenate([whole, right * named, named, right], axis=1), statistics, ("accuracy",))


def number_sums(truth: Sequence[float], predicted: Sequence[float]) -> Sums:
    """R², mean absolute error and Pearson's correlation; none of a single number."""
    right, named = np.asarray(truth, dtype=float), np.asarray(predicted, dtype=float)
    right, named = right - right.mean(), named - right.mean()  # centred, so that squares do not cancel
    errors = named - right
    ones = np.ones_like(right)
    rows = np.stack([ones, abs(errors), errors**2, right, right**2, named, named**2, right * named], axis=1)

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        number, absolute, squared, one, one_squared, other, other_squared, product = sums.T
        spread, other_spread = one_squared - one**2 / number, other_squared - other**2 / number
        covered = product - one * other / number
        return {
            "r2": 1 - _ratio(squared, spread),
            "mae": absolute / number,
            "pearson": _ratio(covered, np.sqrt(np.maximum(spread * other_spread, 0.0))),
        }

    return Sums(rows, statistics if len(right) > 1 else lambda sums: {})


def tag_sums(truth: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]], names: Sequence[str]) -> Sums:
    """Accuracy, macro-F1 and, for B-, I- and O tags, entity F1.

    An example is a sentence, because the words of a sentence are not independent.
    """
    owners = np.repeat(np.arange(len(truth)), [len(row) for row in truth])
    flat_truth, flat_predicted = (np.array([tag for row in rows for tag in row], int) for rows in (truth, predicted))
    counts, size = _class_counts(flat_truth, flat_predicted, owners, len(names), len(truth)), 3 * len(names)
    with_entities = any(name.startswith("B-") for name in names)
    if with_entities:
        entities = np.array([_entity_counts(*rows, names) for rows in zip(truth, predicted, strict=True)])
    else:
        entities = np.zeros((len(truth), 3))

    def statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
        classes, of_entities = sums[:, :size], sums[:, size:]
        hits, _, words = np.split(classes, 3, axis=1)
        found = {"accuracy": _ratio(hits.sum(1), words.sum(1)), "macro_f1": _f1(classes).mean(1)}
        return {**found, "entity_f1": _micro_f1(of_entities)} if with_entities else found

    return Sums(np.concatenate([counts.toarray(), entities], axis=1), statistics)


def _class_counts(
    truth: np.ndarray, predicted: np.ndarray, owners: np.ndarray, num_labels: int, num_rows: int | None = None
) -> csr_array:
    """Returns for each example (hits | predicted | true), each a column for each class; `owners` are the examples."""
    hit = truth == predicted
    columns = np.concatenate([truth[hit], num_labels + predicted, 2 * num_labels + truth])
    rows = np.concatenate([owners[hit], owners, owners])
    shape = (num_rows or len(owners), 3 * num_labels)
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _entity_counts(truth: Sequence[int], predicted: Sequence[int], names: Sequence[str]) -> tuple[int, int, int]:
    """Returns the numbers of entities of a sentence: found rightly, found, true."""
    from seqeval.metrics.sequence_labeling import get_entities

    right, found = (set(get_entities([names[tag] for tag in tags])) for tags in (truth, predicted))
    return len(right & found), len(found), len(right)


def _f1(sums: np.ndarray) -> np.ndarray:
    """Returns the F1 of each class, 0 for one that is neither true nor predicted."""
    hits, named, right = np.split(sums, 3, axis=1)
    return _ratio(2 * hits, named + right)


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    hits, named, right = (part.sum(1) for part in np.split(sums, 3, axis=1))
    return _ratio(2 * hits, named + right)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns above / below, 0 where `below` is 0."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)
