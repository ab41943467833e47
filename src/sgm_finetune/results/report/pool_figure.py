"""Figure of a pool: how much each of its layers uses each of the directions that they share."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from sgm_finetune.method.plan import Plan
from sgm_finetune.results.report.pictures import PoolTable
from sgm_finetune.results.report.similarity_figures import layers_of
from sgm_finetune.results.report.svg import INK, canvas, draw_heat, label_step, svg


def pool_figure(table: PoolTable, kind: str, plan: Plan, number: int) -> Markup:
    """Draws layers x directions, bright where a layer uses a direction much."""
    layers, strengths = layers_of(table.members, plan), np.array(table.strengths)
    rows, columns = strengths.shape
    cell_width, cell_height = max(4, min(24, 256 // columns)), max(3, min(16, 120 // rows))
    left, top = 34, 20
    width, height = left + cell_width * columns + 4, top + cell_height * rows + 4

    def draw(figure: Figure) -> None:
        axes = canvas(figure, width, height)
        draw_heat(axes, strengths, left, top, cell_width, cell_height)
        axes.text(left - 6, top - 7, "layer", ha="right", va="baseline", fontsize=11, color=INK)
        for row in range(0, rows, label_step(rows, cell_height, 12)):
            y = top + (row + 0.5) * cell_height + 4
            axes.text(left - 6, y, layers[row], ha="right", va="baseline", fontsize=11, color=INK)

    return svg(f"pool-{number}", f"Use of the directions of a pool by layer: {kind}", width, height, draw)
