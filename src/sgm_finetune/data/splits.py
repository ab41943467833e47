"""Normalised rows -> train, validation and test without a text in common, by one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np

from sgm_finetune.config import DataConfig, Task
from sgm_finetune.data import columns
from sgm_finetune.data.sources import Source, Split, open_source
from sgm_finetune.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Rows = dict[str, list]  # column -> values: text, label | text | prompt, completion


@dataclass(frozen=True)
class DataSplits:
    """Three disjoint data sets with the columns text, label | text | prompt, completion."""

    train: datasets.Dataset
    """In a seeded order of which every beginning is stratified, so the first batches represent all."""
    validation: datasets.Dataset
    """In the order of the source."""
    test: datasets.Dataset
    """In the order of the source."""
    labels: tuple[str, ...]
    """Class names in id order; () for language modelling."""
    description: str
    """One line: where from, sizes, duplicates dropped, for classification the majority's share."""


def load_splits(config: DataConfig, task: Task) -> DataSplits:
    """The data that `config` names, checked, without duplicates, and split.

    Validation and test data that the source does not bring are split off the training data, stratified by label.
    The test split depends on the source, `seed`, `test_fraction` and `num_test` only; a smaller `num_*` chooses a
    subset of what a larger one chooses.
    """
    return split_source(open_source(config), config, task)


def split_source(source: Source, config: DataConfig, task: Task) -> DataSplits:
    """`load_splits` of a source that is already open."""
    rows, labels, notes = _normalise(source, config, task)
    rows, dropped = drop_duplicates(rows)
    rows = _split_off(source, rows, config)
    for index, label in enumerate(labels):
        here = sum(split["label"].count(index) for split in rows.values())
        if here and index not in rows["train"]["label"]:
            raise UserError(
                f"{source.name}: label {label!r} has {here} example(s), none of them for training; "
                "add some, remove the label, or lower data.test_fraction and data.validation_fraction"
            )
    sizes, chosen = [], {}
    for number, split in enumerate(SPLITS, start=1):
        wanted = getattr(config, f"num_{split}")
        total = _num_rows(rows[split])
        order = _order(rows[split], config.seed, number)[:wanted]
        chosen[split] = _take(rows[split], order if split == "train" else np.sort(order))
        sizes.append(f"{len(order):,} {split}" if len(order) == total else f"{len(order):,} of {total:,} {split}")
    facts = [*sizes]
    if labels:
        facts += [f"{len(labels)} classes", f"majority {_majority_share(chosen):.2f}"]
    description = f"{source.name}: {', '.join([*facts, *dropped, *notes])}"
    return DataSplits(*(_dataset(chosen[split]) for split in SPLITS), labels=labels, description=description)


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
            kept[split] = _take(rows[split], keep)
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
    kept["train"] = _take(rows["train"], list(first.values()))
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


def _normalise(source: Source, config: DataConfig, task: Task) -> tuple[dict[Split, Rows], tuple[str, ...], list[str]]:
    """Rows of each split that the source has, the class names, and notes for the description."""
    train = source.tables["train"]
    roles = columns.choose_roles(train, config.columns, task)
    rows: dict[Split, Rows] = {}
    names: tuple[str, ...] = ()
    notes: list[str] = []
    num_empty = 0
    for split, table in source.tables.items():  # train first: it defines the classes
        column = columns.find_columns(table, roles, config.columns)
        if "label" in column and split != "train" and columns.is_unlabelled(table, column["label"]):
            notes.append(f"{table.name} has no labels and is not used")
            continue
        texts: Rows = {
            role: columns.read_texts(table, column[role], may_be_empty=task == "causal-lm" and role != "completion")
            for role in roles
            if role != "label"
        }
        if "label" in column:
            labels = columns.read_labels(table, column["label"])
            names = names or columns.class_names(table, column["label"], labels)
            texts["label"] = columns.label_ids(table, split, labels, names)
        if roles == ("text",):
            filled = [index for index, text in enumerate(texts["text"]) if text.strip()]
            num_empty += _num_rows(texts) - len(filled)
            texts = _take(texts, filled)
        if not _num_rows(texts):
            raise UserError(f"{table.name} ({split}) has no text in it")
        rows[split] = texts
    if num_empty:
        notes.append(f"{num_empty:,} empty texts dropped")
    return rows, names, notes


def _split_off(source: Source, rows: dict[Split, Rows], config: DataConfig) -> dict[Split, Rows]:
    """`rows` with validation and test; each is a stretch of one seeded order, so both are stratified."""
    total = _num_rows(rows["train"])
    order = _order(rows["train"], config.seed, 0)
    rows = dict(rows)
    train = rows["train"]
    fractions: dict[Split, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    for split, fraction in fractions.items():
        if split not in rows:
            size = max(1, int(fraction * total))
            rows[split], order = _take(train, np.sort(order[:size])), order[size:]
    rows["train"] = _take(train, np.sort(order))
    for split in SPLITS:
        if not _num_rows(rows[split]):
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
    texts = zip(*(values for role, values in rows.items() if role != "label"), strict=True)
    return ["\0".join(" ".join(text.casefold().split()) for text in parts) for parts in texts]


def _order(rows: Rows, seed: int, purpose: int) -> np.ndarray:
    labels = rows.get("label") or [0] * _num_rows(rows)
    return stratified_order(labels, np.random.default_rng([seed, purpose]))


def _take(rows: Rows, indices: Sequence[int] | np.ndarray) -> Rows:
    return {role: [values[index] for index in indices] for role, values in rows.items()}


def _num_rows(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _majority_share(rows: dict[Split, Rows]) -> float:
    """Test accuracy of always answering the most frequent class of the training data."""
    majority = np.bincount(rows["train"]["label"]).argmax()
    return float(np.mean(np.asarray(rows["test"]["label"]) == majority))


def _dataset(rows: Rows) -> datasets.Dataset:
    features = datasets.Features({role: datasets.Value("int64" if role == "label" else "string") for role in rows})
    return datasets.Dataset.from_dict(rows, features=features)
