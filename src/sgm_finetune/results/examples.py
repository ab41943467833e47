"""A sample of the test examples whose prediction changed in training or stayed wrong: their text, before and after."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from sgm_finetune.base.config import Task
from sgm_finetune.results.outcomes import SHOWN_SORTS, SORTS, Became

if TYPE_CHECKING:
    from datasets import Dataset

    from sgm_finetune.data.splits import DataSplits

KEPT_PREDICTIONS = 2000
"""Number of test examples whose predictions are kept; of more, a random sample."""
NUM_SHOWN = 24
"""Number of examples in examples.json."""
LEAST_SHOWN = 3
"""Number of examples of each sort that are shown, whatever its share, if there are so many."""
MAX_CLASSES = 30
"""Number of classes, the most frequent ones, whose examples are counted apart."""
MAX_TEXT = 400
"""Largest number of characters of a text. A longer text loses its middle."""


def fingerprint_of_test(splits: DataSplits) -> str:
    """Returns 32 hexadecimal digits that depend on the test examples, their order and the names of their labels.

    Runs that were tested on the same data have the same fingerprint, whatever their models.
    """
    digest = xxhash.xxh3_128(json.dumps([list(splits.labels), splits.label_kind]).encode())
    for row in splits.test:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def kept_indices(number: int) -> list[int]:
    """Returns the indices of the test examples, of `number`, whose predictions are kept: always the same, rising.

    >>> kept_indices(3)
    [0, 1, 2]
    """
    return sorted(random.Random(0).sample(range(number), min(number, KEPT_PREDICTIONS)))


def kept_predictions(predicted: Sequence[Any]) -> list[Any]:
    """Returns those at `kept_indices`; [] for a language model, whose answers are in `metrics["samples"]`."""
    if not predicted or predicted[0] is None:
        return []
    return [predicted[index] for index in kept_indices(len(predicted))]


def _rows(splits: DataSplits) -> Iterator[tuple[int, Any]]:
    """Yields index and row of the test examples whose predictions are kept."""
    return ((index, splits.test[index]) for index in kept_indices(len(splits.test)))


def changed_examples(
    splits: DataSplits,
    task: Task,
    encoded: Dataset,
    predictions: tuple[list[Any], list[Any]],
    metrics: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the content of examples.json. `predictions` and `metrics` are (before training, after training).

    `num_compared` and `counts`, by what `became` of an example, are of all compared examples; `by_class` has the same
    counts for each true class. `num_changed` counts only those whose prediction changed. `examples` is a sample
    (`sample_of`) without those that stayed right.
    """
    if metrics[1].get("samples"):
        found = _compare_answers(*(numbers.get("samples", []) for numbers in metrics))
    elif not predictions[0] or len(splits.test) != len(encoded):
        found = []  # no predictions; or examples were dropped, so that rows and predictions no longer correspond
    elif task == "token-classification":
        found = _compare_tags(splits, *predictions)
    elif task == "reward":
        found = _compare_pairs(splits, *predictions)
    elif splits.label_kind == "number":
        found = _compare_numbers(splits, *predictions)
    else:
        found = _compare_classes(splits, *predictions)
    changed = Counter(example["became"] for example in found if example["before"] != example["after"])
    counts = Counter(example["became"] for example in found)
    return {
        "format": "sgm-examples/1",
        "num_compared": len(found),
        "num_changed": {sort: changed[sort] for sort in SHOWN_SORTS},
        "counts": {sort: counts[sort] for sort in SORTS},
        "by_class": _by_class(found),
        "examples": sample_of(found),
    }


def _by_class(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Returns true class -> what became of its examples -> their number, for the most frequent classes."""
    classes = Counter(example["class"] for example in found if "class" in example)
    pairs = Counter((example.get("class"), example["became"]) for example in found)
    return {name: {sort: pairs[name, sort] for sort in SORTS} for name, _ in classes.most_common(MAX_CLASSES)}


def sample_of(found: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Returns at most NUM_SHOWN examples that did not stay right, drawn at random in proportion to their numbers.

    A sort has its share of the sample, but at least LEAST_SHOWN. Within a sort, every k-th example is drawn from those
    in random order, class after class, so that each class has its share as well. Equal runs show equal examples.
    """
    chance = random.Random(seed)
    sorts = {sort: [example for example in found if example["became"] == sort] for sort in SHOWN_SORTS}
    total = sum(map(len, sorts.values()))
    chosen: list[dict[str, Any]] = []
    free = NUM_SHOWN
    for sort in sorted(sorts, key=lambda sort: len(sorts[sort])):  # the rarest first: the largest takes what is left
        of_sort = sorts[sort]
        is_last = sort == max(sorts, key=lambda sort: len(sorts[sort]))
        share = free if is_last else max(LEAST_SHOWN, round(NUM_SHOWN * len(of_sort) / max(1, total)))
        number = min(len(of_sort), share)
        free -= number
        mixed = sorted(chance.sample(of_sort, len(of_sort)), key=lambda example: example.get("class", ""))
        start = chance.random()
        chosen += [mixed[int((start + at) * len(mixed) / number)] for at in range(number)]
    chance.shuffle(chosen)  # the page shows the first ones at once
    return chosen


def _judge(right_before: bool, right_after: bool) -> Became:
    if right_after:
        return "right" if right_before else "mended"
    return "spoilt" if right_before else "other"


def _compare_classes(splits: DataSplits, before: Sequence[Any], after: Sequence[Any]) -> list[dict[str, Any]]:
    """Compares classes, or sets of classes."""

    def class_names(label: Any) -> str:
        if isinstance(label, int):
            return splits.labels[label]
        return ", ".join(name for name, has in zip(splits.labels, label, strict=True) if has) or "none"

    found = []
    for old, new, (index, row) in zip(before, after, _rows(splits), strict=False):
        truth, old, new = class_names(row["label"]), class_names(old), class_names(new)
        became = _judge(old == truth, new == truth)
        truth, old, new = _shorten(truth), _shorten(old), _shorten(new)
        found.append({**_example(index, _text(row), truth, old, new, became), "class": truth})
    return found


def _compare_numbers(splits: DataSplits, before: Sequence[float], after: Sequence[float]) -> list[dict[str, Any]]:
    found = []
    for old, new, (index, row) in zip(before, after, _rows(splits), strict=False):
        truth = float(row["label"])
        nearer = abs(old - truth) - abs(new - truth)
        became: Became = "other"
        if nearer > 0:
            became = "mended"
        elif nearer < 0:
            became = "spoilt"
        found.append(_example(index, _text(row), f"{truth:.4g}", f"{old:.4g}", f"{new:.4g}", became))
    return found


def _compare_pairs(
    splits: DataSplits, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Compares which of two answers has the higher score, and by how much."""

    def better(scores: Sequence[float]) -> str:
        margin = scores[0] - scores[1]
        return f"{'chosen' if margin > 0 else 'rejected'} by {abs(margin):.3g}"

    found = []
    for old, new, (index, row) in zip(before, after, _rows(splits), strict=False):
        became = _judge(old[0] > old[1], new[0] > new[1])
        prompt, chosen, rejected = map(_shorten, _texts_of_pair(row))
        text = " ⏐ ".join([*([prompt] if prompt else []), f"chosen: {chosen}", f"rejected: {rejected}"])
        found.append(_example(index, text, "chosen", better(old), better(new), became))
    return found


def _texts_of_pair(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """The last message before two answers, and the answers."""
    if "messages" not in row:
        return row["prompt"], row["completion"], row["rejected"]
    chosen, rejected = row["messages"], row["rejected"]
    shared = next((at for at, two in enumerate(zip(chosen, rejected, strict=False)) if two[0] != two[1]), 0)
    asked = chosen[shared - 1].get("content") if shared else None
    better, worse = ("\n".join(str(one.get("content") or "") for one in turns[shared:]) for turns in (chosen, rejected))
    return str(asked or ""), better, worse


def _compare_tags(
    splits: DataSplits, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Compares tags, written as word/tag for words whose tag is not `O`. Leaves out words that were truncated."""
    found = []
    for old, new, (index, row) in zip(before, after, _rows(splits), strict=False):
        words, truth = row["tokens"], row["tags"][: len(old)]

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
