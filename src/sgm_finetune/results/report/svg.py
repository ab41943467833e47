"""Turns matplotlib figures into inline SVG.

One unit of a figure is one CSS pixel at its natural size. Figures use stand-in colours, which become CSS variables of
the page, so that one drawing serves light and dark. Text stays text, in the page's own font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sgm_finetune.results.report.formats import short

INK, LINE, ALONE, TRAIN, VALIDATION = "#010203", "#020304", "#030405", "#040506", "#050607"
NOISE, SIGNAL, LAW = "#060708", "#070809", "#08090a"
HEAT_COLOURS = "viridis"
_CSS_VARIABLES = {
    INK: "ink", LINE: "line", ALONE: "alone", TRAIN: "train", VALIDATION: "validation", NOISE: "noise",
    SIGNAL: "signal", LAW: "law",
}  # fmt: skip
_TOO_FINE = re.compile(r"(\d\.\d\d)\d+")


def svg(name: str, title: str, width: int, height: int, draw: Callable[[Figure], None]) -> Markup:
    """Returns what `draw` puts on a figure as an <svg> whose ids start with `name`, with the same bytes every time."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc must not change the page
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
    for stand_in, variable in _CSS_VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = _smaller(text)
    text = re.sub(r' id="', f' id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    opening = (
        f'<svg class="figure" role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    )
    return Markup(opening + text[text.index(">") + 1 :])  # matplotlib escapes the text it draws


def _smaller(text: str) -> str:
    """Returns the SVG without what the page does not need: fonts (the page has its own), names of <g>, turns by 0
    degrees, indentation, and digits of coordinates beyond a hundredth of a pixel."""
    text = re.sub(r" font-family: [^;\"]*;?", "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' transform="rotate\(-?0 [^"]*"', "", text)
    text = re.sub(r"\n\s+", "\n", text)
    return re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', lambda found: _TOO_FINE.sub(r"\1", found[0]), text)


def canvas(figure: Figure, width: int, height: int) -> Axes:
    """Returns axes over the whole figure, in pixels from the top left."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def plot(
    figure: Figure, width: int, height: int, x_label: str, y_ticks: int = 5, font: int = 13, x_ticks: int = 6
) -> Axes:
    """Returns the axes of a chart with horizontal grid lines, no frame, and numbers of three digits."""
    left, bottom = 3.6 * font, 3.2 * font
    axes = figure.add_axes((left / width, bottom / height, 1 - (left + 10) / width, 1 - (bottom + 10) / height))
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(LINE)
    axes.tick_params(length=0, labelsize=font, labelcolor=INK, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=x_ticks, integer=x_label == "step"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=y_ticks))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value).replace("-", "−")))
    axes.set_xlabel(x_label, fontsize=font, color=INK, labelpad=3)
    return axes


def draw_heat(axes: Axes, shares: np.ndarray, left: int, top: int, cell_width: int, cell_height: int) -> None:
    """Draws rows x columns of cells, dark for 0 and bright for 1, one pixel each, which the browser enlarges. NaN stays
    empty."""
    rows, columns = shares.shape
    colours = colormaps[HEAT_COLOURS](np.clip(shares, 0, 1))
    colours[np.isnan(shares), 3] = 0
    right, bottom = left + cell_width * columns, top + cell_height * rows
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(colours, extent=(left, right, bottom, top), interpolation="none", aspect="auto")
    axes.set(xlim=limits[0], ylim=limits[1])


def heat_gradient() -> str:
    """Returns the CSS colours of a gradient from 0 to 1 in the colours of `draw_heat`."""
    return ", ".join(to_hex(colormaps[HEAT_COLOURS](step / 6)) for step in range(7))


def label_step(number: int, cell: int, room: int) -> int:
    """Returns n such that every n-th of `number` cells gets a label and each label has `room` pixels."""
    return next((step for step in (1, 2, 5, 10, 20) if step * cell >= room), max(20, number))


def readable_on(fill: str) -> str:
    """Returns black or white, whichever contrasts more with `fill` (relative luminance of WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"
