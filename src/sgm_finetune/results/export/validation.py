"""How well a model predicts some of the run's validation data, and whether an export does it worse.

The models are compared example by example. An example is as hard for the one as for the other, so the differences vary
far less than the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from scipy.stats import t as student
from transformers import PreTrainedModel

from sgm_finetune.base.device import has_gpu
from sgm_finetune.data.encoding import IGNORED, sequence_lengths
from sgm_finetune.data.questions import spread
from sgm_finetune.train.fast.head_loss import find_head_loss
from sgm_finetune.train.losses import Progress, TestSet, sum_losses

MOST_EXAMPLES, MOST_TOKENS = 128, 2**14
"""The most examples that are scored, and the most tokens in them."""
MOST_OPERATIONS = 2 * 10**13
"""About the most operations of a forward pass over all of them without a GPU, at two a parameter and token: minutes."""
ALLOWED_RISE = {
    "float32": 0.005, "float16": 0.005, "bfloat16": 0.02, "q8_0": 0.02, "q6_k": 0.03, "q5_k_m": 0.1, "q4_k_m": 0.1,
    "nf4": 0.3, "int4": 0.2,
}  # fmt: skip
"""Type of an export's matrices -> how much its validation loss may rise, in nats; of a squared error, as a share."""
ALLOWED_FALL = 0.01
"""How much the accuracy of an export may fall."""


@dataclass(frozen=True)
class Validation:
    """The validation examples on which models are compared."""

    examples: TestSet
    num_available: int
    """The number of validation examples that the run has."""


@dataclass(frozen=True)
class Scores:
    """What a model reached on each example."""

    losses: np.ndarray
    """(examples,), float64: the loss, summed over the predictions of an example."""
    counts: np.ndarray
    """(examples,): the number of its predictions."""
    right: np.ndarray | None = None
    """(examples,): how many of them are right; None where the task has no right and wrong."""
    is_squared: bool = False
    """Whether the loss is a squared error; else it is in nats."""

    @property
    def loss(self) -> float:
        """The mean loss of a prediction."""
        return float(self.losses.sum() / self.counts.sum())

    @property
    def accuracy(self) -> float | None:
        return None if self.right is None else float(self.right.sum() / self.counts.sum())


@dataclass(frozen=True)
class Difference:
    """By how much a mean over the predictions of two models differs."""

    mean: float
    standard_error: float | None
    """None: there is one example."""
    margin: float | None
    """Half the width of the 95 % interval of `mean`, by Student's t; None: there is one example."""

    def exceeds(self, allowed: float) -> bool:
        """Whether it is larger than chance explains, and than is allowed. NaN counts as larger."""
        margin = np.inf if self.margin is None else self.margin
        return not self.mean <= max(margin, allowed)


@dataclass(frozen=True)
class ScoreCheck:
    """How well an export predicts validation data, beside the model that was trained."""

    loss: float
    loss_trained: float
    rise: Difference
    """How much the loss of the export is higher."""
    allowed_rise: float
    accuracy: float | None
    accuracy_trained: float | None
    fall: Difference | None
    """How much the accuracy of the export is lower; None where the task has none."""
    num_examples: int
    num_available: int

    def passes(self) -> bool:
        """Whether the export is not worse: neither loss nor accuracy changed beyond noise and what is allowed."""
        return not self.rise.exceeds(self.allowed_rise) and not (self.fall and self.fall.exceeds(ALLOWED_FALL))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe(self) -> str:
        """One line: loss and accuracy of the export, and of the model that was trained."""
        error = "" if self.rise.standard_error is None else f" ± {self.rise.standard_error:.4f}"
        parts = [f"loss {self.loss:.4f}, as trained {self.loss_trained:.4f} ({self.rise.mean:+.4f}{error})"]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.4f}, as trained {self.accuracy_trained:.4f}")
        return " · ".join([*parts, self.describe_examples()])

    def describe_examples(self) -> str:
        return f"{self.num_examples:,} of {self.num_available:,} validation examples"

    def describe_drop(self) -> str:
        """What is worse than allowed, for a message."""
        what, found, expected, change, allowed = "loss", self.loss, self.loss_trained, self.rise, self.allowed_rise
        if self.fall is not None and not change.exceeds(allowed):
            what, found, expected = "accuracy", self.accuracy, self.accuracy_trained
            change, allowed = self.fall, ALLOWED_FALL
        margin = "" if change.margin is None else f" ± {change.margin:.4f}"
        return (
            f"its {what} on {self.describe_examples()} is {found:.4f} instead of {expected:.4f}, worse by "
            f"{change.mean:.4f}{margin} (at most {allowed:.4f} is allowed)"
        )


def most_tokens(num_parameters: int) -> int:
    """Returns the most tokens on which a model of this size is scored on this machine."""
    return MOST_TOKENS if has_gpu() else min(MOST_TOKENS, MOST_OPERATIONS // (2 * num_parameters))


def choose_examples(encoded: Dataset, limit: int) -> Dataset:
    """Returns at most `MOST_EXAMPLES` examples, evenly spread over a data set, with at most `limit` tokens together;
    one example at least."""
    lengths = sequence_lengths(encoded)
    number = min(MOST_EXAMPLES, len(encoded))
    chosen = spread(range(len(encoded)), number)
    while number > 1 and sum(lengths[i] for i in chosen) > limit:
        number -= max(1, number // 8)
        chosen = spread(range(len(encoded)), number)
    return encoded.select(chosen)


def score(
    model: PeftModel | PreTrainedModel, validation: Validation, progress: Progress = lambda done, total: None
) -> Scores:
    """Returns what `model` reaches on each example. A language model's loss comes in parts where that is possible,
    without all of its logits."""
    examples, labels = validation.examples, list(validation.examples.encoded["labels"])
    if examples.task == "causal-lm":
        ids = torch.tensor([examples.encoded[0]["input_ids"]], device=model.device)
        examples = replace(examples, head_loss=find_head_loss(model, {"input_ids": ids}))
    losses, counts, right = [], [], []
    for i, label in enumerate(labels):
        found = sum_losses(model, examples, [i])
        losses.append(found.total)
        counts.append(found.count)
        right.append(num_right(found.predictions[i], label, examples.task))
        progress(i + 1, len(labels))
    return Scores(
        np.array(losses),
        np.array(counts),
        None if right[0] is None else np.array(right),
        is_squared=examples.task == "sequence-classification" and isinstance(labels[0], float),
    )


def num_right(predicted: Any, truth: Any, task: str) -> int | None:
    """How many predictions of an example are right; None where the task has no right and wrong."""
    if task == "token-classification":
        return sum(a == b for a, b in zip(predicted, (tag for tag in truth if tag != IGNORED), strict=True))
    if task != "sequence-classification" or isinstance(truth, float):
        return None
    return int(list(predicted) == [int(x) for x in truth] if isinstance(truth, Sequence) else predicted == truth)


def compare_scores(found: Scores, expected: Scores, types: Sequence[str], num_available: int) -> ScoreCheck:
    """Compares the scores of an export with those of the trained model. `types` are those in which either is stored or
    computed, keys of ALLOWED_RISE: the coarsest decides what is allowed."""
    allowed = max(ALLOWED_RISE[name] for name in types) * (expected.loss if expected.is_squared else 1.0)
    has_right = found.right is not None and expected.right is not None
    return ScoreCheck(
        loss=found.loss,
        loss_trained=expected.loss,
        rise=paired_difference(found.losses, expected.losses, expected.counts),
        allowed_rise=allowed,
        accuracy=found.accuracy if has_right else None,
        accuracy_trained=expected.accuracy if has_right else None,
        fall=paired_difference(expected.right, found.right, expected.counts) if has_right else None,  # type: ignore
        num_examples=len(expected.losses),
        num_available=num_available,
    )


def paired_difference(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> Difference:
    """Returns by how much the mean of `first` is above that of `second`: sums over the predictions of each example, of
    which there are `counts`.

    The mean is Σd/Σn with d = first − second and n predictions. Its standard error is that of a ratio:
    √(N/(N−1) Σ(d − mean·n)²) / Σn.

    >>> paired_difference(np.array([3.0, 5.0]), np.array([2.0, 2.0]), np.array([1, 1])).mean
    2.0
    """
    difference, total, number = first - second, counts.sum(), len(counts)
    mean = float(difference.sum() / total)
    if number < 2:
        return Difference(mean, None, None)
    spread = float(np.square(difference - mean * counts).sum())
    error = float(np.sqrt(number / (number - 1) * spread) / total)
    return Difference(mean, error, error * float(student.ppf(0.975, number - 1)))
