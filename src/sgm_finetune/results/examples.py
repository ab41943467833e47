"""Test examples that the training changed: what was predicted of them before and after, with their text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import xxhash
from datasets import Dataset

from sgm_finetune.base.config import Task
from sgm_finetune.data.splits import DataSplits

KEPT_PREDICTIONS = 2000
"""Of the first so many test examples."""
SHOWN = {"mended": 10, "spoilt": 10, "other": 5}
"""Most examples of each sort."""
MAX_TEXT = 400
"""Characters of a text; what is longer loses its middle."""

Became = Literal["mended", "spoilt", "other"]


def fingerprint_of_test(splits: DataSplits) -> str:
    """32 hexadecimal digits of the test examples, their order and their labels' names: equal for runs that were tested
    on the same, whatever their models."""
    digest = xxhash.xxh3_128(json.dumps([list(splits.labels), splits.label_kind]).encode())
    for row in splits.test:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def kept_predictions(predicted: Sequence[Any]) -> list[Any]:
    """Those that are kept for comparison; [] of a language model, whose answers `metrics["samples"]` holds."""
    return [] if not predicted or predicted[0] is None else list(predicted[:KEPT_PREDICTIONS])


def changed_examples(
    splits: DataSplits,
    task: Task,
    encoded: Dataset,
    predictions: tuple[list[Any], list[Any]],
    metrics: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """The content of examples.json. `predictions` and `metrics` are those (before, after) the training.

    Examples are compared in the order of the test data and shown in it, the first of each sort (`SHOWN`); of numbers
    those that moved most. `became`: mended (right, or nearer, now), spoilt (the other way round) or other.
    """
    if metrics[1].get("samples"):
        found = _answers(*(numbers.get("samples", []) for numbers in metrics))
    elif not predictions[0] or len(splits.test) != len(encoded):  # dropped examples: rows no longer tell which is which
        found = []
    elif task == "token-classification":
        found = _tagged(splits, *predictions)
    elif splits.label_kind == "number":
        found = _numbers(splits, *predictions)
    else:
        found = _classes(splits, *predictions)
    changed = [example for example in found if example["before"] != example["after"]]
    return {
        "format": "sgm-examples/1",
        "num_compared": len(found),
        "num_changed": {sort: sum(e["became"] == sort for e in changed) for sort in SHOWN},
        "examples": _shown(changed),
    }


def _shown(changed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen: list[dict[str, Any]] = []
    for sort, number in SHOWN.items():
        those = [example for example in changed if example["became"] == sort]
        chosen += sorted(those, key=lambda e: -e.get("moved", 0.0))[:number]
    return [{k: v for k, v in example.items() if k != "moved"} for example in chosen]


def _became(before: bool, after: bool) -> Became:
    return "other" if before == after else "mended" if after else "spoilt"


def _classes(splits: DataSplits, before: Sequence[Any], after: Sequence[Any]) -> list[dict[str, Any]]:
    """One class, or a set of them."""

    def named(label: Any) -> str:
        if isinstance(label, int):
            return splits.labels[label]
        return ", ".join(name for name, has in zip(splits.labels, label, strict=True) if has) or "none"

    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        truth, old, new = named(row["label"]), named(old), named(new)  # type: ignore[index]
        became = _became(old == truth, new == truth)
        found.append(_example(index, _text(row), truth, old, new, became))
    return found


def _numbers(splits: DataSplits, before: Sequence[float], after: Sequence[float]) -> list[dict[str, Any]]:
    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        truth = float(row["label"])  # type: ignore[index]
        nearer = abs(old - truth) - abs(new - truth)
        became: Became = "mended" if nearer > 0 else "spoilt" if nearer < 0 else "other"
        example = _example(index, _text(row), f"{truth:.4g}", f"{old:.4g}", f"{new:.4g}", became)
        found.append({**example, "moved": abs(nearer)})
    return found


def _tagged(
    splits: DataSplits, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """The words whose tag is none of `O`, as word/tag; words that were cut off are left out."""
    found = []
    for index, (old, new, row) in enumerate(zip(before, after, splits.test, strict=False)):
        words, truth = row["tokens"], row["tags"][: len(old)]  # type: ignore[index]

        def told(tags: Sequence[int], words: Sequence[str] = words) -> str:
            named = ((word, splits.labels[tag]) for word, tag in zip(words, tags, strict=False))
            return _cut(" ".join(f"{word}/{name}" for word, name in named if name != "O") or "nothing")

        became = _became(list(old) == list(truth), list(new) == list(truth))
        found.append(_example(index, _cut(" ".join(words)), told(truth), told(old), told(new), became))
    return found


def _answers(before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    found = []
    for index, (old, new) in enumerate(zip(before, after, strict=False)):
        truth = new["reference"]
        became = _became(*(sample["answer"].split() == truth.split() for sample in (old, new)))
        answers = _cut(old["answer"]), _cut(new["answer"])
        found.append(_example(index, _cut(new["prompt"]), _cut(truth), *answers, became))
    return found


def _example(index: int, text: str, truth: str, before: str, after: str, became: Became) -> dict[str, Any]:
    return {"index": index, "text": text, "truth": truth, "before": before, "after": after, "became": became}


def _text(row: Any) -> str:
    texts = [row[name] for name in ("text", "text_pair") if row.get(name) is not None]
    return " ⏐ ".join(_cut(str(text)) for text in texts)


def _cut(text: str) -> str:
    """
    >>> len(_cut("word " * 100)), _cut("two  words")
    (400, 'two words')
    """
    text = " ".join(text.split()) if "\n" not in text else text.strip()
    half = MAX_TEXT // 2
    return text if len(text) <= MAX_TEXT else f"{text[: half - 2].rstrip()} … {text[-half + 1 :].lstrip()}"
