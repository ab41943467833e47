"""Figures of the model as a table of layers x kinds: which matrices share a factor, and signal-to-noise ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from sgm_finetune.measure.scan_result import MatrixScan
from sgm_finetune.method.plan import Plan, PlannedMatrix
from sgm_finetune.results.report.scan_table import short_kinds
from sgm_finetune.results.report.svg import ALONE, HEAT_COLOURS, INK, LINE, canvas, readable_on, svg

GROUP_COLOURS = (
    "#4477aa", "#ee7733", "#228833", "#aa3377", "#ccbb44", "#33a8c7", "#cc3311", "#8866cc", "#997755", "#009988",
)  # fmt: skip
"""Colours of the groups of one column or row, in turn. Where there are several, a cell shows its number too."""

Matrix = TypeVar("Matrix", PlannedMatrix, MatrixScan)


@dataclass(frozen=True)
class Grid(Generic[Matrix]):
    """The model as a table of layers x kinds. A cell holds every matrix of that layer and kind."""

    kinds: tuple[str, ...]
    layers: tuple[int | None, ...]
    cells: Mapping[tuple[int, int], Sequence[Matrix]]
    """(index of the layer, index of the kind) -> matrices."""


def grid_of(matrices: Sequence[Matrix], kinds: Sequence[str] | None = None) -> Grid[Matrix]:
    """Returns the grid: kinds in the given order or else the model's, layers rising, matrices of no layer last."""
    columns = tuple(kinds or dict.fromkeys(matrix.kind for matrix in matrices))
    found = {matrix.layer for matrix in matrices}
    layers = (*sorted(layer for layer in found if layer is not None), *([None] if None in found else []))
    cells: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        cells.setdefault((layers.index(matrix.layer), columns.index(matrix.kind)), []).append(matrix)
    return Grid(columns, layers, cells)


def group_numbers(plan: Plan) -> dict[str, int]:
    """Returns group name -> number, from 0, in its row of the grid (scope "activation") or its column (the others)."""
    by_column = plan.settings.scope != "activation"
    place = {matrix.name: matrix.kind if by_column else matrix.layer for matrix in plan.matrices}
    counts: Counter[str | int | None] = Counter()
    numbers = {}
    for group in plan.groups:
        where = place[group.members[0]]
        numbers[group.name] = counts[where]
        counts[where] += 1
    return numbers


def shown_numbers(plan: Plan) -> dict[str, int]:
    """Returns group name -> number for the groups whose cells show it: several of one kind, and no brackets."""
    brackets = _brackets(plan, grid_of(plan.matrices))
    of_kind = Counter(group.kind for group in plan.groups)
    shown = {group.name for group in plan.groups if of_kind[group.kind] > 1} - brackets.keys()
    return {name: number for name, number in group_numbers(plan).items() if name in shown}


def group_colour(number: int) -> str:
    return GROUP_COLOURS[number % len(GROUP_COLOURS)]


def groups_figure(plan: Plan) -> Markup:
    """Draws layers x kinds: coloured by group, grey if trained alone, empty if not trained.

    A bracket joins a group within a layer. Groups of layers have numbers where a column has more than one.
    """
    numbers, shown = group_numbers(plan), shown_numbers(plan)
    grid = grid_of(plan.matrices)

    def look(matrix: PlannedMatrix) -> tuple[str, str]:
        if matrix.group is not None:
            return group_colour(numbers[matrix.group]), str(shown.get(matrix.group, ""))
        return (ALONE if matrix.selected else "none"), ""

    return _grid_figure(grid, "groups", "Which matrices share a factor", look, list(_brackets(plan, grid).values()))


def _brackets(plan: Plan, grid: Grid[PlannedMatrix]) -> dict[str, tuple[int, list[int]]]:
    """Returns group name -> (row, columns of its members), for groups of several kinds in one layer."""
    places = {matrix.name: place for place, matrices in grid.cells.items() for matrix in matrices}
    found = {}
    for group in plan.groups:
        rows, columns = ({places[name][axis] for name in group.members} for axis in (0, 1))
        if len(rows) == 1 and len(columns) > 1:
            found[group.name] = (min(rows), sorted(columns))
    return found


def snr_range(plan: Plan) -> tuple[float, float] | None:
    """Returns the smallest and largest SNR in dB, or None if nothing was scanned."""
    levels = [matrix.snr_db for matrix in plan.matrices if matrix.snr_db is not None]
    return (min(levels), max(levels)) if levels else None


def snr_figure(plan: Plan) -> Markup | None:
    """Draws layers x kinds, with the SNR of each matrix in dB. Returns None if nothing was scanned."""
    span = snr_range(plan)
    if span is None:
        return None
    low, high = span
    colours = colormaps[HEAT_COLOURS]

    def look(matrix: PlannedMatrix) -> tuple[str, str]:
        if matrix.snr_db is None:
            return "none", ""
        share = (matrix.snr_db - low) / (high - low) if high > low else 0.5
        return to_hex(colours(share)), f"{round(matrix.snr_db, 1) + 0.0:.1f}".replace("-", "−")

    return _grid_figure(grid_of(plan.matrices), "snr", "Signal-to-noise ratio of each matrix in dB", look)


def _grid_figure(
    grid: Grid[PlannedMatrix],
    name: str,
    title: str,
    look: Callable[[PlannedMatrix], tuple[str, str]],
    brackets: Sequence[tuple[int, Sequence[int]]] = (),
) -> Markup:
    """Draws a grid. `look(matrix)` returns a cell's fill ("none": outline only) and its text.

    A bracket, (row, columns), runs along the top of its row, with a tick down into each of its columns.
    """
    left = 34 if None not in grid.layers else 40
    cell_width = min(44, max(20, (340 - left) // max(1, len(grid.kinds))))
    cell_height = 16 if len(grid.layers) <= 48 else 13
    names = short_kinds(grid.kinds)
    labels = [name if len(name) <= 26 else "…" + name[-25:] for name in map(names.__getitem__, grid.kinds)]
    top = 14 + round(6.4 * max((len(label) for label in labels), default=0))
    width, height = left + cell_width * len(grid.kinds) + 2, top + cell_height * len(grid.layers) + 2

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        axes.text(left - 6, top - 6, "layer", ha="right", va="baseline", fontsize=11, color=INK)
        for column, label in enumerate(labels):
            x = left + (column + 0.5) * cell_width
            axes.text(x + 4, top - 6, label, rotation=90, ha="left", va="baseline", rotation_mode="anchor",
                      fontsize=11, color=INK, parse_math=False)  # fmt: skip
        for row, layer in enumerate(grid.layers):
            y = top + (row + 0.5) * cell_height + 4
            axes.text(left - 6, y, "other" if layer is None else str(layer), ha="right", va="baseline",
                      fontsize=11, color=INK)  # fmt: skip
            for column in range(len(grid.kinds)):
                _draw_cell(axes, left + column * cell_width, top + row * cell_height, cell_width, cell_height,
                      [look(matrix) for matrix in grid.cells.get((row, column), ())])  # fmt: skip

        points: list[tuple[float, float]] = []
        for row, columns in brackets:
            middles = [left + (column + 0.5) * cell_width for column in columns]
            over, under = top + row * cell_height + 4.5, top + (row + 1) * cell_height - 3.5
            points += [(middles[0], over), (middles[-1], over)]
            points += [point for x in middles for point in ((x, over), (x, under))]
        if points:
            path = Path(points, [Path.MOVETO, Path.LINETO] * (len(points) // 2))
            axes.add_patch(PathPatch(path, fill=False, edgecolor=INK, linewidth=1.6, capstyle="projecting"))

    return svg(name, title, width, height, draw)


def _draw_cell(axes: Axes, x: int, y: int, width: int, height: int, looks: Sequence[tuple[str, str]]) -> None:
    """Draws the matrices of a cell side by side, with their text where it fits."""
    for part, (fill, text) in enumerate(looks):
        part_width = (width - 2) / len(looks)
        corner = x + 1 + part * part_width
        edge = LINE if fill == "none" else "none"
        inset = 0.5 if fill == "none" else 0
        box = (part_width - 2 * inset, height - 2 - 2 * inset)
        axes.add_patch(Rectangle((corner + inset, y + 1 + inset), *box, facecolor=fill, edgecolor=edge, linewidth=1))
        if text and 6.2 * len(text) <= part_width:
            axes.text(x + 1 + (part + 0.5) * part_width, y + height / 2 + 3.6, text, ha="center", va="baseline",
                      fontsize=10, color=readable_on(fill))  # fmt: skip
