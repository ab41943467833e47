"""Figures of a sweep: the losses of its tries, by number, by the value of each key, and in the course of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sgm_finetune.base.search_space import Choices, Range
from sgm_finetune.results.report.svg import ALONE, INK, TRAIN, VALIDATION, plot, svg
from sgm_finetune.train.tries import Try

_WIDTH, _HEIGHT = 440, 250


def tries_figure(tries: Sequence[Try], best: Try) -> Markup:
    """Draws the loss of each try in their order, and the lowest one so far."""
    complete = [one for one in tries if one.state == "complete"]

    def draw(figure: Figure) -> None:
        axes = plot(figure, _WIDTH, _HEIGHT, "try")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        lowest = list(accumulate((one.loss or 0.0 for one in complete), min))
        axes.step([one.number for one in complete], lowest, where="post", color=VALIDATION, linewidth=1.6)
        _draw_points(axes, tries, best, lambda one: one.number)

    return svg("sweep-tries", "Validation loss by try", _WIDTH, _HEIGHT, draw)


def key_figure(part: Choices | Range, tries: Sequence[Try], best: Try, name: str) -> Markup:
    """Draws the loss of each try over its value of one key."""

    def draw(figure: Figure) -> None:
        axes = plot(figure, _WIDTH, _HEIGHT, part.key)
        if isinstance(part, Choices):
            values = part.values
            axes.set_xticks(range(len(values)), [_short(value) for value in values])
            axes.set_xlim(-0.5, len(values) - 0.5)
            _draw_points(axes, tries, best, lambda one: values.index(one.settings[part.key]))
            return
        _draw_points(axes, tries, best, lambda one: float(one.settings[part.key]))
        if part.log:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(ticks := _log_ticks(part), [f"{tick:.3g}" for tick in ticks])
            margin = (part.high / part.low) ** 0.05
            axes.set_xlim(part.low / margin, part.high * margin)  # the whole range, wherever the tries are

    return svg(name, f"Validation loss by {part.key}", _WIDTH, _HEIGHT, draw)


def course_figure(tries: Sequence[Try], best: Try) -> Markup:
    """Draws the validation losses of each try in the course of its training; the best try in colour."""

    def draw(figure: Figure) -> None:
        axes = plot(figure, _WIDTH, _HEIGHT, "% of the steps")
        for one in sorted(tries, key=lambda one: one == best):
            points = [(found.percent, found.loss) for found in one.validations]
            if points:
                colour, width = (VALIDATION, 2.4) if one == best else (ALONE, 1.2)
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, marker="o", markersize=2 * width)

    return svg("sweep-course", "Validation loss in the course of the training", _WIDTH, _HEIGHT, draw)


def _draw_points(axes: Axes, tries: Sequence[Try], best: Try, place: Callable[[Try], float]) -> None:
    """Draws a point for each try that has a loss: full where it is complete, hollow where it was stopped."""
    for one in tries:
        if one.loss is not None:
            fill = TRAIN if one.state == "complete" else "none"
            axes.plot(place(one), one.loss, "o", color=TRAIN, markerfacecolor=fill, markersize=6)
    axes.plot(place(best), best.loss or 0.0, "o", color=INK, markerfacecolor="none", markersize=12)


def _log_ticks(part: Range) -> list[float]:
    """Its ends and their geometric mean."""
    return [part.low, (part.low * part.high) ** 0.5, part.high]


def _short(value: str) -> str:
    return value if len(value) <= 14 else f"{value[:13]}…"
