"""Figures of how well the gradients of two matrices can share a basis: layers x layers, and readers by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from sgm_finetune.method.plan import Plan
from sgm_finetune.method.sides import sides_of
from sgm_finetune.results.report.formats import NOTHING
from sgm_finetune.results.report.pictures import SimilarityTable
from sgm_finetune.results.report.svg import INK, canvas, draw_heat, label_step, svg

LOWEST_SHOWN = 0.5
"""Similarities up to this value have the same colour, because the differences that matter lie above it."""


def layers_figure(table: SimilarityTable, plan: Plan, number: int) -> Markup:
    """Draws layers x layers of one kind on one side, and outlines the groups of that kind and side."""
    layers = layers_of(table.members, plan)
    size = len(layers)
    cell = max(3, min(20, 200 // size))
    left, top = 30, 22
    merged = [one for one in plan.groups if one.kind == table.kind and table.side in (*sides_of(one.side), None)]
    group_of = {name: number for number, group in enumerate(merged) for name in group.members}
    owners = [group_of.get(name, -1) for name in table.members]
    together = np.array([[one if one == two else -1 for two in owners] for one in owners])
    width, height = left + cell * size + 4, top + cell * size + 4

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        draw_heat(axes, _shown(np.array(table.matrix())), left, top, cell, cell)
        _draw_outline(axes, together, left, top, cell, cell)
        step = label_step(size, cell, 18)
        for index in range(0, size, step):
            middle = (index + 0.5) * cell
            axes.text(left - 5, top + middle + 4, layers[index], ha="right", va="baseline", fontsize=11, color=INK)
            axes.text(left + middle, top - 6, layers[index], ha="center", va="baseline", fontsize=11, color=INK)

    return svg(f"layers-{number}", f"Similarity of layers: {table.kind}, {table.side or 'whole'} gradients", width,
               height, draw)  # fmt: skip


def readers_figure(tables: list[SimilarityTable], plan: Plan, number: int) -> Markup:
    """Draws pairs of matrices that read the same activations x layers, and outlines pairs within a group."""
    names = {matrix.name: matrix for matrix in plan.matrices}
    group_of = {name: number for number, group in enumerate(plan.groups) for name in group.members}
    readers = _last_parts([names[name].kind if name in names else name for name in tables[0].members])
    pairs = [(i, j) for i in range(len(readers)) for j in range(i)]
    labels = [f"{readers[j]} · {readers[i]}" for i, j in pairs]
    values, together = np.full((len(pairs), len(tables)), np.nan), np.full((len(pairs), len(tables)), -1)
    for column, table in enumerate(tables):
        whole = table.matrix()
        for row, (i, j) in enumerate(pairs):
            if i < len(whole):
                values[row, column] = whole[i][j]
                one, two = (group_of.get(table.members[k], -1) for k in (i, j))
                together[row, column] = one if one == two else -1
    left, top = 12 + round(6.2 * max(map(len, labels))), 22
    cell_width, cell_height = max(4, min(20, 480 // len(tables))), 20
    width, height = left + cell_width * len(tables) + 4, top + cell_height * len(pairs) + 4
    layers = [layers_of(table.members, plan)[0] for table in tables]

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        draw_heat(axes, _shown(values), left, top, cell_width, cell_height)
        _draw_outline(axes, together, left, top, cell_width, cell_height)
        for row, label in enumerate(labels):
            axes.text(left - 6, top + (row + 0.5) * cell_height + 4, label, ha="right", va="baseline", fontsize=11,
                      color=INK)  # fmt: skip
        for column in range(0, len(tables), label_step(len(tables), cell_width, 18)):
            middle = left + (column + 0.5) * cell_width
            axes.text(middle, top - 6, layers[column], ha="center", va="baseline", fontsize=11, color=INK)

    return svg(f"readers-{number}", f"Similarity of readers by layer: {tables[0].kind}", width, height, draw)


def layers_of(members: Sequence[str], plan: Plan) -> list[str]:
    """Returns the layer of each member as text."""
    layer_of = {matrix.name: matrix.layer for matrix in plan.matrices}
    layers = [layer_of.get(name) for name in members]
    return [NOTHING if layer is None else str(layer) for layer in layers]


def _last_parts(kinds: list[str]) -> list[str]:
    """Returns the last part of each name; the last 16 characters if two of those are equal.

    >>> _last_parts(["layers.*.attention.query", "layers.*.attention.key"])
    ['query', 'key']
    """
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else [kind[-16:] for kind in kinds]


def _shown(values: np.ndarray) -> np.ndarray:
    """Returns 0 for `LOWEST_SHOWN` and 1 for 1."""
    return (values - LOWEST_SHOWN) / (1 - LOWEST_SHOWN)


def _draw_outline(axes: Axes, groups: np.ndarray, left: int, top: int, cell_width: int, cell_height: int) -> None:
    """Outlines the cells of equal number; -1 is no group."""
    padded = np.pad(groups, 1, constant_values=-1)
    points: list[tuple[float, float]] = []
    for row, column in np.argwhere(padded[1:, :] != padded[:-1, :]):  # a border below padded row `row`
        y, x = top + row * cell_height, left + (column - 1) * cell_width
        points += [(x, y), (x + cell_width, y)]
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        y, x = top + (row - 1) * cell_height, left + column * cell_width
        points += [(x, y), (x, y + cell_height)]
    if points:
        path = Path(points, [Path.MOVETO, Path.LINETO] * (len(points) // 2))
        axes.add_patch(PathPatch(path, fill=False, edgecolor="#ffffff", linewidth=3))
        axes.add_patch(PathPatch(path, fill=False, edgecolor="#d1201f", linewidth=1.6))
