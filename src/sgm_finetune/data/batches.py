"""Batches: their order, padding, division over processes and number of predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from sgm_finetune.base.config import PAIR_TASKS, Config, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.encoding import IGNORED, REFERENCES, num_tokens, sequence_lengths
from sgm_finetune.data.mixture import SOURCE, Draw, by_source, whole_batches


def by_length(encoded: Dataset) -> list[int]:
    """The indices of a data set from the longest to the shortest sequence, so that batches need little padding."""
    return longest_first(sequence_lengths(encoded))


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The indices of `lengths`, in descending order of length.

    >>> longest_first([3, 9, 5])
    [1, 2, 0]
    """
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def num_predictions(labels: Tensor, task: Task) -> int:
    """The number of terms in the mean loss of a batch: examples, pairs, predicted tokens or tagged words."""
    if task == "sequence-classification":
        return len(labels)
    if task in PAIR_TASKS:  # two rows an example
        return len(labels) // 2
    return int(((labels[:, 1:] if task == "causal-lm" else labels) != IGNORED).sum())


PAIR_COLUMNS = ("reference", "desirable", "moved")
"""What a batch of preferences holds that is not for the model; `moved` is the trainer's (train/preference.py)."""
_WINDOW = 16  # batches within which examples are sorted by length


class LengthGroupedSampler(Sampler[int]):
    """Yields every example once an epoch, in batches of similar length. The first examples fill up the last batch.

    The order is a seeded permutation. Within a window of 16 batches, the examples are sorted by length and cut into
    batches, and the batches are shuffled. The order depends only on the *global* batch size and every batch is full, so
    any number of processes that share each batch see the same batches.

    With `draw`, the examples of an epoch are those that it chooses, as many as fill all batches.

    >>> sampler = LengthGroupedSampler([5, 5, 9, 9, 5], batch_size=2, seed=0)
    >>> len(sampler), sorted(set(sampler))
    (6, [0, 1, 2, 3, 4])
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, draw: Draw | None = None):
        self.lengths, self.batch_size, self.seed, self.draw, self.epoch = lengths, batch_size, seed, draw, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return whole_batches(len(self.lengths), self.batch_size)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        if self.draw is not None:
            drawn = self.draw.indices(self.epoch, len(self))
            order = [drawn[i] for i in torch.randperm(len(drawn), generator=generator).tolist()]
        else:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            order = [order[i % len(order)] for i in range(len(self))]
        size = self.batch_size
        for first in range(0, len(order), _WINDOW * size):
            window = sorted(order[first : first + _WINDOW * size], key=lambda i: -self.lengths[i])
            batches = [window[at : at + size] for at in range(0, len(window), size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[index]


def collator(
    tokenizer: Any, task: Task, pad_to_multiple_of: int | None = None
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """A function from examples to a batch, padded on the right to the longest example. It can be pickled.

    The attention mask and labels of -100 hide the padding, so any token can pad if the tokenizer has no padding token.
    """
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    return functools.partial(_collate, pad_id=pad_id, task=task, multiple=pad_to_multiple_of or 1)


def _collate(examples: Sequence[Mapping[str, Any]], pad_id: int, task: Task, multiple: int) -> dict[str, torch.Tensor]:
    if task in PAIR_TASKS:
        batch = _collate_pairs(examples, pad_id, multiple)
        if task == "reward":  # the score of a whole sequence: 1 for the better one
            batch["labels"] = torch.tensor([1.0, 0.0]).repeat_interleave(len(examples))
        return batch

    def padded(key: str, value: int) -> torch.Tensor:
        longest = max(len(example[key]) for example in examples)
        width = -(-longest // multiple) * multiple
        rows = [list(example[key]) + [value] * (width - len(example[key])) for example in examples]
        return torch.tensor(rows, dtype=torch.long)

    batch = {"input_ids": padded("input_ids", pad_id)}
    if "position_ids" in examples[0]:  # packed: padding comes last, where nothing attends to it
        batch["position_ids"] = padded("position_ids", 0)
    else:
        batch["attention_mask"] = padded("attention_mask", 0)
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if task == "sequence-classification":  # classes are integers; sets of classes and numbers are floats
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    else:
        batch["labels"] = padded("labels", IGNORED)
    return batch


def _collate_pairs(examples: Sequence[Mapping[str, Any]], pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """A batch of two rows an example: the first sequences of all examples, then the other ones."""
    sequences = [{key: example[key] for key in ("input_ids", "attention_mask", "labels")} for example in examples]
    others = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": example["other_labels"]}
        for example in examples
        for ids in [example["other_ids"]]
    ]
    batch = _collate([*sequences, *others], pad_id, "causal-lm", multiple)
    if "reference" in examples[0]:
        references = [example[name] for name in REFERENCES for example in examples]
        batch["reference"] = torch.tensor(references, dtype=torch.float32)
    if "desirable" in examples[0]:
        batch["desirable"] = torch.tensor([bool(example["desirable"]) for example in examples]).repeat(2)
    return batch


def some_pairs(batch: Mapping[str, torch.Tensor], first: int, size: int) -> dict[str, torch.Tensor]:
    """`size` examples of a batch of pairs, from the example `first` on: their rows of both halves."""
    return {name: torch.cat([half[first : first + size] for half in x.chunk(2)]) for name, x in batch.items()}


def divide_batch(config: Config, world_size: int) -> tuple[int, int]:
    """(examples in a micro-batch, micro-batches of each process in a step).

    Raises UserError when the micro-batches of the processes do not add up to the batch.
    """
    batch = config.training.batch_size
    micro = config.training.micro_batch_size or max(1, batch // world_size)
    if batch % (micro * world_size):
        raise UserError(
            f"training.batch_size={batch} cannot be divided into micro-batches of {micro} on {world_size} processes; "
            f"choose a multiple of {micro * world_size}"
        )
    return micro, batch // (micro * world_size)


def draw_of(config: Config, train: Dataset, seed: int) -> Draw | None:
    """What chooses the training examples of each epoch; None where every one comes once."""
    weights = config.data.weights
    return None if weights is None else Draw(train[SOURCE][:], weights, seed)


def tokens_per_example(config: Config, train: Dataset) -> float:
    """The mean number of tokens of the training examples of an epoch."""
    weights = config.data.weights
    if weights is None:
        return num_tokens(train) / len(train)
    parts = {source: train.select(here) for source, here in by_source(train, range(len(train))).items()}
    total = sum(weights[source] for source in parts)
    return sum(weights[source] / total * num_tokens(part) / len(part) for source, part in parts.items())


def num_steps(config: Config, num_train: int) -> int:
    """The number of optimizer steps of the run: `training.max_steps`, or the steps of all epochs."""
    if config.training.max_steps is not None:
        return config.training.max_steps
    return max(1, round(config.training.epochs * -(-num_train // config.training.batch_size)))
