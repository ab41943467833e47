"""Splits rows into training, validation and test data without a text in common, from one seed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from sgm_finetune.base.config import DataConfig, LabelKind, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import listed
from sgm_finetune.data.conversations import has_reasoning, spoken
from sgm_finetune.data.labels import LabelReader
from sgm_finetune.data.mixture import SOURCE, divide, in_entry, source_names
from sgm_finetune.data.rows import Normalised, Origin, Rows, check_head, normalise, num_rows, take
from sgm_finetune.data.sources import Source, Split, check_settings, numbered, open_files, open_sources
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
    """In a seeded order. Every beginning of it (of a source in it) is stratified by label, so that it represents the
    whole."""
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
    sources: tuple[str, ...] = ()
    """The names of the sources of a mixture, whose rows stand source after source in each split; () without one."""
    counts: dict[Split, list[int]] = field(default_factory=dict)
    """The number of rows of each source in each split."""

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
    return split_sources(open_sources(config), config, task)


def split_source(source: Source, config: DataConfig, task: Task) -> DataSplits:
    """As `load_splits`, for an open source."""
    return split_sources([source], config, task)


def split_sources(sources: Sequence[Source], config: DataConfig, task: Task) -> DataSplits:
    """As `load_splits`, for open sources."""
    from sgm_finetune.data.arrow import dataset_of  # here: it takes seconds to load

    chosen = choose_rows(sources, config, task)
    origins: dict[Split, list[Origin]] = {split: chosen.rows[split].pop("row") for split in SPLITS}
    of: dict[Split, list[int]] = {split: chosen.rows[split].pop(SOURCE) for split in SPLITS}
    train, validation, test = (dataset_of(chosen.rows[split]) for split in SPLITS)
    names = source_names([source.name for source in sources]) if config.mixture is not None else ()
    counts: dict[Split, list[int]] = {
        split: np.bincount(of[split], minlength=len(sources)).tolist() for split in SPLITS
    }
    return DataSplits(
        train, validation, test, chosen.labels, chosen.description, chosen.label_kind, origins, chosen.unread,
        names, counts,
    )  # fmt: skip


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


def choose_rows(sources: Sequence[Source], config: DataConfig, task: Task) -> ChosenRows:
    """The rows of each split: checked, without duplicates, chosen and ordered, source after source. Raises UserError as
    `load_splits`."""
    reader, found = LabelReader(), []
    for (number, one), source in zip(numbered(config), sources, strict=True):
        with in_entry(number):
            found.append(normalise(source, one, task, reader))
    _check_one_form(found, sources)
    labels, kind = found[-1].labels, found[-1].label_kind
    rows, dropped = drop_duplicates(_together([one.rows for one in found]))
    apart = []
    for index, ((number, _), source) in enumerate(zip(numbered(config), sources, strict=True)):
        with in_entry(number):
            given = {split: _of_source(rows[split], index) for split in found[index].rows}
            apart.append(_split_off(source, given, config, is_alone=number is None))
    rows = {split: _join([part[split] for part in apart]) for split in SPLITS}
    name = sources[0].name if config.mixture is None else f"mixture of {listed([one.name for one in sources])}"
    for index, label in enumerate(labels if kind == "class" else ()):
        here = sum(split["label"].count(index) for split in rows.values())
        if here and index not in rows["train"]["label"]:
            raise UserError(
                f"{name}: label {label!r} has {here} example(s), none of them for training; "
                "add some, remove the label, or lower data.test_fraction and data.validation_fraction"
            )
    sizes, chosen = [], {}
    for number, split in enumerate(SPLITS, start=1):
        order = _chosen(rows[split], config, split, number)
        chosen[split], total = take(rows[split], order), num_rows(rows[split])
        sizes.append(f"{len(order):,} {split}" if len(order) == total else f"{len(order):,} of {total:,} {split}")
    notes = dict.fromkeys(note for source, one in zip(sources, found, strict=True) for note in _notes(source, one))
    facts = [*sizes, *_facts(chosen, labels, kind), *dropped, *notes]
    unread = dict.fromkeys(column for one in found for column in one.unread)
    return ChosenRows(chosen, labels, f"{name}: {', '.join(facts)}", kind, tuple(unread))


def _notes(source: Source, found: Normalised) -> list[str]:
    """How the source was read."""
    return [*(table.note for table in source.tables.values() if table.note), *found.notes]


def _check_one_form(found: Sequence[Normalised], sources: Sequence[Source]) -> None:
    """Raises UserError for sources of a mixture whose examples do not have the same parts."""
    forms = [[role for role in one.rows["train"] if role not in ("tools", "row")] for one in found]
    for number, form in enumerate(forms[1:], start=2):
        if set(form) != set(forms[0]):
            raise UserError(
                f"data.mixture, entry {number}: the examples of {sources[number - 1].name} consist of "
                f"{' and '.join(form)}, those of the first source of {' and '.join(forms[0])}; write all in one form"
            )


def _together(sources: Sequence[dict[Split, Rows]]) -> dict[Split, Rows]:
    """The rows of all sources in each split, with the index of their source."""
    joined: dict[Split, Rows] = {}
    for split in SPLITS:
        parts = [
            {**rows[split], SOURCE: [index] * num_rows(rows[split])}
            for index, rows in enumerate(sources)
            if split in rows
        ]
        if parts:
            joined[split] = _join(parts)
    return joined


def _join(parts: Sequence[Rows]) -> Rows:
    """Rows one after another; None in a column that only other parts have."""
    if len(parts) == 1:
        return parts[0]
    roles = dict.fromkeys(role for part in parts for role in part)
    return {role: [value for part in parts for value in part.get(role) or [None] * num_rows(part)] for role in roles}


def _of_source(rows: Rows, index: int) -> Rows:
    """The rows of one source."""
    here = [at for at, source in enumerate(rows[SOURCE]) if source == index]
    return rows if len(here) == num_rows(rows) else take(rows, here)


def _chosen(rows: Rows, config: DataConfig, split: Split, purpose: int) -> np.ndarray:
    """The indices of the rows that `data.num_*` keeps, source after source: training rows in their seeded order, others
    in the order of their source.

    With weights, the training rows are divided by them. Else every source keeps its part.
    """
    order, of, wanted = _order(rows, config.seed, purpose), np.asarray(rows[SOURCE]), getattr(config, f"num_{split}")
    if wanted is not None and split == "train" and config.weights is not None:
        quotas = divide(config.weights, wanted)
        order = np.concatenate([order[of[order] == source][:quota] for source, quota in enumerate(quotas)])
    order = order[:wanted]
    return order[np.argsort(of[order], kind="stable")] if split == "train" else np.sort(order)


WHOLE_BYTES = 2 * 2**20
"""Files of more bytes in total are checked by their first rows only, before the libraries are loaded."""
HEAD_ROWS = 200


def check_data(config: DataConfig, task: Task) -> None:
    """Raises the UserError of `load_splits` as far as it can be known without loading the library `datasets`.

    Text files are read: whole if they are small, else their first rows. Folders, the hub, streams and Parquet files
    are not, and embedded data are what their names say.
    """
    found = []
    for number, one in numbered(config):
        with in_entry(number):
            found.append((number, one, check_settings(one)))
    read = [_reads_text(one, files) for _, one, files in found]
    paths = [Path(name) for _, _, files in found for name in files.values()]
    if all(read) and sum(_unpacked_size(path) for path in paths) <= WHOLE_BYTES:
        choose_rows(open_sources(config), config, task)
        return
    for (number, one, files), can_read in zip(found, read, strict=True):
        if can_read:
            with in_entry(number):
                check_head(open_files(one, files, HEAD_ROWS), one, task)


def _reads_text(config: DataConfig, files: Mapping[Split, str]) -> bool:
    """Whether a source is text files, which can be read without the library `datasets`."""
    if config.name is not None or config.streaming:
        return False
    return all(type_of(Path(name), "data.train", config.file_type) != "parquet" for name in files.values())


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


def _split_off(source: Source, rows: dict[Split, Rows], config: DataConfig, is_alone: bool) -> dict[Split, Rows]:
    """`rows` of a source with validation and test data. Each is a stretch of one seeded order, so both are stratified.

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
            raise UserError(_why_empty(source, split, total, is_alone))
    return rows


def _why_empty(source: Source, split: Split, total: int, is_alone: bool) -> str:
    if not total and not is_alone:
        return (
            f"all rows of {source.tables['train'].name} are also in the held-out data or in an earlier entry; give "
            "other training data, or remove the entry"
        )
    if not total:
        return f"All rows of {source.tables['train'].name} are also in the held-out data; give other training data"
    if split == "validation" and "validation" in source.tables:
        return f"All rows of {source.tables['validation'].name} are also in the test data; leave data.validation out"
    return (
        f"{source.name} has {total} example(s) once duplicates are dropped, too few to split: "
        f"none is left for {split}; give more data, or data.validation and data.test"
    )


_NOT_TEXT = ("label", "tags", "row", SOURCE)
"""Columns that do not tell whether two rows are equal."""


def _keys(rows: Rows) -> Iterator[bytes]:
    """A key for each row: the hash of all its texts, without differences in case and white space."""
    for parts in zip(*(values for role, values in rows.items() if role not in _NOT_TEXT), strict=True):
        text = "\0".join(" ".join(_text(value).casefold().split()) for value in parts)
        yield xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass"))


def _text(value: str | list | None) -> str:
    if isinstance(value, str):
        return value
    if value and isinstance(value[0], dict) and "role" in value[0]:
        value = spoken(value)
    return json.dumps(value, ensure_ascii=False)


def _order(rows: Rows, seed: int, purpose: int) -> np.ndarray:
    """A seeded order of the rows, stratified by source and class; each `purpose` has an order of its own."""
    labels = rows.get("label") or [0] * num_rows(rows)
    if labels and not isinstance(labels[0], int):  # sets of classes and numbers are not stratified
        labels = [0] * len(labels)
    groups = np.asarray(rows[SOURCE], dtype=int) * (max(labels, default=0) + 1) + np.asarray(labels, dtype=int)
    return stratified_order(groups.tolist(), np.random.default_rng([seed, purpose]))


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
