"""Singular values with the fitted law of noise, and how well the gradients of two matrices could share a basis."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from sgm_finetune.method.plan import Plan
from sgm_finetune.results.report.histogram import Histogram, law_of_noise
from sgm_finetune.results.report.pictures import Table
from sgm_finetune.results.report.svg import INK, LAW, NOISE, SIGNAL, canvas, plot, svg

SIMILARITY_COLOURS = "viridis"
LOWEST_SHOWN = 0.5
"""Similarities from 0 to here look alike; what differs lies above."""


def histogram_figure(histogram: Histogram, number: int) -> Markup:
    """Bars of noise and signal, the Marchenko-Pastur law, the edge as a dashed line; `number` keeps the ids apart."""
    width, height = 330, 190
    edges = histogram.bin_width * np.arange(len(histogram.noise) + 1)
    noise, signal = np.array(histogram.noise), np.array(histogram.signal)

    def draw(figure: Figure) -> None:
        axes = plot(figure, width, height, "singular value", y_ticks=4)
        axes.stairs(noise, edges, fill=True, color=NOISE, linewidth=0)
        axes.stairs(noise + signal, edges, baseline=noise, fill=True, color=SIGNAL, linewidth=0)
        top = float((noise + signal).max(initial=1))
        points, law = law_of_noise(histogram, 300)
        if len(points):
            axes.plot(points, law, color=LAW, linewidth=1.8)
            top = max(top, float(law[len(law) // 50 :].max()))
        if histogram.edge > 0:
            axes.axvline(histogram.edge, color=SIGNAL, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(0, histogram.end or 1.0)
        axes.set_ylim(0, 1.05 * top)

    return svg(f"spectrum-{number}", f"Singular values of {histogram.name}", width, height, draw)


def layers_figure(table: Table, plan: Plan, number: int) -> Markup:
    """Layers x layers of one kind on one side; the groups of that kind and side are outlined."""
    layers = _layers(table, plan)
    size = len(layers)
    cell = max(3, min(20, 200 // size))
    left, top = 30, 22
    merged = [group for group in plan.groups if group.kind == table.kind and table.side in (group.side, None)]
    groups = {name: at for at, group in enumerate(merged) for name in group.members}
    owners = [groups.get(name, -1) for name in table.members]
    together = np.array([[a if a == b else -1 for b in owners] for a in owners])
    width, height = left + cell * size + 4, top + cell * size + 4

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        _image(axes, np.array(table.whole()), left, top, cell, cell)
        _outline(axes, together, left, top, cell, cell)
        step = _label_step(size, cell, 18)
        for at in range(0, size, step):
            middle = (at + 0.5) * cell
            axes.text(left - 5, top + middle + 4, layers[at], ha="right", va="baseline", fontsize=11, color=INK)
            axes.text(left + middle, top - 6, layers[at], ha="center", va="baseline", fontsize=11, color=INK)

    return svg(f"layers-{number}", f"Similarity of layers: {table.kind}, {table.side or 'whole'} gradients", width,
               height, draw)  # fmt: skip


def readers_figure(tables: list[Table], plan: Plan, number: int) -> Markup:
    """Pairs of matrices that read the same activations x layers; pairs within a group are outlined."""
    names = {matrix.name: matrix for matrix in plan.matrices}
    group_of = {name: at for at, group in enumerate(plan.groups) for name in group.members}
    endings = _endings([names[name].kind if name in names else name for name in tables[0].members])
    pairs = [(i, j) for i in range(len(endings)) for j in range(i)]
    labels = [f"{endings[j]} · {endings[i]}" for i, j in pairs]
    values, together = np.full((len(pairs), len(tables)), np.nan), np.full((len(pairs), len(tables)), -1)
    for column, table in enumerate(tables):
        whole = table.whole()
        for row, (i, j) in enumerate(pairs):
            if i < len(whole):
                values[row, column] = whole[i][j]
                one, two = (group_of.get(table.members[k], -1) for k in (i, j))
                together[row, column] = one if one == two else -1
    left, top = 12 + round(6.2 * max(map(len, labels))), 22
    cell_width, cell_height = max(4, min(20, 480 // len(tables))), 20
    width, height = left + cell_width * len(tables) + 4, top + cell_height * len(pairs) + 4
    layers = [_layers(table, plan)[0] for table in tables]

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        _image(axes, values, left, top, cell_width, cell_height)
        _outline(axes, together, left, top, cell_width, cell_height)
        for row, label in enumerate(labels):
            axes.text(left - 6, top + (row + 0.5) * cell_height + 4, label, ha="right", va="baseline", fontsize=11,
                      color=INK)  # fmt: skip
        for at in range(0, len(tables), _label_step(len(tables), cell_width, 18)):
            axes.text(left + (at + 0.5) * cell_width, top - 6, layers[at], ha="center", va="baseline", fontsize=11,
                      color=INK)  # fmt: skip

    return svg(f"readers-{number}", f"Similarity of readers by layer: {tables[0].kind}", width, height, draw)


def similarity_gradient() -> str:
    """CSS colours from `LOWEST_SHOWN` to 1."""
    return ", ".join(to_hex(colormaps[SIMILARITY_COLOURS](step / 6)) for step in range(7))


def _layers(table: Table, plan: Plan) -> list[str]:
    found = {matrix.name: matrix.layer for matrix in plan.matrices}
    return ["–" if (layer := found.get(name)) is None else str(layer) for name in table.members]


def _endings(kinds: list[str]) -> list[str]:
    """
    >>> _endings(["layers.*.attention.query", "layers.*.attention.key"])
    ['query', 'key']
    """
    last = [kind.rpartition(".")[2] for kind in kinds]
    return last if len(set(last)) == len(last) else [kind[-16:] for kind in kinds]


def _label_step(number: int, cell: int, room: int) -> int:
    """Every so manieth cell has a label, so that each has `room` pixels."""
    return next((step for step in (1, 2, 5, 10, 20) if step * cell >= room), max(20, number))


def _image(axes: Axes, values: np.ndarray, left: int, top: int, cell_width: int, cell_height: int) -> None:
    """A pixel a cell, enlarged by the browser; what is not a number stays empty."""
    rows, columns = values.shape
    colours = colormaps[SIMILARITY_COLOURS](np.clip((values - LOWEST_SHOWN) / (1 - LOWEST_SHOWN), 0, 1))
    colours[np.isnan(values), 3] = 0
    right, bottom = left + cell_width * columns, top + cell_height * rows
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(colours, extent=(left, right, bottom, top), interpolation="none", aspect="auto")
    axes.set(xlim=limits[0], ylim=limits[1])


def _outline(axes: Axes, groups: np.ndarray, left: int, top: int, cell_width: int, cell_height: int) -> None:
    """A line around what belongs together: cells of equal number, -1 of none."""
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
