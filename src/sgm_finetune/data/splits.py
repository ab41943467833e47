"""Normalised rows -> train, validation and test without a text in common, by one seed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from sgm_finetune.base.config import DataConfig, LabelKind, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.rows import Rows, normalise, num_rows, take
from sgm_finetune.data.sources import Source, Split, open_source

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSplits:
    """Three disjoint data sets. Columns, by layout: labelled: text, label (and text_pair); tagged: tokens, tags; pairs:
    source, target; completion: prompt, completion; chat: messages (ShareGPT's and Alpaca's rows too); text: text."""

    train: datasets.Dataset
    """In a seeded order of which every beginning is stratified, so the first batches represent all."""
    validation: datasets.Dataset
    """In the order of the source."""
    test: datasets.Dataset
    """In the order of the source."""
    labels: tuple[str, ...]
    """Class or tag names in id order; () where there are none."""
    description: str
    """One line: where from, sizes, duplicates dropped, what the labels are, or the format."""
    label_kind: LabelKind | None = None
    """What the labels of sequence classification are: an id, a vector of 0 and 1, or a number."""


def load_splits(config: DataConfig, task: Task) -> DataSplits:
    """The data that `config` names, checked, without duplicates, and split.

    Validation and test data that the source does not bring are split off the training data, stratified by label.
    The test split depends on the source, `seed`, `test_fraction` and `num_test` only; a smaller `num_*` chooses a
    subset of what a larger one chooses.
    """
    return split_source(open_source(config), config, task)


def split_source(source: Source, config: DataConfig, task: Task) -> DataSplits:
    """`load_splits` of a source that is already open."""
    rows, labels, kind, notes = normalise(source, config, task)
    rows, dropped = drop_duplicates(rows)
    rows = _split_off(source, rows, config)
    for index, label in enumerate(labels if kind == "class" else ()):
        here = sum(split["label"].count(index) for split in rows.values())
        if here and index not in rows["train"]["label"]:
            raise UserError(
                f"{source.name}: label {label!r} has {here} example(s), none of them for training; "
                "add some, remove the label, or lower data.test_fraction and data.validation_fraction"
            )
    sizes, chosen = [], {}
    for number, split in enumerate(SPLITS, start=1):
        wanted = getattr(config, f"num_{split}")
        total = num_rows(rows[split])
        order = _order(rows[split], config.seed, number)[:wanted]
        chosen[split] = take(rows[split], order if split == "train" else np.sort(order))
        sizes.append(f"{len(order):,} {split}" if len(order) == total else f"{len(order):,} of {total:,} {split}")
    facts = [*sizes, *_facts(chosen, labels, kind), *dropped, *notes]
    description = f"{source.name}: {', '.join(facts)}"
    train, validation, test = (_dataset(chosen[split]) for split in SPLITS)
    return DataSplits(train, validation, test, labels, description, kind)


def drop_duplicates(rows: dict[Split, Rows]) -> tuple[dict[Split, Rows], list[str]]:
    """`rows` without training texts that repeat, or that validation or test hold; and what was dropped, in words.

    Two texts are one when they agree up to case and white space. Test data is never touched, validation data loses
    only what test holds: repeats within a given evaluation file are its owner's choice.
    """
    held_out: set[str] = set()
    kept: dict[Split, Rows] = {}
    num_repeated = num_shared = num_contradicting = 0
    for split in ("test", "validation"):
        if split in rows:
            keys = _keys(rows[split])
            keep = [index for index, key in enumerate(keys) if key not in held_out]
            num_shared += len(keys) - len(keep)
            kept[split] = take(rows[split], keep)
            held_out.update(keys)
    first: dict[str, int] = {}
    for index, key in enumerate(_keys(rows["train"])):
        if key in held_out:
            num_shared += 1
        elif key in first:
            num_repeated += 1
            labels = rows["train"].get("label")
            num_contradicting += labels is not None and labels[index] != labels[first[key]]
        else:
            first[key] = index
    kept["train"] = take(rows["train"], list(first.values()))
    words = [f"{num_repeated:,} duplicates dropped" if num_repeated else "no duplicates"]
    if num_contradicting:
        words[0] += f" ({num_contradicting:,} with another label)"
    if num_shared:
        words.append(f"{num_shared:,} texts that held-out data repeats dropped")
    return kept, words


def stratified_order(labels: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """A random order of the rows in which every stretch holds each class in its share, to within one row.

    The i-th of a class's n rows stands at (i + 1/2) / n of the way.

    >>> order = stratified_order([0, 0, 0, 0, 1, 1], np.random.default_rng(0))
    >>> sorted(order.tolist()), sorted(np.array([0, 0, 0, 0, 1, 1])[order[:3]].tolist())
    ([0, 1, 2, 3, 4, 5], [0, 0, 1])
    """
    shuffled = generator.permutation(len(labels))
    classes = np.asarray(labels)[shuffled]
    position = np.empty(len(shuffled))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(position, kind="stable")]


def _split_off(source: Source, rows: dict[Split, Rows], config: DataConfig) -> dict[Split, Rows]:
    """`rows` with validation and test; each is a stretch of one seeded order, so both are stratified."""
    total = num_rows(rows["train"])
    order = _order(rows["train"], config.seed, 0)
    rows = dict(rows)
    train = rows["train"]
    fractions: dict[Split, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    for split, fraction in fractions.items():
        if split not in rows:
            size = source.sizes.get(split, max(1, int(fraction * total)))
            rows[split], order = take(train, np.sort(order[:size])), order[size:]
    rows["train"] = take(train, np.sort(order))
    for split in SPLITS:
        if not num_rows(rows[split]):
            raise UserError(_why_empty(source, split, total))
    return rows


def _why_empty(source: Source, split: Split, total: int) -> str:
    if not total:
        return (
            f"All rows of {source.tables['train'].name} stand in the held-out data too; give training data of its own"
        )
    if split == "validation" and "validation" in source.tables:
        return f"All rows of {source.tables['validation'].name} stand in the test data too; leave data.validation out"
    return (
        f"{source.name} has {total} example(s) once duplicates are dropped, too few to split: "
        f"none is left for {split}; give more data, or data.validation and data.test"
    )


def _keys(rows: Rows) -> list[str]:
    """What makes two rows the same: all their texts, up to case and white space."""
    texts = zip(*(values for role, values in rows.items() if role not in ("label", "tags")), strict=True)
    return ["\0".join(" ".join(_text(value).casefold().split()) for value in parts) for parts in texts]


def _text(value: str | list) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _order(rows: Rows, seed: int, purpose: int) -> np.ndarray:
    labels = rows.get("label") or [0] * num_rows(rows)
    if labels and not isinstance(labels[0], int):  # sets of classes, numbers: in any order
        labels = [0] * len(labels)
    return stratified_order(labels, np.random.default_rng([seed, purpose]))


def _facts(rows: dict[Split, Rows], labels: tuple[str, ...], kind: LabelKind | None) -> list[str]:
    """What there is to predict, in words."""
    match kind:
        case "class":
            majority = np.bincount(rows["train"]["label"]).argmax()
            share = float(np.mean(np.asarray(rows["test"]["label"]) == majority))
            return [f"{len(labels)} classes", f"majority {share:.2f}"]
        case "classes":
            vectors = np.asarray(rows["train"]["label"])
            return [f"{len(labels)} classes", f"{vectors.sum(1).mean():.2f} a row on average"]
        case "number":
            numbers = np.asarray(rows["train"]["label"])
            return [f"numbers {numbers.min():g} to {numbers.max():g}, standard deviation {numbers.std():.3g}"]
    if labels:
        counts = Counter(itertools.chain(*rows["train"]["tags"]))
        (most, count), *_ = counts.most_common(1)
        return [f"{len(labels)} tags", f"{labels[most]} {count / counts.total():.2f} of the words"]
    return []


_FEATURES = {
    "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
    "tokens": datasets.List(datasets.Value("string")),
    "tags": datasets.List(datasets.Value("int64")),
}


def _dataset(rows: Rows) -> datasets.Dataset:
    features = datasets.Features({role: _FEATURES.get(role) or _feature(role, values) for role, values in rows.items()})
    return datasets.Dataset.from_dict(rows, features=features)


def _feature(role: str, values: list) -> datasets.Value | datasets.List:
    if role != "label":
        return datasets.Value("string")
    match values[0]:
        case int():
            return datasets.Value("int64")
        case float():
            return datasets.Value("float32")
    return datasets.List(datasets.Value("float32"))
