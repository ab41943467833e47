"""The metrics of preferences: whether a model gives good answers the higher probability or score, and by how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.results.bootstrap import Sums
from sgm_finetune.train.preference import Scores, summed_loss


def preference_metrics(scores: Scores, settings: PreferenceConfig, is_base: bool) -> dict[str, Any]:
    """Returns the metrics of a model on examples of which it has said `scores`.

    - loss: the mean loss of the examples.
    - preference_accuracy: the share of pairs in which the chosen answer has the higher log-probability a token. It
      needs no base, so that it is known before training too. Of single answers with a label: the share of all pairs of
      a good and a bad one.
    - preference_margin: the mean difference of these log-probabilities, in nats a token.
    - reward_accuracy, reward_margin: the same of the implicit rewards β (log π − log π₀), which are summed over tokens.
      The base itself has none.
    - perplexity: of the chosen or good answers.
    - chosen_tokens, rejected_tokens: mean numbers of tokens of the answers in the data.

    `intervals` has the 95 % intervals of accuracies and margins.
    """
    total, count = summed_loss(scores, settings)
    metrics: dict[str, Any] = {"loss": total / count, "num_examples": count, "intervals": {}}
    judged = [preference_sums(scores)]
    if settings.has_reference and not is_base:
        judged.append(_verdict_sums("reward", (settings.strength * scores.ratios).numpy(), _good(scores)))
    for sums in judged:
        metrics |= sums.values()
        metrics["intervals"] |= sums.intervals()
    good = _good(scores)
    logs, lengths = scores.log_probabilities.numpy(), scores.num_tokens.numpy()
    chosen = slice(None) if good is None else good
    if lengths[0][chosen].size:
        metrics["perplexity"] = math.exp(min(-logs[0][chosen].sum() / lengths[0][chosen].sum(), 700.0))
        metrics["chosen_tokens"] = float(lengths[0][chosen].mean())
    rejected = lengths[1] if good is None else lengths[0][~good]
    if rejected.size:
        metrics["rejected_tokens"] = float(rejected.mean())
    return metrics


def reward_metrics(scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Returns the metrics of a reward model from its scores of the chosen and the rejected answer of each example.

    - reward_accuracy: the share of pairs in which the chosen answer has the higher score.
    - reward_margin: the mean difference of the two scores.

    `intervals` has their 95 % intervals.
    """
    sums = reward_sums(scores)
    return {**sums.values(), "intervals": sums.intervals()}


def reward_sums(scores: Sequence[Sequence[float]]) -> Sums:
    """reward_accuracy and reward_margin as functions of sums over examples."""
    chosen, rejected = np.asarray(scores, dtype=float).T
    return _pair_sums(chosen, rejected, ("reward_accuracy", "reward_margin"))


def preference_sums(scores: Scores) -> Sums:
    """preference_accuracy and preference_margin as functions of sums over examples."""
    return _verdict_sums("preference", scores.per_token.numpy(), _good(scores))


def _good(scores: Scores) -> np.ndarray | None:
    return None if scores.desirable is None else scores.desirable.numpy()


def _verdict_sums(name: str, values: np.ndarray, good: np.ndarray | None) -> Sums:
    """The accuracy and the margin `name` of values: (2, examples), or of those of single answers, `good` or not."""
    names = f"{name}_accuracy", f"{name}_margin"
    return _pair_sums(values[0], values[1], names) if good is None else _label_sums(values[0], good, names)


def _pair_sums(chosen: np.ndarray, rejected: np.ndarray, names: tuple[str, str]) -> Sums:
    """The share of pairs with chosen > rejected, an equal pair counting half, and the mean difference."""
    accuracy, margin = names
    margins = chosen - rejected
    rows = np.stack([np.ones_like(margins), (margins > 0) + 0.5 * (margins == 0), margins], axis=1)
    return Sums(
        rows, lambda sums: {accuracy: sums[:, 1] / sums[:, 0], margin: sums[:, 2] / sums[:, 0]}, shares=(accuracy,)
    )


def _label_sums(values: np.ndarray, good: np.ndarray, names: tuple[str, str]) -> Sums:
    """The share of all pairs of a good and a bad answer in which the good one has the larger value (the area under the
    ROC curve), and the difference of the two means. Both are missing without answers of both kinds."""
    order = np.argsort(values, kind="stable")
    sorted_values, sorted_good = values[order], good[order]

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        weights = weights[:, order]
        with np.errstate(invalid="ignore", divide="ignore"):
            bad = weights * ~sorted_good
            below = np.cumsum(bad, axis=1)
            num_good, num_bad = (weights * sorted_good).sum(1), bad.sum(1)
            area = (weights * sorted_good * below).sum(1) / (num_good * num_bad)
            margin = (weights * sorted_good) @ sorted_values / num_good - bad @ sorted_values / num_bad
        return dict(zip(names, (np.nan_to_num(area, nan=0.5), np.nan_to_num(margin)), strict=True))

    has_both = good.any() and not good.all()
    return Sums(np.eye(len(values)), statistics if has_both else lambda weights: {})
