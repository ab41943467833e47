"""Mixtures: how many examples of each source an epoch has, and which ones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from sgm_finetune.base.config import SourceConfig
from sgm_finetune.base.errors import UserError

SOURCE = "source_index"
"""Column of a mixture: the index of the source of each example."""


def divide(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, rounded by largest remainder (Hamilton's method).

    Of equal remainders the first one counts.

    >>> divide([0.7, 0.2, 0.1], 32), divide([1, 1, 1], 100), divide([1, 0], 3)
    ([23, 6, 3], [34, 33, 33], [3, 0])
    """
    exact = np.asarray(weights, dtype=np.float64)
    exact = exact / exact.sum() * total
    whole = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - whole), kind="stable")[: total - int(whole.sum())]
    whole[largest] += 1
    return whole.tolist()


@dataclass(frozen=True)
class Draw:
    """Chooses the training examples of each epoch, so that every source has its share of them.

    Epoch after epoch, a source goes on round a seeded permutation of its examples. So all of its examples come equally
    often, up to one, in an epoch and in all of them; and what one epoch leaves out comes in the next ones.
    """

    sources: Sequence[int]
    """The source of each example."""
    weights: Sequence[float]
    """The weight of each source. A source without examples has no share."""
    seed: int

    def quotas(self, total: int) -> list[int]:
        """The number of examples of each source among `total`."""
        sizes = np.bincount(self.sources, minlength=len(self.weights))
        return divide(np.where(sizes > 0, self.weights, 0.0).tolist(), total)

    def indices(self, epoch: int, total: int) -> list[int]:
        """The `total` examples of an epoch, source after source.

        >>> draw = Draw([0, 0, 0, 1], [1, 1], seed=0)
        >>> [sorted(draw.indices(epoch, 4)) for epoch in range(3)]
        [[0, 2, 3, 3], [1, 2, 3, 3], [0, 1, 3, 3]]
        """
        of = np.asarray(self.sources)
        chosen: list[int] = []
        for source, quota in enumerate(self.quotas(total)):
            members = np.flatnonzero(of == source)
            if quota:
                order = np.random.default_rng([self.seed, source]).permutation(members)
                chosen += order[np.arange(epoch * quota, (epoch + 1) * quota) % len(order)].tolist()
        return chosen


@dataclass(frozen=True)
class Share:
    """What a source contributes to the training."""

    name: str
    examples: int
    """Its training examples."""
    per_epoch: int
    """How many of them an epoch has; one that comes twice counts twice."""
    weight: float | None
    part: float
    """Its part of the examples of an epoch."""

    def describe(self) -> str:
        """One line.

        >>> Share("a.jsonl", 100, 250, 0.7, 0.7).describe()
        'a.jsonl: 250 training examples an epoch (70.0 %): its 100 come 2.5 times on average'
        >>> Share("a.jsonl", 100, 75, 0.7, 0.7).describe()
        'a.jsonl: 75 training examples an epoch (70.0 %): 25 of its 100 are left out, other ones in each epoch'
        """
        line = f"{self.name}: {self.per_epoch:,} training examples an epoch ({self.part:.1%})".replace("%)", " %)")
        if self.per_epoch > self.examples:
            return f"{line}: its {self.examples:,} come {self.per_epoch / self.examples:.3g} times on average"
        if self.per_epoch < self.examples:
            left = self.examples - self.per_epoch
            return f"{line}: {left:,} of its {self.examples:,} are left out, other ones in each epoch"
        return f"{line}: each comes once"


def shares(
    names: Sequence[str], sources: Sequence[int], weights: Sequence[float] | None, batch_size: int
) -> list[Share]:
    """What each source contributes to an epoch of whole batches. Raises UserError for a source that gets nothing."""
    sizes = np.bincount(sources, minlength=len(names)).tolist()
    total = whole_batches(len(sources), batch_size)
    quotas = sizes if weights is None else Draw(sources, weights, 0).quotas(total)
    given = weights or [None] * len(names)
    found = [
        Share(name, size, quota, weight, quota / sum(quotas))
        for name, size, quota, weight in zip(names, sizes, quotas, given, strict=True)
    ]
    for number, share in enumerate(found, start=1):
        if not share.per_epoch:
            raise UserError(
                f"data.mixture, entry {number}: {share.name} has none of the {total:,} training examples of an epoch; "
                "raise its weight or data.num_train, or remove the entry"
            )
    return found


def whole_batches(num_examples: int, batch_size: int) -> int:
    """The number of examples in the batches of an epoch, all of which are full."""
    return -(-num_examples // batch_size) * batch_size


def source_names(given: Sequence[str]) -> tuple[str, ...]:
    """The names of sources, made different from each other.

    >>> source_names(["a.csv", "b.csv", "a.csv"])
    ('a.csv', 'b.csv', 'a.csv (entry 3)')
    """
    return tuple(f"{name} (entry {index + 1})" if name in given[:index] else name for index, name in enumerate(given))


def by_source(dataset: Any, indices: Sequence[int]) -> dict[int, list[int]]:
    """The indices of a data set by the source of their example, in order of the sources; all together without a
    mixture."""
    if SOURCE not in dataset.column_names:
        return {0: list(indices)}
    of = dataset[SOURCE][:]
    return {source: [index for index in indices if of[index] == source] for source in sorted(set(of))}


@contextmanager
def in_entry(number: int | None) -> Iterator[None]:
    """Names the entry of the mixture, counted from 1, in a UserError; None: there is no mixture."""
    try:
        yield
    except UserError as error:
        if number is None:
            raise
        text = _KEYS.sub(r"\1", str(error))
        raise UserError(f"data.mixture, entry {number}: {text}") from error


_KEYS = re.compile(rf"\bdata\.({'|'.join(SourceConfig.model_fields)})\b")
"""The keys of an entry, as messages name those of the only source."""
