"""The loss of preferences: from a model and a batch of pairs to one number (docs/method.md section 10).

A batch has two rows an example (data/batches.py). What the base model says of them is computed once, before there is an
adapter, and kept in the data sets; so a step needs no second model and no second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset, Value
from torch import Tensor, nn

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.data.batches import PAIR_COLUMNS, by_length
from sgm_finetune.data.encoding import IGNORED, REFERENCES
from sgm_finetune.method import preference
from sgm_finetune.train.fast.head_loss import HeadLoss
from sgm_finetune.train.losses import Progress, TestSet, log_probabilities, over_batches


@dataclass(frozen=True)
class Scores:
    """What a model says of examples. The first axis has the answer and the other one, or the answer alone."""

    log_probabilities: Tensor
    """(2, examples), in nats, summed over the tokens of an answer."""
    num_tokens: Tensor
    """(2, examples)."""
    reference: Tensor | None
    """The base model's log-probabilities, (2, examples)."""
    desirable: Tensor | None
    """Whether the answer is good, (examples,); None for pairs."""

    @property
    def per_token(self) -> Tensor:
        return self.log_probabilities / self.num_tokens

    @property
    def ratios(self) -> Tensor:
        """How much more probable an answer is than under the base model, in nats, (2, examples)."""
        assert self.reference is not None
        return self.log_probabilities - self.reference


def example_losses(scores: Scores, settings: PreferenceConfig, moved: Tensor | float = 0.0) -> Tensor:
    """The loss of each example, (examples,). `moved` is KTO's `divergence`; 0 is right for the base model itself."""
    beta = settings.strength
    match settings.loss:
        case "kto":
            assert scores.desirable is not None
            weights = settings.desirable_weight, settings.undesirable_weight
            return preference.kto(scores.ratios[0], scores.desirable, moved, beta, weights)
        case "orpo" | "simpo":
            chosen, rejected = scores.per_token
            if settings.loss == "orpo":
                return preference.orpo(chosen, rejected, beta)
            return preference.simpo(chosen, rejected, beta, settings.gamma)
        case "ipo":
            chosen, rejected = scores.ratios / scores.num_tokens
            return preference.ipo(chosen, rejected, beta)
        case "dpo" | "apo_zero" | "apo_down":
            chosen, rejected = scores.ratios
            return _OF_RATIOS[settings.loss](chosen, rejected, beta)


_OF_RATIOS = {"dpo": preference.dpo, "apo_zero": preference.apo_zero, "apo_down": preference.apo_down}


@dataclass(frozen=True)
class PreferenceLoss:
    """Computes the loss of preferences that `settings` name."""

    settings: PreferenceConfig
    head_loss: HeadLoss | None
    """Computes log-probabilities without the logits of a whole batch; None: from the logits."""

    def mean(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of the examples of a batch. KTO's `moved` is in the batch, or 0; its other answers take no
        gradient, so they are not computed here."""
        if self.settings.has_pairs:
            return example_losses(self.scores(model, batch), self.settings).mean()
        half = {name: x if name == "moved" else x.chunk(2)[0] for name, x in batch.items()}
        return example_losses(self._scores(model, half, 1), self.settings, batch.get("moved", 0.0)).mean()

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Scores:
        return self._scores(model, batch, 2)

    def moved(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The ratios of the other answers, without gradient, (examples,)."""
        half = {name: x.chunk(2)[1] for name, x in batch.items()}
        with torch.no_grad():
            return self._scores(model, half, 1).ratios[0]

    def _scores(self, model: nn.Module, batch: Mapping[str, Tensor], num_rows: int) -> Scores:
        labels = batch["labels"]
        inputs = {name: x for name, x in batch.items() if name not in (*PAIR_COLUMNS, "labels")}
        if self.head_loss is not None:
            found = self.head_loss.by_row(model, inputs, labels)
        else:
            found = log_probabilities(model(**inputs).logits[:, :-1], labels[:, 1:])
        reference, desirable = batch.get("reference"), batch.get("desirable")
        return Scores(
            found.view(num_rows, -1),
            (labels[:, 1:] != IGNORED).sum(-1).view(num_rows, -1),
            None if reference is None else reference.view(num_rows, -1),
            None if desirable is None else desirable.view(num_rows, -1)[0],
        )


def score(
    model: nn.Module,
    test_set: TestSet,
    indices: Sequence[int],
    progress: Progress = lambda done, total: None,
    num_batches: int = 0,
) -> Scores:
    """What `model`, in eval mode, says of the examples `indices` of `test_set`, in float64 on the CPU.

    At least `num_batches` batches are computed, as in `over_batches`.
    """
    loss = PreferenceLoss(test_set.preference or PreferenceConfig(), test_set.head_loss)
    parts: list[Scores] = []

    def add(chosen: Sequence[int], batch: dict[str, Tensor]) -> None:
        scores = loss.scores(model, batch)
        if chosen:
            parts.append(scores)

    over_batches(model, test_set, indices, add, progress, num_batches)

    return joined(parts)


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores one after another, in float64 on the CPU."""

    def together(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        if any(value is None for value in values):
            return None
        found = torch.cat(values, dim=-1).cpu() if values else torch.zeros(2, 0)
        return found if found.dtype == torch.bool else found.double()

    found, counts = together("log_probabilities"), together("num_tokens")
    assert found is not None
    assert counts is not None
    return Scores(found, counts, together("reference"), together("desirable"))


def summed_loss(
    scores: Scores, settings: PreferenceConfig, add: Callable[..., Sequence[float]] = lambda *values: values
) -> tuple[float, int]:
    """(sum, number) of the examples' losses. `add` sums numbers over processes; each has a part of `scores`."""
    number, moved = scores.log_probabilities.shape[1], 0.0
    if not settings.has_pairs:
        total, count = add(float(scores.ratios[1].sum()), float(number))
        moved = max(0.0, total / count)
    total, count = add(float(example_losses(scores, settings, moved).sum()) if number else 0.0, float(number))
    return total, int(count)


def reference_columns(
    model: nn.Module, test_set: TestSet, progress: Progress = lambda done, total: None
) -> tuple[list[float], list[float]]:
    """What `model`, the base, says of both answers of each example, in the order of the data: REFERENCES."""
    order = by_length(test_set.encoded)
    scores = score(model, test_set, order, progress)
    places = torch.tensor(order).argsort()
    first, second = (row[places].tolist() for row in scores.log_probabilities)
    return first, second


def add_reference(encoded: Dataset, columns: Sequence[Sequence[float]]) -> Dataset:
    """`encoded` with the columns REFERENCES."""
    for name, values in zip(REFERENCES, columns, strict=True):
        encoded = encoded.add_column(name, list(values), feature=Value("float32"))  # type: ignore[call-arg]
    return encoded
