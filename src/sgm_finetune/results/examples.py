"""Test examples whose prediction changed in training: their text, and the predictions before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from sgm_finetune.base.config import Task

if TYPE_CHECKING:
    from datasets import Dataset

    from sgm_finetune.data.splits import DataSplits

KEPT_PREDICTIONS = 2000
"""Number of test examples, from the first, whose predictions are kept."""
NUM_SHOWN = {"mended": 10, "spoilt": 10, "other": 5}
"""Largest number of examples of each sort in examples.json."""
MAX_TEXT = 400
"""Largest number of characters of a text. A longer text loses its middle."""

Became = Literal["mended", "spoilt", "other"]


def fingerprint_of_test(splits: DataSplits) -> str:
    """Returns 32 hexadecimal digits that depend on the test examples, their order and the names of their labels.

    Runs that were tested on the same data have the same fingerprint, whatever their models.
    """
    digest = xxhash.xxh3_128(json.dumps([list(splits.labels), splits.label_kind]).encode())
    for row in splits.test:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def kept_predictions(predicted: Sequence[Any]) -> list[Any]:
    """Returns the first KEPT_PREDICTIONS; [] for a language model, whose answers are in `metrics["samples"]`."""
    return [] if not predicted or predicted[0] is None else list(predicted[:KEPT_PREDICTIONS])


def changed_examples(
    splits: DataSplits,
    task: Task,
    encoded: Dataset,
    predictions: tuple[list[Any], list[Any]],
    metrics: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the content of examples.json. `predictions` and `metrics` are (before training, after training).

    It holds the first examples of each sort (`NUM_SHOWN`) in the order of the test data; for predicted numbers, those
    that moved most. `became` is "mended" (right now, or closer), "spoilt" (wrong now, or further away) or "other".
    """
    if metrics[1].get("samples"):
        found = _compare_answers(*(numbers.get("samples", []) for numbers in metrics))
    elif not predictions[0] or len(splits.test) != len(encoded):
        found = []  # no predictions; or examples were dropped, so that rows and predictions no longer correspond
    elif task == "token-classification":
        found = _compare_tags(splits, *predictions)
    elif splits.label_kind == "number":
        found = _compare_numbers(splits, *predictions)
    else:
        found = _compare_classes(splits, *predictions)
    changed = [example for example in found if example["before"] != example["after"]]
    return {
        "format": "sgm-examples/1",
        "num_compared": len(found),
        "num_changed": {sort: sum(example["became"] == sort for example in changed) for sort in NUM_SHOWN},
        "examples": _choose(changed),
    }


def _choose(changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen: list[dict[str, Any]] = []
    for sort, number in NUM_SHOWN.items():
        of_sort = [example for example in changed if example["became"] == sort]
        chosen += sorted(of_sort, key=lambda example: -example.get("moved", 0.0))[:number]
    return [{key: value for key, value in example.items() if key != "moved"} for example in chosen]


def _judge(right_before: bool, right_after: bool) -> Became:
    if right_before == right_after:
        return "other"
    return "mended" if right_after else "spoilt"


def _compare_classes(splits: DataSplits, before: Sequence[Any], after: Sequence[Any]) -> list[dict[str, Any]]:
    """Compares classes, or sets of classes."""

    def class_names(label: Any) -> str:
        if isinstance(label, int):
            return splits.labels[label]
        return ", ".join(name for name, has in zip(splits.labels, label, strict=True) if has) or "none"

    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        truth, old, new = class_names(row["label"]), class_names(old), class_names(new)  # type: ignore[index]
        found.append(_example(index, _text(row), truth, old, new, _judge(old == truth, new == truth)))
    return found


def _compare_numbers(splits: DataSplits, before: Sequence[float], after: Sequence[float]) -> list[dict[str, Any]]:
    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        truth = float(row["label"])  # type: ignore[index]
        nearer = abs(old - truth) - abs(new - truth)
        became: Became = "other"
        if nearer > 0:
            became = "mended"
        elif nearer < 0:
            became = "spoilt"
        example = _example(index, _text(row), f"{truth:.4g}", f"{old:.4g}", f"{new:.4g}", became)
        found.append({**example, "moved": abs(nearer)})
    return found


def _compare_tags(
    splits: DataSplits, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Compares tags, written as word/tag for words whose tag is not `O`. Leaves out words that were truncated."""
    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        words, truth = row["tokens"], row["tags"][: len(old)]  # type: ignore[index]

        def tagged_words(tags: Sequence[int], words: Sequence[str] = words) -> str:
            named = ((word, splits.labels[tag]) for word, tag in zip(words, tags, strict=False))
            return _shorten(" ".join(f"{word}/{name}" for word, name in named if name != "O") or "nothing")

        became = _judge(list(old) == list(truth), list(new) == list(truth))
        text = _shorten(" ".join(words))
        found.append(_example(index, text, tagged_words(truth), tagged_words(old), tagged_words(new), became))
    return found


def _compare_answers(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    found = []
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        truth = new["reference"]
        became = _judge(*(sample["answer"].split() == truth.split() for sample in (old, new)))
        answers = _shorten(old["answer"]), _shorten(new["answer"])
        found.append(_example(index, _shorten(new["prompt"]), _shorten(truth), *answers, became))
    return found


def _example(index: int, text: str, truth: str, before: str, after: str, became: Became) -> dict[str, Any]:
    return {"index": index, "text": text, "truth": truth, "before": before, "after": after, "became": became}


def _text(row: Any) -> str:
    texts = [row[name] for name in ("text", "text_pair") if row.get(name) is not None]
    return " ⏐ ".join(_shorten(str(text)) for text in texts)


def _shorten(text: str) -> str:
    """Returns a text of at most MAX_TEXT characters; one line loses repeated spaces, a longer text its middle.

    >>> len(_shorten("word " * 100)), _shorten("two  words")
    (400, 'two words')
    """
    text = text.strip() if "\n" in text else " ".join(text.split())
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[: half - 2].rstrip()} … {text[-half + 1 :].lstrip()}"
