"""A model's head: what the data require of it, and which rows of a trained one the classes of the data keep."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from sgm_finetune.base.config import LabelKind, Task
from sgm_finetune.base.text import listed

_DEFAULT = re.compile(r"LABEL_[0-9]+")
"""Transformers' names for classes to which nobody gave a name."""
_HEADS: dict[Task, str] = {
    "sequence-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
}
"""How the architectures with a head of classes for a task are named."""


@dataclass(frozen=True)
class Head:
    """What the data require of a model's head."""

    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the logits; () keeps the stored head."""
    label_kind: LabelKind | None = None
    """What the head predicts: a class, a set of classes, or a number, such as a reward. None: unknown, or the task has
    no head of its own."""
    pad_token_id: int | None = None
    """The tokenizer's; None keeps the one in config.json."""
    is_new: bool = False
    """Whether the head that the files hold is for other classes, so that its rows are not read."""

    @property
    def fits_labels(self) -> bool:
        """Whether the head gets the size that the labels need (else: the stored size)."""
        return bool(self.labels) or self.label_kind == "number"


@dataclass(frozen=True)
class HeadChoice:
    """Whether the stored head is kept, and the classes of the head that is trained."""

    labels: tuple[str, ...]
    """The names of the head's classes, in the order of its rows."""
    rows: tuple[int, ...]
    """The row of each class of the data."""
    is_new: bool
    """Whether the rows that the files hold are for other classes, so that the head starts anew."""
    line: str | None
    """What a person should know about it; None where the files hold no head of classes and none is expected."""


def choose_head(labels: Sequence[str], described: PreTrainedConfig, task: Task) -> HeadChoice:
    """Keeps the trained head of a model if its classes are those of the data, else asks for a new one.

    `labels` are the classes of the data in the order that the data gives them; () for numbers to predict. `described`
    is the model's configuration.
    """
    own = tuple(labels), tuple(range(len(labels)))
    held = _head_task(described)
    num_rows, names = described.num_labels or 0, named_classes(described)
    if task == "reward":
        is_kept = held == "sequence-classification" and num_rows == 1
        line = "a new head for rewards, which scores at random before it is trained"
        return HeadChoice(
            *own, is_new=False, line="the model's own is kept: its row is the reward" if is_kept else line
        )
    if held is None or task not in _HEADS:
        return HeadChoice(*own, is_new=False, line=None)
    if not labels:  # one number needs one row
        line = f"a new head for a number; the model's own has {num_rows} classes" if num_rows > 1 else None
        return HeadChoice(*own, is_new=False, line=line)
    if held != task:
        return HeadChoice(*own, is_new=True, line=f"a new head for {listed(labels)}; the model's own is for {held}")
    if names is None:
        if not is_range(labels, num_rows):
            line = f"a new head for {listed(labels)}; the model's own has {num_rows} rows without names"
            return HeadChoice(*own, is_new=True, line=line)
        return HeadChoice(
            *own, is_new=False, line=f"the model's own is kept: its rows are the classes {listed(labels)}"
        )
    rows = matching_rows(labels, names)
    if rows is None:
        line = f"a new head for {listed(labels)}; the model's own has {listed(names)}"
        return HeadChoice(*own, is_new=True, line=line)
    line = f"the model's own is kept: {listed(names)}"
    renamed = [f"{label} = {names[row]}" for label, row in zip(labels, rows, strict=True) if label != names[row]]
    if renamed:
        line += f"; in the data {listed(renamed)}"
    return HeadChoice(names, rows, is_new=False, line=line)


def _head_task(described: PreTrainedConfig) -> Task | None:
    """The task of the head of classes in the model's files, as its configuration says; None without such a head."""
    architectures = getattr(described, "architectures", None)
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for task, ending in _HEADS.items():
        if any(name.endswith(ending) for name in names):
            return task
    return None


def named_classes(described: PreTrainedConfig) -> tuple[str, ...] | None:
    """The names in `id2label`, in the order of the rows; None for default names and for names that are not usable."""
    given = getattr(described, "id2label", None)
    if not isinstance(given, dict) or set(given) != set(range(len(given))):
        return None
    names = [given[row] for row in range(len(given))]
    if not all(isinstance(name, str) and name.strip() for name in names):
        return None
    names = tuple(name.strip() for name in names)
    if len(set(names)) < len(names) or all(map(_DEFAULT.fullmatch, names)):
        return None
    return names


def matching_rows(labels: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """The place in `names` of each of `labels`; None if one of them has none.

    A label is a name, or differs from one only in case or as 1.0 does from 1. The whole
    numbers 0 to n - 1 are the places of n names, unless one of them is a name.

    >>> matching_rows(["neg", "pos"], ["pos", "neg"]), matching_rows(["0", "1"], ["pos", "neg"])
    ((1, 0), (0, 1))
    >>> matching_rows(["NEG", "pos"], ["pos", "neutral", "neg"]), matching_rows(["bad", "pos"], ["pos", "neg"])
    ((2, 0), None)
    >>> matching_rows(["1.0", "2.0"], ["1", "2", "3"])
    (0, 1)
    """
    for written in (str, str.casefold, _whole):
        places = {written(name): place for place, name in enumerate(names)}
        found = [places.get(written(label)) for label in labels]
        if None not in found and len(places) == len(names) and len(set(found)) == len(found):
            return tuple(found)  # type: ignore[arg-type]
    are_places = is_range(labels, len(names)) and not set(labels) & set(names)
    return tuple(map(int, labels)) if are_places else None


def _whole(label: str) -> str:
    """A whole number without the zeros behind its point, any other label as it is."""
    return re.sub(r"^([+-]?[0-9]+)\.0+$", r"\1", label)


def is_range(labels: Sequence[str], number: int) -> bool:
    """Whether the labels are the whole numbers 0 to `number` - 1."""
    return len(labels) == number and set(labels) == set(map(str, range(number)))
