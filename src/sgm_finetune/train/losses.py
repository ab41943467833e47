"""The loss of each task, summed over part of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn

from sgm_finetune.base.config import PreferenceConfig, Task
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.data.batches import by_length, num_predictions
from sgm_finetune.data.encoding import IGNORED
from sgm_finetune.method.preference import bradley_terry
from sgm_finetune.train.fast.head_loss import HeadLoss

Collator = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TestSet:
    """Encoded examples, and how a model is tested on them."""

    __test__: ClassVar[bool] = False  # pytest collects classes of this name

    encoded: Dataset
    """Rows with input_ids and labels."""
    collate: Collator
    task: Task
    batch_size: int
    """Examples in a forward pass."""
    labels: tuple[str, ...] = ()
    """Names of the classes or tags."""
    head_loss: HeadLoss | None = None
    """Computes a language model's loss without all of its logits (docs/method.md section 8)."""
    preference: PreferenceConfig | None = None
    """The loss of preferences (train/preference.py)."""
    is_base: bool = False
    """Whether the tested model is the base, with which the loss of preferences compares."""
    sources: tuple[str, ...] = ()
    """Names of the sources of a mixture."""


@dataclass
class Losses:
    """Sums over part of a data set."""

    total: float = 0.0
    """Loss in nats; of numbers, the squared error."""
    count: int = 0
    """Examples, predicted tokens or tagged words that the loss was summed over."""
    predictions: dict[int, Any] = field(default_factory=dict)
    """Index of an example -> its predicted class, vector of 0 and 1, number, tags of its words, or the scores of its
    two answers."""

    def __add__(self, other: Losses) -> Losses:
        """The sums over both parts."""
        return Losses(self.total + other.total, self.count + other.count, {**self.predictions, **other.predictions})


def summed_loss(logits: Tensor, labels: Tensor, task: Task) -> tuple[Tensor, int]:
    """Returns (sum, count) of a batch's loss; the sum is float32.

    The loss is the cross-entropy in nats over examples (one class), predicted tokens or tagged words. Where labels are
    vectors, it is the binary cross-entropy averaged over classes; where labels are numbers, the squared error. Rewards
    of chosen answers and then of rejected ones have that of each pair (eq. 48).

    >>> summed_loss(torch.tensor([[2.0]]), torch.tensor([5.0]), "sequence-classification")
    (tensor(9.), 1)
    """
    logits, count = logits.float(), num_predictions(labels, task)
    if task == "reward":
        return bradley_terry(*logits.squeeze(-1).chunk(2)).sum(), count
    if task == "sequence-classification":
        if labels.is_floating_point():
            if labels.dim() == 1:
                return (logits.squeeze(-1) - labels).square().sum(), count
            losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            return losses.mean(-1).sum(), count
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), count
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, count


def mean_reward_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean loss of the pairs of a batch whose answers `model` scores."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    total, count = summed_loss(model(**inputs).logits, batch["labels"], "reward")
    return total / count


def sum_losses(
    model: nn.Module,
    test_set: TestSet,
    indices: Sequence[int],
    progress: Progress = lambda done, total: None,
    num_batches: int = 0,
) -> Losses:
    """Returns the summed loss of `model`, in eval mode, on the examples `indices` of `test_set`.

    Sums are taken in float64 in the order given, so that the same weights on the same machine give the same digits.
    At least `num_batches` batches are computed, as in `over_batches`.
    """
    task, losses = test_set.task, Losses()

    def add(chosen: Sequence[int], batch: dict[str, Tensor]) -> None:
        # an encoder-decoder reads its labels as the decoder's input
        labels = batch["labels"] if task == "seq2seq-lm" else batch.pop("labels")
        if not chosen:
            _logits(model, batch)
            return
        if test_set.head_loss is not None:
            total, count = test_set.head_loss(model, batch, labels)
            losses.predictions.update(dict.fromkeys(chosen))
        else:
            logits = _logits(model, batch)
            total, count = summed_loss(logits, labels, task)
            losses.predictions.update(zip(chosen, _predictions(logits, labels, task), strict=True))
        losses.total += float(total)
        losses.count += count

    over_batches(model, test_set, indices, add, progress, num_batches)
    return losses


def log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-probability in nats of the labels of each sequence, (batch,), in float32; `logits` stand at their
    labels."""
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(labels).sum(-1)


def example_losses(
    model: nn.Module, test_set: TestSet, progress: Progress = lambda done, total: None
) -> list[tuple[float, int]]:
    """(summed loss in nats, number of predicted tokens) of each example of a language model's test set, in order."""
    is_decoder, found = test_set.task == "causal-lm", dict[int, tuple[float, int]]()

    def add(chosen: Sequence[int], batch: dict[str, Tensor]) -> None:
        # an encoder-decoder reads its labels as the decoder's input
        labels = batch.pop("labels") if is_decoder else batch["labels"]
        targets = labels[:, 1:] if is_decoder else labels
        if test_set.head_loss is not None:
            logs = test_set.head_loss.by_row(model, batch, labels)
        else:
            logits = _logits(model, batch)
            logs = log_probabilities(logits[:, :-1] if is_decoder else logits, targets)
        counts = (targets != IGNORED).sum(-1)
        found.update(zip(chosen, zip((-logs).tolist(), counts.tolist(), strict=True), strict=True))

    over_batches(model, test_set, by_length(test_set.encoded), add, progress)
    return [found[index] for index in range(len(test_set.encoded))]


def over_batches(
    model: nn.Module,
    test_set: TestSet,
    indices: Sequence[int],
    compute: Callable[[Sequence[int], dict[str, Tensor]], None],
    progress: Progress = lambda done, total: None,
    num_batches: int = 0,
) -> None:
    """Calls `compute(chosen, batch)` for each batch of the examples `indices`, in the order given and on the device of
    `model`, which is in eval mode; without gradients. The model's mode is restored.

    At least `num_batches` batches are computed: processes that share a sharded model compute together, so one with
    fewer batches computes its first example again, with no `chosen` ones.
    """
    device, size, was_training = next(model.parameters()).device, test_set.batch_size, model.training

    def batch_of(examples: Sequence[int]) -> dict[str, Tensor]:
        return {k: v.to(device) for k, v in test_set.collate([test_set.encoded[i] for i in examples]).items()}

    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: a sharded model would keep its tensors for training
            for first in range(0, len(indices), size):
                chosen = indices[first : first + size]
                compute(chosen, batch_of(chosen))
                progress(min(first + size, len(indices)), len(indices))
            for _ in range(num_batches - -(-len(indices) // size)):
                compute((), batch_of([indices[0] if indices else 0]))
    finally:
        model.train(was_training)


@torch.no_grad()
def check_packing(model: nn.Module, encoded: Dataset) -> None:
    """Raises UserError if packed examples see each other.

    The check compares the logits of the second example of a packed sequence with those that it has alone.
    """
    if "position_ids" not in encoded.column_names:
        return
    row = next((row for row in encoded if row["position_ids"].count(0) > 1), None)  # type: ignore[index, call-overload]
    if row is None:
        return
    positions = row["position_ids"]  # type: ignore[index, call-overload]
    begin = positions.index(0, 1)
    end = positions.index(0, begin + 1) if 0 in positions[begin + 1 :] else len(positions)
    device = next(model.parameters()).device
    ids, places = (torch.tensor([row[name][:end]], device=device) for name in ("input_ids", "position_ids"))  # type: ignore
    together = model(input_ids=ids, position_ids=places).logits[:, begin:].float()
    alone = model(input_ids=ids[:, begin:]).logits.float()
    if float((together - alone).norm()) > 0.05 * float(alone.norm()):
        raise UserError(
            f"data.packing=true: packed examples see each other in a {type(model).__name__}; take data.packing=false"
        )


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    try:
        return model(**batch).logits
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        what = f"A {type(model).__name__} cannot compute in its type ({first_line(error)})"
        raise UserError(f"{what}; try model.dtype=float32") from None


def _predictions(logits: Tensor, labels: Tensor, task: Task) -> list[Any]:
    """What the logits predict for each example; None for language models."""
    match task:
        case "sequence-classification" if labels.is_floating_point():
            return logits.squeeze(-1).tolist() if labels.dim() == 1 else (logits > 0).long().tolist()
        case "sequence-classification":
            return logits.argmax(-1).tolist()
        case "reward":
            return logits.squeeze(-1).view(2, -1).T.tolist()
        case "token-classification":
            rows = zip(logits.argmax(-1), labels != IGNORED, strict=True)
            return [row[tagged].tolist() for row, tagged in rows]
        case _:
            return [None] * len(labels)
