"""`sgm data`: shows examples as the model will see them, and their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sgm_finetune.base.config import Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.commands.checked_data import checked_data
from sgm_finetune.data.encoding import IGNORED, num_tokens, sequence_lengths
from sgm_finetune.data.mixture import SOURCE, by_source
from sgm_finetune.data.prepared import PreparedData, not_read
from sgm_finetune.data.splits import SPLITS, DataSplits

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
LEARNT_MARKS = ("⟦", "⟧")
"""Marks around what the loss counts, for output without brightness."""
SHOWN_CLASSES = 24
"""Of more classes, as many are shown."""


def preview(config: Config, console: Console, num_examples: int = 3) -> dict[str, Any]:
    """Prints the first training examples, the classes with their numbers, the length quantiles of every split and what
    the model does not see, and returns the same as data.

    An example is {"text", "parts": [[text, learnt], ...], "tokens"}, with "label" or "target" when it has one, and with
    "rejected" (parts again) when it is a pair. Of a mixture, it has its "source" too, and `num_examples` of each source
    are shown. `learnt` is true for text that the loss counts.
    """
    prepared = checked_data(config, StepLog(console))
    dataset = prepared.train.dataset
    sources = by_source(dataset, range(len(dataset)))
    shown = [(source, index) for source, indices in sources.items() for index in indices[:num_examples]]
    examples = [_describe_example(dataset[index], prepared, config) for _, index in shown]
    lengths = {split: _lengths(getattr(prepared, split).dataset) for split in SPLITS}
    bright = console.is_terminal and not console.no_color
    for (source, index), example in zip(shown, examples, strict=True):
        console.print(Rule(_title(example, index - sources[source][0] + 1, len(sources[source])), align="left"))
        console.print(_example_text(example, bright), highlight=False, soft_wrap=not console.is_terminal)
    classes = _class_counts(prepared.splits)
    if classes:
        counted = "words" if config.model.task == "token-classification" else "examples"
        console.print(Rule(f"{counted} of each class", align="left"))
        console.print(_class_table(classes))
    console.print(Rule("tokens per example", align="left"))
    console.print(_length_table(lengths, config.data.max_length))
    return {
        "data": prepared.splits.description,
        "mixture": [asdict(share) for share in prepared.mixture],
        "not_read": not_read(prepared.splits, prepared.train),
        "doubled_tokens": dict(prepared.train.doubled),
        "examples": examples,
        "classes": classes,
        "tokens": lengths,
        "num_truncated": {split: getattr(prepared, split).num_truncated for split in SPLITS},
        "num_dropped": {split: getattr(prepared, split).num_dropped for split in SPLITS},
    }


def _title(example: Mapping[str, Any], number: int, total: int) -> str:
    source = f" of {example['source']}" if "source" in example else ""
    return f"training example {number:,} of {total:,}{source} · {example['tokens']} tokens"


def _describe_example(encoded: Mapping[str, Any], prepared: PreparedData, config: Config) -> dict[str, Any]:
    ids, labels = encoded["input_ids"], encoded["labels"]
    tokenizer, names = prepared.tokenizer, prepared.splits.labels
    found: dict[str, Any] = {"text": tokenizer.decode(ids), "tokens": len(ids)}
    if prepared.mixture:
        found["source"] = prepared.mixture[encoded[SOURCE]].name
    match config.model.task:
        case "causal-lm":
            found["parts"] = _learnt_parts(ids, labels, tokenizer)
        case "preference" | "reward":
            found["parts"] = _learnt_parts(ids, labels, tokenizer)
            if "desirable" in encoded:
                found["label"] = "a good answer" if encoded["desirable"] else "a bad answer"
            else:
                found["rejected"] = _learnt_parts(encoded["other_ids"], encoded["other_labels"], tokenizer)
                found["tokens"] += len(encoded["other_ids"])
        case "seq2seq-lm":
            found |= {"parts": [[found["text"], False]], "target": tokenizer.decode(labels)}
        case "token-classification":
            found["parts"] = [
                [str(tokenizer.decode([token])) + ("" if label == IGNORED else f"/{names[label]}"), label != IGNORED]
                for token, label in zip(ids, labels, strict=True)
            ]
        case "sequence-classification":
            found |= {"parts": [[found["text"], False]], "label": _label_text(labels, names)}
    return found


def _learnt_parts(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[list[Any]]:
    """[text, learnt] for each stretch of tokens that are learnt or not. A learnt token is the target of the one before
    it."""
    flags = [label != IGNORED for label in labels]
    return [
        [tokenizer.decode([token for token, _ in run]), learnt]
        for learnt, run in groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1])
    ]


def _label_text(label: int | float | list[float], names: tuple[str, ...]) -> str:
    match label:
        case int():
            return names[label]
        case float():
            return f"{label:g}"
    return ", ".join(name for name, here in zip(names, label, strict=True) if here) or "(none)"


def _example_text(example: Mapping[str, Any], bright: bool) -> Text:
    text = Text()
    if "rejected" in example:
        text.append("chosen: ", style="bold" if bright else "")
    can_dim = any(learnt for _, learnt in example["parts"])  # else the whole text is input
    for key in ("parts", "rejected"):
        if key == "rejected" and key in example:
            text.append("\nrejected: ", style="bold" if bright else "")
        for part, learnt in example.get(key, ()):
            if bright or not learnt:
                text.append(part, style="" if learnt or not can_dim else "dim")
            else:
                begin, end = LEARNT_MARKS
                text.append(f"{begin}{part}{end}")
    for key in ("label", "target"):
        if key in example:
            text.append(f"\n→ {example[key]}", style="bold" if bright else "")
    return text


def _class_counts(splits: DataSplits) -> dict[str, dict[str, int]]:
    """Class -> split -> the number of its examples or words; {} without classes."""
    size = len(splits.labels)
    if not size:
        return {}
    counts = []
    for name in SPLITS:
        dataset = getattr(splits, name)
        if "tags" in dataset.column_names:
            found = np.bincount(list(chain.from_iterable(dataset["tags"][:])), minlength=size)
        elif splits.label_kind == "classes":
            found = np.asarray(dataset["label"][:]).sum(0)
        else:
            found = np.bincount(dataset["label"][:], minlength=size)
        counts.append(found.astype(int).tolist())
    return {label: dict(zip(SPLITS, row, strict=True)) for label, *row in zip(splits.labels, *counts, strict=True)}


def _class_table(classes: Mapping[str, Mapping[str, int]]) -> Table:
    """All classes, or of many the most frequent and the rarest."""
    names = list(classes)
    if len(names) > SHOWN_CLASSES:
        ordered = sorted(names, key=lambda name: -classes[name]["train"])
        hidden = len(names) - SHOWN_CLASSES
        names = [*ordered[: SHOWN_CLASSES // 2], f"... {hidden:,} more ...", *ordered[-(SHOWN_CLASSES // 2) :]]
    table = Table(box=None)
    table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=40)
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name in names:
        numbers = classes.get(name)
        table.add_row(Text(name), *(f"{numbers[split]:,}" if numbers is not None else "" for split in SPLITS))
    return table


def _lengths(dataset: Any) -> dict[str, float]:
    lengths = sequence_lengths(dataset)
    return {
        "examples": len(lengths),
        "tokens": num_tokens(dataset),
        **{_quantile_name(q): float(v) for q, v in zip(QUANTILES, np.quantile(lengths, QUANTILES), strict=True)},
    }


def _quantile_name(quantile: float) -> str:
    return {0.0: "shortest", 0.5: "median", 1.0: "longest"}.get(quantile, f"{quantile:.0%}")


def _length_table(lengths: Mapping[str, Mapping[str, float]], max_length: int) -> Table:
    table = Table(caption=f"data.max_length is {max_length}", caption_justify="left", box=None)
    table.add_column("split")
    for name in next(iter(lengths.values())):
        table.add_column(name, justify="right")
    for split, values in lengths.items():
        table.add_row(split, *(f"{value:,.0f}" for value in values.values()))
    return table
