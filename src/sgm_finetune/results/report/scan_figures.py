"""PNG files of a scan: layers x kinds, and the singular values of one matrix with the fitted law of noise."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sgm_finetune.base.files import whole_file
from sgm_finetune.measure.scan_result import MatrixScan, Scan
from sgm_finetune.method.singular_values import SingularValues
from sgm_finetune.results.report.grid_figures import grid_of
from sgm_finetune.results.report.histogram import law_of_noise
from sgm_finetune.results.report.measured_histograms import histogram_of
from sgm_finetune.results.report.scan_table import kinds_in_order, lowest_median_highest, short_kinds
from sgm_finetune.results.report.svg import HEAT_COLOURS, readable_on

NOISE, SIGNAL, LAW, FAINT = "#8fb3d9", "#d95f0e", "#1f4e79", "#e8e8e8"


def save_heat_map(scan: Scan, path: Path) -> None:
    """Writes the SNR of every matrix in dB as a PNG, with a row for each kind and a column for each layer.

    Matrices of no layer are in the last column. Several matrices in one cell (experts) show their median. A matrix
    without signal is grey; an infinite SNR is white with "∞".
    """
    grid = grid_of(scan.matrices, kinds_in_order(scan.matrices))
    kinds, layers = grid.kinds, grid.layers
    shown = {place: lowest_median_highest(found)[1] for place, found in grid.cells.items()}
    levels = [matrix.snr_db for matrix in shown.values() if 0 < matrix.snr < math.inf]
    scale = Normalize(min(levels, default=0.0), max(levels, default=1.0))
    colours = colormaps[HEAT_COLOURS]
    names = short_kinds(kinds)
    cell = 0.36 if len(layers) <= 48 else 0.2
    left = 0.3 + 0.078 * max(len(names[kind]) for kind in kinds)
    width, height = max(4.5, left + cell * len(layers) + 1.0), 0.26 * len(kinds) + 1.0

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((left / width, 0.5 / height, cell * len(layers) / width, 0.26 * len(kinds) / height))
        axes.set_xlim(0, len(layers))
        axes.set_ylim(len(kinds), 0)
        for (column, row), matrix in shown.items():
            fill, text = _look(matrix, lambda level: to_hex(colours(scale(level))))
            axes.add_patch(Rectangle((column + 0.03, row + 0.04), 0.94, 0.92, facecolor=fill, edgecolor="none"))
            if cell > 0.3:
                place = (column + 0.5, row + 0.53)
                axes.text(*place, text, ha="center", va="center", fontsize=6.5, color=readable_on(fill))
        axes.set_yticks([row + 0.5 for row in range(len(kinds))], [names[kind] for kind in kinds], fontsize=8)
        step = 1 if cell > 0.3 else 5
        ticks = [index for index, layer in enumerate(layers) if layer is None or index % step == 0]
        labels = ["other" if layers[index] is None else str(layers[index]) for index in ticks]
        axes.set_xticks([index + 0.5 for index in ticks], labels, fontsize=8)
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        room = int(11.5 * width) - 32  # letters that fit after the title
        model = scan.model if len(scan.model) <= room else f"…{scan.model[1 - room :]}"
        figure.text(0.15 / width, 1 - 0.3 / height, f"Signal-to-noise ratio in dB: {model}", fontsize=10)
        if levels:
            bar = figure.add_axes((1 - 0.75 / width, 0.5 / height, 0.12 / width, 0.26 * len(kinds) / height))
            figure.colorbar(ScalarMappable(scale, colours), cax=bar).ax.tick_params(labelsize=7)

    _save_figure(path, width, height, draw)


def _look(matrix: MatrixScan, colour: Callable[[float], str]) -> tuple[str, str]:
    """Returns (fill, text) of a cell."""
    if matrix.snr == 0:
        return FAINT, "none"
    if math.isinf(matrix.snr):
        return "#ffffff", "∞"
    return colour(matrix.snr_db), f"{matrix.snr_db:.1f}".replace("-", "−")


def save_histogram(spectrum: SingularValues, matrix: MatrixScan, path: Path) -> None:
    """Writes the singular values of a matrix as a PNG, with the law of the fitted noise and the noise edge."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.09, 0.15, 0.885, 0.64))
        draw_histogram(axes, spectrum, matrix)
        figure.text(0.02, 0.93, f"{matrix.name}, {matrix.shape[0]} x {matrix.shape[1]}", fontsize=10)
        level = f"SNR {matrix.snr_db:.1f} dB" if matrix.snr > 0 else "no signal"
        text = (
            f"signal rank {matrix.signal_rank} of {min(matrix.shape)} · {level} · noise σ {matrix.sigma:.3g} per entry"
        )
        figure.text(0.02, 0.87, text, fontsize=8, color="#444444")

    _save_figure(path, 6.4, 3.6, draw)


def draw_histogram(axes: Axes, spectrum: SingularValues, matrix: MatrixScan, legend: bool = True) -> None:
    """Draws the histogram of noise and signal, the Marchenko-Pastur law fitted to the noise (eq. 2, 3), and the edge.

    The legend counts the values beyond three edges, which the axis does not show.
    """
    found = histogram_of(spectrum, matrix)
    num_noise, num_signal = sum(found.noise), sum(found.signal) + found.num_beyond
    beyond = f" ({found.num_beyond} beyond, up to {found.largest:.3g})" if found.num_beyond else ""
    edges = found.bin_width * np.arange(len(found.noise) + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    axes.hist([centres, centres], bins=edges.tolist(), weights=[found.noise, found.signal], stacked=True,
              color=[NOISE, SIGNAL], label=[f"noise: {num_noise}", f"signal: {num_signal}{beyond}"])  # fmt: skip
    top = axes.get_ylim()[1]
    points, number = law_of_noise(found)
    if len(points):
        axes.plot(points, number, color=LAW, linewidth=1.6, label="Marchenko–Pastur law")
        top = max(top, 1.05 * number[len(number) // 50 :].max())
    if found.edge > 0:
        axes.axvline(found.edge, color=SIGNAL, linewidth=1.1, linestyle=(0, (4, 3)), label="noise edge")
    axes.set_ylim(0, top)
    axes.set_xlim(0, found.end)
    axes.set_xlabel("singular value", fontsize=8)
    axes.set_ylabel("number", fontsize=8)
    axes.tick_params(labelsize=7)
    for name in ("top", "right"):
        axes.spines[name].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.99), ncols=4, borderpad=0,
                    handlelength=1.4, columnspacing=1.2)  # fmt: skip


def _save_figure(path: Path, width: float, height: float, draw: Callable[[Figure], None]) -> None:
    """Writes what `draw` puts on a figure of that size in inches as PNG, with the same bytes every time."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not change the picture
        matplotlib.rcParams["text.parse_math"] = False
        figure = Figure(figsize=(width, height), dpi=160)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    with whole_file(path) as scratch:
        scratch.write_bytes(buffer.getvalue())
