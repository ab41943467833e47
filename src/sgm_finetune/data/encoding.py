"""Splits -> token sequences, and sequences -> padded batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from sgm_finetune.config import Task
from sgm_finetune.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that the loss leaves out."""
TEXTS_PER_CALL = 1000

FEATURES = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "attention_mask": datasets.List(datasets.Value("int8")),
}
CLASS_FEATURES = datasets.Features({**FEATURES, "labels": datasets.Value("int64")})
TOKEN_FEATURES = datasets.Features({**FEATURES, "labels": datasets.List(datasets.Value("int32"))})


@dataclass(frozen=True)
class Encoded:
    """Sequences with `input_ids`, `attention_mask`, `labels`, and what encoding cost."""

    dataset: datasets.Dataset
    num_truncated: int
    """Examples that lost tokens at `max_length` and were kept."""
    num_dropped: int
    """Examples that lost every answer token and were left out (prompt/completion only)."""


def encode(split: datasets.Dataset, tokenizer: Any, task: Task, max_length: int) -> Encoded:
    """`split` as token sequences of at most `max_length`; deterministic, in memory.

    Classification: one sequence a text, cut by the tokenizer's own rule. Language modelling on `text`: every document
    is followed by the end-of-sequence token, all are joined and cut into blocks of `max_length`; no token is lost but a
    last one that would stand alone. On `prompt` and `completion`: the loss counts the completion and the
    end-of-sequence token; too long examples lose their end.
    """
    match task:
        case "sequence-classification":
            encoded = _encode_classification(split, tokenizer, max_length)
        case "causal-lm" if "completion" in split.column_names:
            encoded = _encode_pairs(split, tokenizer, max_length)
        case "causal-lm":
            encoded = _encode_packed(split, tokenizer, max_length)
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", encoding_summary(encoded))
    return encoded


def encoding_summary(encoded: Encoded) -> str:
    """One line: sequences, tokens, how many examples were cut or dropped."""
    num_tokens = sum(map(len, encoded.dataset["input_ids"]))
    return (
        f"{len(encoded.dataset):,} sequences, {num_tokens:,} tokens, "
        f"{encoded.num_truncated:,} examples cut, {encoded.num_dropped:,} dropped"
    )


def collator(
    tokenizer: Any, task: Task, pad_to_multiple_of: int | None = None
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """A function from examples to a batch, padded on the right to the longest of them; it can be pickled.

    Padding is hidden by the attention mask and by labels of -100, so without a padding token any other will do.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return functools.partial(
        _collate, pad_id=pad_id, token_labels=task == "causal-lm", multiple=pad_to_multiple_of or 1
    )


def _collate(
    examples: Sequence[Mapping[str, Any]], pad_id: int, token_labels: bool, multiple: int
) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    width = -(-longest // multiple) * multiple

    def padded(key: str, value: int) -> torch.Tensor:
        rows = [list(example[key]) + [value] * (width - len(example[key])) for example in examples]
        return torch.tensor(rows, dtype=torch.long)

    batch = {"input_ids": padded("input_ids", pad_id), "attention_mask": padded("attention_mask", 0)}
    if token_labels:
        batch["labels"] = padded("labels", IGNORED)
    else:
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=torch.long)
    return batch


def _encode_classification(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    sequences = list(_token_ids(tokenizer, split["text"][:]))
    long = [index for index, ids in enumerate(sequences) if len(ids) > max_length]
    cut = _token_ids(tokenizer, split.select(long)["text"][:], truncation=True, max_length=max_length)
    for index, ids in zip(long, cut, strict=True):
        sequences[index] = ids
    return Encoded(_dataset(sequences, split["label"][:], CLASS_FEATURES), num_truncated=len(long), num_dropped=0)


def _encode_packed(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    eos = _end_of_sequence(tokenizer)
    stream: list[int] = []
    for ids in _token_ids(tokenizer, split["text"][:]):
        stream += _ended(ids, eos)
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    if blocks and len(blocks[-1]) < 2:  # nothing in it can be predicted
        blocks.pop()
    if not blocks:
        raise UserError(f"{len(split)} text(s) make {len(stream)} token(s); language modelling needs two or more")
    return Encoded(_dataset(blocks, blocks, TOKEN_FEATURES), num_truncated=0, num_dropped=0)


def _encode_pairs(split: datasets.Dataset, tokenizer: Any, max_length: int) -> Encoded:
    """Prompt and completion are tokenised as one text, as the model will read them.

    The prompt's part of it is what it has in common with the prompt alone, so a token that straddles the border
    belongs to the answer.
    """
    eos = _end_of_sequence(tokenizer)
    prompts, completions = split["prompt"][:], split["completion"][:]
    whole = _token_ids(tokenizer, [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)])
    sequences, labels, longest_prompt, num_truncated = [], [], 0, 0
    for prompt, ids in zip(_token_ids(tokenizer, prompts), whole, strict=True):
        ids = _ended(ids, eos)
        num_prompt = _num_common(prompt, ids)
        longest_prompt = max(longest_prompt, num_prompt)
        if max(num_prompt, 1) >= max_length:  # the first token of a sequence is never predicted
            continue
        num_truncated += len(ids) > max_length
        sequences.append(ids[:max_length])
        labels.append([IGNORED] * num_prompt + ids[num_prompt:max_length])
    if not sequences:
        raise UserError(
            f"100 % of {len(split)} examples lose every answer token at data.max_length={max_length}; "
            f"the longest prompt has {longest_prompt} tokens. Raise data.max_length"
        )
    return Encoded(_dataset(sequences, labels, TOKEN_FEATURES), num_truncated, len(split) - len(sequences))


def _token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
    """The tokens of each text, with the special ones that the tokenizer adds by itself."""
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = list(texts[start : start + TEXTS_PER_CALL])
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        yield from tokenizer(part, **only_ids, **options)["input_ids"]


def _end_of_sequence(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("This tokenizer has no end-of-sequence token, which model.task=causal-lm needs; set eos_token")
    return tokenizer.eos_token_id


def _ended(ids: list[int], eos: int) -> list[int]:
    return ids if ids and ids[-1] == eos else [*ids, eos]


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _dataset(
    sequences: Sequence[Sequence[int]], labels: Sequence[Any], features: datasets.Features
) -> datasets.Dataset:
    columns = {"input_ids": sequences, "attention_mask": [[1] * len(ids) for ids in sequences], "labels": labels}
    return datasets.Dataset.from_dict(columns, features=features)
