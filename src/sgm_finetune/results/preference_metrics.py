"""The metrics of preferences: whether a model gives good answers the higher probability or score, and by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sgm_finetune.base.config import PreferenceConfig
from sgm_finetune.results.bootstrap import bootstrap
from sgm_finetune.results.intervals import wilson
from sgm_finetune.train.preference import Scores, summed_loss

_Measure = Callable[[np.ndarray], dict[str, Any]]


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
    judged: list[tuple[str, Any]] = [("preference", scores.per_token)]
    if settings.has_reference and not is_base:
        judged.append(("reward", settings.strength * scores.ratios))
    good = None if scores.desirable is None else scores.desirable.numpy()
    for name, values in judged:
        values = values.numpy()
        found, intervals = _of_pairs(*values) if good is None else _of_labels(values[0], good)
        metrics |= {f"{name}_{key}": value for key, value in found.items()}
        metrics["intervals"] |= {f"{name}_{key}": value for key, value in intervals.items()}
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
    found, intervals = _of_pairs(*np.asarray(scores, dtype=float).T)
    return {
        **{f"reward_{key}": value for key, value in found.items()},
        "intervals": {f"reward_{key}": value for key, value in intervals.items()},
    }


def _of_pairs(chosen: np.ndarray, rejected: np.ndarray) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The share of pairs with chosen > rejected, an equal pair counting half, and the mean difference."""
    margins = chosen - rejected
    share = float(np.mean((margins > 0) + 0.5 * (margins == 0)))
    rows = np.stack([np.ones_like(margins), margins], axis=1)
    margin = bootstrap(rows, lambda sums: {"margin": sums[:, 1] / sums[:, 0]})
    found = {"accuracy": share, "margin": float(margins.mean())}
    return found, {"accuracy": list(wilson(share, len(margins))), **margin}


def _of_labels(values: np.ndarray, good: np.ndarray) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The share of all pairs of a good and a bad answer in which the good one has the larger value (the area under the
    ROC curve), and the difference of the two means. Both are empty without answers of both kinds."""
    if good.all() or not good.any():
        return {}, {}
    order = np.argsort(values, kind="stable")
    values, good = values[order], good[order]

    def statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            bad = weights * ~good
            below = np.cumsum(bad, axis=1)
            num_good, num_bad = (weights * good).sum(1), bad.sum(1)
            area = (weights * good * below).sum(1) / (num_good * num_bad)
            margin = (weights * good) @ values / num_good - bad @ values / num_bad
        return {"accuracy": np.nan_to_num(area, nan=0.5), "margin": np.nan_to_num(margin)}

    found = {name: float(value[0]) for name, value in statistics(np.ones((1, len(values)))).items()}
    return found, bootstrap(np.eye(len(values)), statistics)
