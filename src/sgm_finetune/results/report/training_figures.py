"""Figures by training step: losses, learning rate, speed, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from sgm_finetune.results.report.svg import INK, TRAIN, VALIDATION, plot, svg

TOKENS_PER_SECOND, MEMORY = "train_tokens_per_second", "train_peak_memory_bytes"
RUN_COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#b8a035", "#33a8c7", "#cc3311", "#8866cc")
_MAX_POINTS = 400
"""Largest number of points of a curve."""
_DENSE = 150
"""Of more training losses, there is a larger figure."""

Points = list[tuple[float, float]]
"""(step, value), by rising step."""


def training_figure(history: Sequence[Mapping[str, Any]], best_step: int | None) -> Markup | None:
    """Draws training loss, its running mean, and validation losses. Returns None if no loss was logged."""
    return _losses_figure(history, best_step, "training", "Loss by step", 440, 270, _MAX_POINTS)


def large_figure(history: Sequence[Mapping[str, Any]], best_step: int | None) -> Markup | None:
    """Draws the same wider, with two pixels for a step. Returns None where the small figure shows every step well."""
    number = len(points_of(history, "loss"))
    if number <= _DENSE:
        return None
    width = min(max(1000, 2 * number), 4000)
    return _losses_figure(history, best_step, "training-large", "Loss by step, larger", width, 380, width // 2)


def _losses_figure(
    history: Sequence[Mapping[str, Any]],
    best_step: int | None,
    name: str,
    title: str,
    width: int,
    height: int,
    max_points: int,
) -> Markup | None:
    train, validation = points_of(history, "loss"), points_of(history, "eval_loss")
    if not train and not validation:
        return None

    def draw(figure: Figure) -> None:
        axes = plot(figure, width, height, "step", x_ticks=max(6, width // 150))
        if best_step is not None:
            axes.axvline(best_step, color=INK, linewidth=1, linestyle=(0, (2, 3)))
        thinned = thin(train, max_points)
        smooth = running_mean(thinned)
        if thinned:
            faint = 0.35 if smooth else 1.0
            mark = "o" if len(thinned) == 1 else ""
            axes.plot(*zip(*thinned, strict=True), color=TRAIN, linewidth=1.2, alpha=faint, marker=mark)
        if smooth:
            axes.plot(*zip(*smooth, strict=True), color=TRAIN, linewidth=2.2)
        if validation:
            axes.plot(*zip(*thin(validation, max_points), strict=True), color=VALIDATION, linewidth=1.2, marker="o",
                      markersize=7 if len(validation) < 50 else 3)  # fmt: skip

    return svg(name, title, width, height, draw)


def step_figure(
    history: Sequence[Mapping[str, Any]], key: str, title: str, scale: float = 1.0, expected: float | None = None
) -> Markup | None:
    """Draws one quantity times `scale`, from 0 up, and `expected` as a dashed line. Returns None if none was logged."""
    points = [(step, value * scale) for step, value in thin(points_of(history, key, beside="loss"))]
    if not points:
        return None
    width, height = 330, 170

    def draw(figure: Figure) -> None:
        axes = plot(figure, width, height, "step", y_ticks=4)
        axes.plot(*zip(*points, strict=True), color=TRAIN, linewidth=1.8, marker="o" if len(points) == 1 else "")
        if expected is not None:
            axes.axhline(expected * scale, color=VALIDATION, linewidth=1.4, linestyle=(0, (5, 3)))
        line = expected * scale if expected is not None else 0.0
        axes.set_ylim(0, 1.12 * max(line, *(value for _, value in points), 1e-30))

    return svg(key.replace("_", "-"), title, width, height, draw)


def rates_figure(trials: Mapping[str, Any] | None) -> Markup | None:
    """Draws the losses of the trials of training.learning_rate=auto over the rate, with a line at the lowest point.
    Returns None if there were none."""
    pairs = zip(trials["rates"], trials["losses"], strict=True) if trials else ()
    points = sorted((rate, loss) for rate, loss in pairs if loss is not None)
    if not points or trials is None:
        return None
    width, height = 330, 170

    def draw(figure: Figure) -> None:
        axes = plot(figure, width, height, "learning rate", y_ticks=4)
        axes.set_xscale("log")
        axes.set_xticks([rate for rate, _ in points], [f"{rate:.3g}" for rate, _ in points])
        axes.minorticks_off()
        axes.axvline(trials["best"], color=INK, linewidth=1, linestyle=(0, (2, 3)))
        axes.plot(*zip(*points, strict=True), color=VALIDATION, linewidth=1.8, marker="o", markersize=6)

    return svg("rates", "Loss of short trials by learning rate", width, height, draw)


def compared_losses_figure(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], key: str, title: str
) -> Markup | None:
    """Draws one curve for each run, (name, history), in `RUN_COLOURS`; the training loss also as its running mean."""
    width, height = 440, 270
    curves = [(index, thin(points_of(history, key))) for index, (_, history) in enumerate(runs)]
    curves = [(index, points) for index, points in curves if points]
    if not curves:
        return None

    def draw(figure: Figure) -> None:
        axes = plot(figure, width, height, "step")
        for index, points in curves:
            colour = RUN_COLOURS[index % len(RUN_COLOURS)]
            smooth = running_mean(points) if key == "loss" else []
            mark = "o" if key == "eval_loss" or len(points) == 1 else ""
            if smooth:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, alpha=0.25)
            axes.plot(*zip(*(smooth or points), strict=True), color=colour, linewidth=2, marker=mark, markersize=5)

    return svg(key.replace("_", "-"), title, width, height, draw)


def points_of(history: Sequence[Mapping[str, Any]], key: str, beside: str | None = None) -> Points:
    """Returns the finite values of `key` in Transformers' log history, only from entries that also hold `beside`."""
    entries = [entry for entry in history if beside is None or beside in entry]
    pairs = [(entry.get("step"), entry.get(key)) for entry in entries]
    return [
        (float(step), float(value))
        for step, value in pairs
        if step is not None and value is not None and math.isfinite(float(value))
    ]


def thin(points: Points, max_points: int = _MAX_POINTS) -> Points:
    """Returns at most `max_points` points, each the mean of equally many neighbours."""
    size = -(-len(points) // max_points) if points else 1
    return [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def running_mean(points: Points) -> Points:
    """Returns the mean over a centred window of about a tenth of the run; empty for fewer than 20 points."""
    if len(points) < 20:
        return []
    reach = max(2, len(points) // 20)
    means = []
    for index, (step, _) in enumerate(points):
        _, mean = _mean(points[max(0, index - reach) : index + reach + 1])
        means.append((step, mean))
    return means


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)
