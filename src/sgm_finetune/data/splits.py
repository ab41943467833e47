"""Splits rows into training, validation and test data without a text in common, from one seed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from sgm_finetune.base.config import DataConfig, LabelKind, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.conversations import has_reasoning, spoken
from sgm_finetune.data.rows import Origin, Rows, check_head, normalise, num_rows, take
from sgm_finetune.data.sources import Source, Split, check_settings, open_files, open_source
from sgm_finetune.data.tables import type_of
from sgm_finetune.data.text_file import packing_of

if TYPE_CHECKING:
    import datasets

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class DataSplits:
    """Three disjoint data sets.

    Columns by layout: labelled: text, label and perhaps text_pair; tagged: tokens, tags; pairs: source, target;
    completion: prompt, completion; chat, ShareGPT and Alpaca: messages; text: text. Preferences have the chosen answer
    as completion or as the end of messages, and beside it `rejected` in the same form, or a `label`: 1 for a good one.
    """

    train: datasets.Dataset
    """In a seeded order. Every beginning of it is stratified by label, so the first batches represent the whole."""
    validation: datasets.Dataset
    """In the order of the source."""
    test: datasets.Dataset
    """In the order of the source."""
    labels: tuple[str, ...]
    """Class or tag names in id order; () without classes."""
    description: str
    """One line: source, sizes, dropped duplicates, labels or format."""
    label_kind: LabelKind | None = None
    """Kind of label in sequence classification: an id (class), a vector of 0 and 1 (classes) or a number."""
    origins: dict[Split, list[Origin]] = field(default_factory=dict)
    """The table of each row, and its number there, for messages."""
    unread: tuple[str, ...] = ()
    """Columns that nothing reads."""

    @property
    def roles(self) -> tuple[str, ...]:
        """What a model is trained on: the columns, and `reasoning` where an answer has some."""
        reasons = "messages" in self.train.column_names and any(map(has_reasoning, self.train["messages"][:]))
        return (*self.train.column_names, *(("reasoning",) if reasons else ()))


def load_splits(config: DataConfig, task: Task) -> DataSplits:
    """The data that `config` names: checked, without duplicates, and split.

    Validation and test data that the source lacks come from the training data, stratified by label. The test split
    depends only on the source, `seed`, `test_fraction` and `num_test`. A smaller `num_*` selects a subset of the
    examples that a larger one selects. Raises UserError for data that cannot be read, learnt from or split.
    """
    return split_source(open_source(config), config, task)


def split_source(source: Source, config: DataConfig, task: Task) -> DataSplits:
    """As `load_splits`, for an open source."""
    from sgm_finetune.data.arrow import dataset_of  # here: it takes seconds to load

    chosen = choose_rows(source, config, task)
    origins: dict[Split, list[Origin]] = {split: chosen.rows[split].pop("row") for split in SPLITS}
    train, validation, test = (dataset_of(chosen.rows[split]) for split in SPLITS)
    return DataSplits(
        train, validation, test, chosen.labels, chosen.description, chosen.label_kind, origins, chosen.unread
    )


def with_classes(splits: DataSplits, names: Sequence[str], rows: Sequence[int]) -> DataSplits:
    """`splits` with the classes `names`; `rows` is the new id of each class of the data."""
    if tuple(rows) == tuple(range(len(names))):
        return replace(splits, labels=tuple(names))
    from sgm_finetune.data.arrow import with_column

    role = "tags" if "tags" in splits.train.column_names else "label"

    def changed(value: Any) -> Any:
        if role == "tags":
            return [rows[tag] for tag in value]
        if splits.label_kind == "class":
            return rows[value]
        vector = [0.0] * len(names)
        for row, here in zip(rows, value, strict=True):
            vector[row] = here
        return vector

    parts = {
        name: with_column(part, role, [changed(value) for value in part[role][:]])
        for name in SPLITS
        for part in [getattr(splits, name)]
    }
    return replace(splits, labels=tuple(names), **parts)


@dataclass(frozen=True)
class ChosenRows:
    """The rows of three disjoint splits, and what `DataSplits` says about them."""

    rows: dict[Split, Rows]
    labels: tuple[str, ...]
    description: str
    label_kind: LabelKind | None
    unread: tuple[str, ...]


def choose_rows(source: Source, config: DataConfig, task: Task) -> ChosenRows:
    """The rows of each split: checked, without duplicates, chosen and ordered. Raises UserError as `load_splits`."""
    found = normalise(source, config, task)
    labels, kind = found.labels, found.label_kind
    rows, dropped = drop_duplicates(found.rows)
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
    read = dict.fromkeys(table.note for table in source.tables.values() if table.note)
    facts = [*sizes, *_facts(chosen, labels, kind), *dropped, *read, *found.notes]
    description = f"{source.name}: {', '.join(facts)}"
    return ChosenRows(chosen, labels, description, kind, tuple(found.unread))


WHOLE_BYTES = 2 * 2**20
"""Files of more bytes in total are checked by their first rows only, before the libraries are loaded."""
HEAD_ROWS = 200


def check_data(config: DataConfig, task: Task) -> None:
    """Raises the UserError of `load_splits` as far as it can be known without loading the library `datasets`.

    Text files are read: whole if they are small, else their first rows. Folders, the hub, streams and Parquet files
    are not, and embedded data are what their names say.
    """
    files = check_settings(config)
    paths = [Path(name) for name in files.values()]
    if config.name is not None or config.streaming:
        return
    if any(type_of(path, "data.train", config.file_type) == "parquet" for path in paths):
        return
    if sum(_unpacked_size(path) for path in paths) <= WHOLE_BYTES:
        choose_rows(open_files(config, files), config, task)
    else:
        check_head(open_files(config, files, HEAD_ROWS), config, task)


def _unpacked_size(path: Path) -> int:
    """Bytes of a file; a guess where it is packed."""
    return path.stat().st_size * (1 if packing_of(path) is None else 10)


def drop_duplicates(rows: dict[Split, Rows]) -> tuple[dict[Split, Rows], list[str]]:
    """`rows` without repeated training texts and without overlap between splits, and notes about what was dropped.

    Two texts are equal when they differ only in case and white space. Training data loses texts that validation or test
    data contains; validation data loses texts that test data contains. Repeats within a given validation or test file
    stay, because its owner chose them.
    """
    held_out: set[bytes] = set()
    kept: dict[Split, Rows] = {}
    num_repeated = num_shared = num_contradicting = 0
    for split in ("test", "validation"):
        if split in rows:
            keys = list(_keys(rows[split]))
            keep = [index for index, key in enumerate(keys) if key not in held_out]
            num_shared += len(keys) - len(keep)
            kept[split] = take(rows[split], keep)
            held_out.update(keys)
    first: dict[bytes, int] = {}
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
    """A random order of the rows in which every stretch contains each class in proportion, to within one row.

    The i-th of the n rows of a class has the relative position (i + 1/2) / n.

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
    """`rows` with validation and test data. Each is a stretch of one seeded order, so both are stratified.

    Raises UserError when a split is empty.
    """
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
        return f"All rows of {source.tables['train'].name} are also in the held-out data; give other training data"
    if split == "validation" and "validation" in source.tables:
        return f"All rows of {source.tables['validation'].name} are also in the test data; leave data.validation out"
    return (
        f"{source.name} has {total} example(s) once duplicates are dropped, too few to split: "
        f"none is left for {split}; give more data, or data.validation and data.test"
    )


def _keys(rows: Rows) -> Iterator[bytes]:
    """A key for each row: the hash of all its texts, without differences in case and white space."""
    for parts in zip(*(values for role, values in rows.items() if role not in ("label", "tags", "row")), strict=True):
        text = "\0".join(" ".join(_text(value).casefold().split()) for value in parts)
        yield xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _text(value: str | list | None) -> str:
    if isinstance(value, str):
        return value
    if value and isinstance(value[0], dict) and "role" in value[0]:
        value = spoken(value)
    return json.dumps(value, ensure_ascii=False)


def _order(rows: Rows, seed: int, purpose: int) -> np.ndarray:
    """A seeded order of the rows, stratified by class; each `purpose` has an order of its own."""
    labels = rows.get("label") or [0] * num_rows(rows)
    if labels and not isinstance(labels[0], int):  # sets of classes and numbers are not stratified
        labels = [0] * len(labels)
    return stratified_order(labels, np.random.default_rng([seed, purpose]))


def _facts(rows: dict[Split, Rows], labels: tuple[str, ...], kind: LabelKind | None) -> list[str]:
    """Facts about the labels, for the description."""
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
