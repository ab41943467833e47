"""The report's figures as inline SVG, drawn by matplotlib.

One unit of a figure is one CSS pixel at its natural size. Ink and lines are drawn in stand-in colours that become CSS
variables of the page, so that one drawing serves light and dark; text stays text in the page's own font.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import matplotlib
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sgm_finetune.method.plan import Plan, PlannedMatrix
from sgm_finetune.method.spectrum import MatrixScan

GROUP_COLOURS = (
    "#4477aa", "#ee7733", "#228833", "#aa3377", "#ccbb44", "#33a8c7", "#cc3311", "#8866cc", "#997755", "#009988",
)  # fmt: skip
"""Of the groups of one column or row, in turn; each cell also has its group's number."""

SNR_COLOURS = "viridis"

_INK, _LINE, _ALONE, _TRAIN, _VALIDATION = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {_INK: "ink", _LINE: "line", _ALONE: "alone", _TRAIN: "train", _VALIDATION: "validation"}
_MAX_POINTS = 400


Matrix = TypeVar("Matrix", PlannedMatrix, MatrixScan)


@dataclass(frozen=True)
class Grid(Generic[Matrix]):
    """The model as a table of layers x kinds; a cell holds every matrix that stands there."""

    kinds: tuple[str, ...]
    layers: tuple[int | None, ...]
    cells: Mapping[tuple[int, int], Sequence[Matrix]]
    """(layer's place, kind's place) -> matrices."""


def grid_of(matrices: Sequence[Matrix], kinds: Sequence[str] | None = None) -> Grid[Matrix]:
    """Kinds in the order given, else in the model's; layers rising; matrices that belong to no layer come last."""
    columns = tuple(kinds or dict.fromkeys(matrix.kind for matrix in matrices))
    found = {matrix.layer for matrix in matrices}
    layers = (*sorted(layer for layer in found if layer is not None), *([None] if None in found else []))
    cells: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        cells.setdefault((layers.index(matrix.layer), columns.index(matrix.kind)), []).append(matrix)
    return Grid(columns, layers, cells)


def group_numbers(plan: Plan) -> dict[str, int]:
    """Group name -> its number, from 0, within its column of the grid (scope "layers") or its row ("activation")."""
    place = {m.name: m.kind if plan.settings.scope == "layers" else m.layer for m in plan.matrices}
    counts: Counter[str | int | None] = Counter()
    numbers = {}
    for group in plan.groups:
        where = place[group.members[0]]
        numbers[group.name] = counts[where]
        counts[where] += 1
    return numbers


def group_colour(number: int) -> str:
    return GROUP_COLOURS[number % len(GROUP_COLOURS)]


def groups_figure(plan: Plan) -> Markup:
    """Layers x kinds: coloured and numbered by group, grey where trained alone, empty where not trained."""
    numbers = group_numbers(plan)

    def look(matrix: PlannedMatrix) -> tuple[str, str]:
        if matrix.group is not None:
            number = numbers[matrix.group]
            return group_colour(number), str(number)
        return (_ALONE if matrix.selected else "none"), ""

    return _grid_figure(grid_of(plan.matrices), "groups", "Which matrices share a factor", look)


def snr_range(plan: Plan) -> tuple[float, float] | None:
    """(smallest, largest) SNR in dB, or None where nothing was scanned."""
    levels = [matrix.snr_db for matrix in plan.matrices if matrix.snr_db is not None]
    return (min(levels), max(levels)) if levels else None


def snr_figure(plan: Plan) -> Markup | None:
    """Layers x kinds: the signal-to-noise ratio of each matrix in dB; None where nothing was scanned."""
    span = snr_range(plan)
    if span is None:
        return None
    low, high = span
    colours = colormaps[SNR_COLOURS]

    def look(matrix: PlannedMatrix) -> tuple[str, str]:
        if matrix.snr_db is None:
            return "none", ""
        share = (matrix.snr_db - low) / (high - low) if high > low else 0.5
        return to_hex(colours(share)), f"{round(matrix.snr_db, 1) + 0.0:.1f}".replace("-", "−")

    return _grid_figure(grid_of(plan.matrices), "snr", "Signal-to-noise ratio of each matrix in dB", look)


def training_figure(history: Sequence[Mapping[str, Any]], best_step: int | None) -> Markup | None:
    """Training loss per step, its running mean, and the validation losses; None where no loss was logged."""
    train, validation = loss_points(history, "loss"), loss_points(history, "eval_loss")
    if not train and not validation:
        return None
    width, height, left, bottom = 440, 270, 46, 42

    def draw(figure: Figure) -> None:
        axes = figure.add_axes(
            (left / width, bottom / height, (width - left - 10) / width, (height - bottom - 10) / height)
        )
        axes.patch.set_visible(False)
        axes.grid(axis="y", color=_LINE, linewidth=1)
        axes.set_axisbelow(True)
        for name, spine in axes.spines.items():
            spine.set_visible(name == "bottom")
            spine.set_color(_LINE)
        axes.tick_params(length=0, labelsize=13, labelcolor=_INK, pad=5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("step", fontsize=13, color=_INK, labelpad=3)
        if best_step is not None:
            axes.axvline(best_step, color=_INK, linewidth=1, linestyle=(0, (2, 3)))
        thinned = _thin(train)
        smooth = running_mean(thinned)
        if thinned:
            faint = 0.35 if smooth else 1.0
            mark = "o" if len(thinned) == 1 else ""
            axes.plot(*zip(*thinned, strict=True), color=_TRAIN, linewidth=1.2, alpha=faint, marker=mark)
        if smooth:
            axes.plot(*zip(*smooth, strict=True), color=_TRAIN, linewidth=2.2)
        if validation:
            axes.plot(*zip(*validation, strict=True), color=_VALIDATION, linewidth=1.2, marker="o", markersize=7)

    return _svg("training", "Loss by step", width, height, draw)


def loss_points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every finite entry of `key` in Transformers' log history."""
    pairs = [(entry.get("step"), entry.get(key)) for entry in history]
    return [(float(s), float(v)) for s, v in pairs if s is not None and v is not None and math.isfinite(float(v))]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MAX_POINTS points: means of equal runs."""
    size = -(-len(points) // _MAX_POINTS) if points else 1
    return [_mean(points[at : at + size]) for at in range(0, len(points), size)]


def running_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point's value the mean over a centred window of about a tenth of the run; empty for under 20 points."""
    if len(points) < 20:
        return []
    reach = max(2, len(points) // 20)
    means = []
    for i, (step, _) in enumerate(points):
        means.append((step, _mean(points[max(0, i - reach) : i + reach + 1])[1]))
    return means


def _mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return sum(step for step, _ in points) / len(points), sum(value for _, value in points) / len(points)


def _grid_figure(
    grid: Grid[PlannedMatrix], name: str, title: str, look: Callable[[PlannedMatrix], tuple[str, str]]
) -> Markup:
    """`look(matrix)` gives a cell's fill ("none": outline only) and its text."""
    left = 34 if None not in grid.layers else 40
    cell_width = min(44, max(20, (340 - left) // max(1, len(grid.kinds))))
    cell_height = 16 if len(grid.layers) <= 48 else 13
    labels = [kind if len(kind) <= 26 else "…" + kind[-25:] for kind in grid.kinds]
    top = 14 + round(6.4 * max((len(label) for label in labels), default=0))
    width, height = left + cell_width * len(grid.kinds) + 2, top + cell_height * len(grid.layers) + 2

    def draw(figure: Figure) -> None:
        axes = _canvas(figure, width, height)
        axes.text(left - 6, top - 6, "layer", ha="right", va="baseline", fontsize=11, color=_INK)
        for column, label in enumerate(labels):
            x = left + (column + 0.5) * cell_width
            axes.text(x + 4, top - 6, label, rotation=90, ha="left", va="baseline", rotation_mode="anchor",
                      fontsize=11, color=_INK, parse_math=False)  # fmt: skip
        for row, layer in enumerate(grid.layers):
            y = top + (row + 0.5) * cell_height + 4
            axes.text(left - 6, y, "other" if layer is None else str(layer), ha="right", va="baseline",
                      fontsize=11, color=_INK)  # fmt: skip
            for column in range(len(grid.kinds)):
                _cell(axes, left + column * cell_width, top + row * cell_height, cell_width, cell_height,
                      [look(matrix) for matrix in grid.cells.get((row, column), ())])  # fmt: skip

    return _svg(name, title, width, height, draw)


def _cell(axes: Axes, x: int, y: int, width: int, height: int, looks: Sequence[tuple[str, str]]) -> None:
    """The cell's matrices side by side; text where there is room for it."""
    for part, (fill, text) in enumerate(looks):
        part_width = (width - 2) / len(looks)
        corner = x + 1 + part * part_width
        edge = _LINE if fill == "none" else "none"
        inset = 0.5 if fill == "none" else 0
        box = (part_width - 2 * inset, height - 2 - 2 * inset)
        axes.add_patch(Rectangle((corner + inset, y + 1 + inset), *box, facecolor=fill, edgecolor=edge, linewidth=1))
        if text and 6.2 * len(text) <= part_width:
            axes.text(x + 1 + (part + 0.5) * part_width, y + height / 2 + 3.6, text, ha="center", va="baseline",
                      fontsize=10, color=readable_on(fill))  # fmt: skip


def readable_on(fill: str) -> str:
    """Black or white, whichever stands out more from `fill` (relative luminance of WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _canvas(figure: Figure, width: int, height: int) -> Axes:
    """Axes over the whole figure, in pixels from the top left."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def _svg(name: str, title: str, width: int, height: int, draw: Callable[[Figure], None]) -> Markup:
    """What `draw` puts on a figure, as an <svg> element whose ids start with `name`; the same bytes every time."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a person's matplotlibrc must not change the page
        matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "axes.unicode_minus": True})
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<(g|defs)(?: [^<>]*)?>\s*</\1>|\s*<defs */>", "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"font: (\S+)px [^;\"]*", r"font-size: \1px", text)
    opening = (
        f'<svg class="figure" role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    )
    return Markup(opening + text[text.index(">") + 1 :])  # matplotlib escapes the text it draws
