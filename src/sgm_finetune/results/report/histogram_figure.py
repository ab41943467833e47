"""Figure of one matrix's singular values with the fitted law of noise, for the report."""

from __future__ import annotations

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from sgm_finetune.results.report.histogram import Histogram, law_of_noise
from sgm_finetune.results.report.svg import LAW, NOISE, SIGNAL, plot, svg


def histogram_figure(histogram: Histogram, number: int) -> Markup:
    """Draws bars of noise and signal, the Marchenko-Pastur law, and the noise edge as a dashed line.

    `number` makes the ids of the SVG unique on the page.
    """
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
