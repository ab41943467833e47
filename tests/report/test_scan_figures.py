"""The PNG files of a scan show its numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from sgm_finetune.measure.scan import measured_singular_values, scan
from sgm_finetune.measure.scan_result import MatrixScan, Scan
from sgm_finetune.results.report.scan_figures import (
    NOISE,
    SIGNAL,
    draw_histogram,
    save_heat_map,
    save_histogram,
)


def stored(tmp_path: Path, **named: torch.Tensor) -> Path:
    save_file({name.replace("_", ".") + ".weight": w for name, w in named.items()}, tmp_path / "model.safetensors")
    return tmp_path


def spiked(rows: int, cols: int, rank: int, size: float = 3.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rank)
    noise = torch.randn(rows, cols, generator=draw)
    left, right = (torch.linalg.qr(torch.randn(side, rank, generator=draw)).Q for side in (rows, cols))
    return noise + size * (rows**0.5 + cols**0.5) * left @ right.T


def bars(figure: Figure, colour: str) -> list[tuple[float, float, float]]:
    """Returns (left, right, height) of the bars of one colour."""
    from matplotlib.colors import to_hex

    found = [p for p in figure.axes[0].patches if to_hex(p.get_facecolor()) == colour and p.get_height() > 0]
    return [(p.get_x(), p.get_x() + p.get_width(), p.get_height()) for p in found]


def test_every_singular_value_is_one_of_the_bars_and_the_edge_parts_their_colours(tmp_path: Path):
    ((found, matrix),) = measured_singular_values(stored(tmp_path, h_0_fc=spiked(200, 150, 7)), ["h.0.fc"])
    assert matrix.signal_rank == 7
    figure = Figure()
    draw_histogram(figure.add_subplot(), found, matrix)
    noise, signal = bars(figure, NOISE), bars(figure, SIGNAL)
    assert sum(height for *_, height in noise) == 143
    shown = sum(height for *_, height in signal)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    beyond = 7 - shown
    assert labels[:2] == [
        "noise: 143",
        "signal: 7" + (f" ({beyond:.0f} beyond, up to {found.values[0]:.3g})" * bool(beyond)),
    ]
    assert max(right for _, right, _ in noise) <= matrix.edge * (1 + 1e-9)
    assert all(left >= matrix.edge * (1 - 1e-9) for left, *_ in signal)


def test_the_law_that_is_drawn_holds_as_many_values_as_there_are_below_the_edge(tmp_path: Path):
    ((found, matrix),) = measured_singular_values(stored(tmp_path, h_0_fc=spiked(200, 150, 7)), ["h.0.fc"])
    figure = Figure()
    draw_histogram(figure.add_subplot(), found, matrix)
    law = next(line for line in figure.axes[0].lines if "Pastur" in str(line.get_label()))
    x, y = (np.asarray(values) for values in law.get_data())
    width = bars(figure, NOISE)[0][1] - bars(figure, NOISE)[0][0]
    assert np.trapezoid(y, x) / width == pytest.approx(143, rel=0.02)


@pytest.mark.parametrize(
    "weights",
    [
        torch.zeros(6, 5), torch.ones(6, 5), torch.ones(1, 9), torch.eye(5), torch.full((40, 30), 1e30),
        torch.full((40, 30), 1e-30), torch.outer(torch.arange(30.0), torch.arange(20.0)), torch.ones(1, 1),
    ],
    ids=["zeros", "constant", "vector", "identity", "huge", "tiny", "rank one", "number"],
)  # fmt: skip
def test_every_matrix_can_be_drawn(weights: torch.Tensor, tmp_path: Path):
    for estimator in ("mp", "spectrum"):
        ((found, matrix),) = measured_singular_values(stored(tmp_path, h_0_fc=weights), ["h.0.fc"], estimator)
        save_histogram(found, matrix, tmp_path / "pictures" / "one.png")
        assert matplotlib.image.imread(tmp_path / "pictures" / "one.png").shape[:2] == (576, 1024)


def test_the_same_scan_gives_the_same_bytes_whatever_the_persons_settings(tmp_path: Path):
    import matplotlib

    found = scan(stored(tmp_path, h_0_fc=spiked(40, 30, 2), h_1_fc=spiked(40, 30, 3)))
    save_heat_map(found, tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        save_heat_map(found, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_heat_map_of_anything_is_as_large_as_its_layers_and_kinds(tmp_path: Path):
    (one,) = scan(stored(tmp_path, h_0_fc=spiked(40, 30, 2))).matrices

    def size(*matrices: MatrixScan) -> tuple[int, int]:
        save_heat_map(Scan("m", "spectrum", matrices), tmp_path / "map.png")
        height, width = matplotlib.image.imread(tmp_path / "map.png").shape[:2]
        return width, height

    def matrix(kind: str, layer: int | None, **changes) -> MatrixScan:
        return replace(one, name=f"{kind}.{layer}", kind=kind, layer=layer, **changes)

    small = size(matrix("h.*.a", 0))
    assert size(matrix("h.*.a", 0), matrix("h.*.b", 0))[1] > small[1]
    assert size(*(matrix("h.*.a", i) for i in range(40)))[0] > small[0]
    assert size(*(matrix("h.*.a", i) for i in range(120)))[0] < 6000  # pixels: cells are narrower and have no numbers
    size(matrix("head", None), matrix("h.*.a", 0, snr=0.0), matrix("h.*.a", 1, snr=math.inf, snr_db=math.inf))
    size(*(matrix("h.*.experts.*.up", 0, snr=float(i)) for i in range(8)))
    size(matrix("head", None, snr=0.0))
