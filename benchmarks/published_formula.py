"""Shows where the published Spectrum formula is wrong, on noise and on real weights; draws figures of docs/scan.md.

    python benchmarks/published_formula.py [--models smollm2-135m-instruct all-minilm-l6-v2]

- Noise: Gaussian matrices of four aspect ratios, and the fraction that each estimator calls signal.
- Scale: one spiked matrix, multiplied by constants.
- Models: both estimators on every layer's matrices and, as a control, on the same entries shuffled. For each kind: the
  rank correlation (Spearman) of the two ratios over the layers, the top quarters, and the matrices that each prefers.

The script prints the tables of docs/scan.md, appends to benchmarks/results/published_formula.json and draws into
docs/figures/.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import scipy
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from recording import append_run
from scipy.stats import spearmanr

from sgm_finetune.measure.scan import measured_singular_values, scan
from sgm_finetune.measure.scan_result import MatrixScan, Scan
from sgm_finetune.method.selection import choose_per_kind
from sgm_finetune.method.singular_values import SingularValues, batched_singular_values
from sgm_finetune.method.snr import signal_to_noise
from sgm_finetune.model.folder import local_folder
from sgm_finetune.model.weights.stored import stored_matrices
from sgm_finetune.results.report.scan_figures import draw_histogram, save_heat_map
from sgm_finetune.results.report.scan_table import kinds_in_order, short_kinds

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")
NOISE_SHAPES = ((1024, 1024), (1024, 1536), (1024, 2048), (1024, 4096))
PUBLISHED_EDGE = "#6a3d9a"


def noise(rows: int, cols: int) -> SingularValues:
    return batched_singular_values(
        [torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)]
    )[0]


def describe_scan(name: str, found: SingularValues) -> MatrixScan:
    """Our scan of singular values that do not come from a file."""
    rows, cols = found.alive
    s = signal_to_noise(found.values, rows, cols)
    return MatrixScan(name, name, None, (rows, cols), s.sigma, s.edge, s.signal_rank, s.snr, s.snr_db, name, 0.0)


def measure_noise() -> list[dict]:
    rows_ = []
    print("| shape | β | `mp`: signal | published: signal | published: SNR |\n|---|---|---|---|---|")
    for rows, cols in NOISE_SHAPES:
        values = noise(rows, cols).values
        ours, theirs = (signal_to_noise(values, rows, cols, estimator) for estimator in ("mp", "spectrum"))
        row = {
            "shape": [rows, cols],
            "signal_share": {"mp": ours.signal_rank / rows, "spectrum": theirs.signal_rank / rows},
            "snr_spectrum": theirs.snr if math.isfinite(theirs.snr) else None,
        }
        rows_.append(row)
        snr = f"{theirs.snr:.3g}" if math.isfinite(theirs.snr) else "infinite"
        print(
            f"| {rows} × {cols} | {rows / cols:.2g} | {row['signal_share']['mp']:.1%} | "
            f"{row['signal_share']['spectrum']:.0%} | {snr} |"
        )
    return rows_


def measure_scale() -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(512, 20, generator=draw), torch.randn(20, 512, generator=draw)
    weights = torch.randn(512, 512, generator=draw) + 0.15 * left @ right
    rows_ = []
    print("\n| weights | `mp`: SNR | published: SNR |\n|---|---|---|")
    for factor in (0.1, 1.0, 10.0):
        values = batched_singular_values([factor * weights.double()])[0].values
        ours, theirs = (signal_to_noise(values, 512, 512, estimator).snr for estimator in ("mp", "spectrum"))
        rows_.append({"factor": factor, "mp": ours, "spectrum": theirs})
        print(f"| {factor:g} W | {ours:.4f} | {theirs:.4g} |")
    return rows_


def in_layers(found: Scan) -> list[MatrixScan]:
    return [matrix for matrix in found.matrices if matrix.layer is not None]


def pairs(model: str) -> dict[str, list[tuple[MatrixScan, MatrixScan]]]:
    """Kind -> the scans (ours, published) of its layers."""
    ours, theirs = (scan(model, estimator=estimator, control=True) for estimator in ("mp", "spectrum"))
    published = {matrix.name: matrix for matrix in theirs.matrices}
    kinds: dict[str, list[tuple[MatrixScan, MatrixScan]]] = {}
    for kind in kinds_in_order(in_layers(ours)):
        kinds[kind] = [(m, published[m.name]) for m in in_layers(ours) if m.kind == kind]
    return kinds


def top_quarter(members: Sequence[MatrixScan]) -> list[int]:
    (choice,) = choose_per_kind({m.name: m.snr for m in members}, {m.name: m.kind for m in members}, 0.25)
    layers = {m.name: m.layer for m in members}
    return sorted(layer for name in choice.chosen if (layer := layers[name]) is not None)


def measure_model(model: str) -> list[dict]:
    rows_ = []
    kinds = pairs(model)
    names = short_kinds(kinds)
    print(f"\n{model}\n")
    print("| kind | rank correlation | top quarter, `mp` | top quarter, published | in both ", end="")
    print("| shuffled: signal, `mp` | shuffled: signal, published |\n|---|---|---|---|---|---|---|")
    for kind, members in kinds.items():
        ours, theirs = [m for m, _ in members], [m for _, m in members]
        size = min(ours[0].shape)
        first, second = top_quarter(ours), top_quarter(theirs)
        shuffled = {
            name: statistics.fmean(m.control.signal_rank for m in found if m.control is not None) / size
            for name, found in (("mp", ours), ("spectrum", theirs))
        }
        favourite = max((m for m in theirs if math.isfinite(m.snr)), key=lambda m: m.snr)
        passed_over = max(ours, key=lambda m: m.snr)
        by_name = {m.name: i for i, m in enumerate(ours)}
        ranked = sorted((m.snr for m in theirs), reverse=True)
        row = {
            "kind": names[kind],
            "layers": len(members),
            "values": size,
            "correlation": float(spearmanr([m.snr for m in ours], [m.snr for m in theirs])[0]),
            "top_quarter": {"mp": first, "spectrum": second},
            "infinite": sum(math.isinf(m.snr) for m in theirs),
            "shuffled_signal_share": shuffled,
            "published_first": {
                "layer": favourite.layer,
                "signal_rank": ours[by_name[favourite.name]].signal_rank,
                "snr_db": ours[by_name[favourite.name]].snr_db,
            },
            "mp_first": {
                "layer": passed_over.layer,
                "signal_rank": passed_over.signal_rank,
                "snr_db": passed_over.snr_db,
                "published_place": ranked.index(theirs[by_name[passed_over.name]].snr) + 1,
            },
        }
        rows_.append(row)
        print(
            f"| {names[kind]} | {row['correlation']:+.2f} | {_list(first)} | {_list(second)} | "
            f"{len(set(first) & set(second))} | {shuffled['mp']:.1%} | {shuffled['spectrum']:.0%} |"
        )
    print(
        "\n| kind | first by published: its signal rank, SNR | first by `mp`: its signal rank, SNR, published place |"
    )
    print("|---|---|---|")
    for row in rows_:
        one, other = row["published_first"], row["mp_first"]
        print(
            f"| {row['kind']} | layer {one['layer']}: {_strength(one, row)} | layer {other['layer']}: "
            f"{_strength(other, row)}, {other['published_place']} of {row['layers']} |"
        )
    if infinite := sum(row["infinite"] for row in rows_):
        print(f"\n{infinite} published ratios are infinite")
    draw_ranks(model, kinds, names)
    save_heat_map(scan(model), FIGURES / f"snr-{Path(model).name}.png")
    return rows_


def measure_outliers(model: str) -> list[dict]:
    """Prints the matrices that keep signal when shuffled: their largest entry, and the signal left without it."""
    rows_ = []
    weights = {matrix.name: matrix for matrix in stored_matrices(local_folder(model))}
    print("\n| keeps signal when shuffled | signal rank then | largest entry, in standard deviations | cut at 6 |")
    print("|---|---|---|---|")
    for matrix in scan(model, control=True).matrices:
        if matrix.control is not None and matrix.control.signal_rank:
            entries = weights[matrix.name].load().double()
            deviation = entries.std()
            cut = entries.clamp(-6 * deviation, 6 * deviation).flatten()
            order = torch.randperm(cut.numel(), generator=torch.Generator().manual_seed(0))
            values = batched_singular_values([cut[order].view(entries.shape)])[0].values
            row = {
                "name": matrix.name,
                "shuffled_signal_rank": matrix.control.signal_rank,
                "largest_over_deviation": float(entries.abs().max() / deviation),
                "shuffled_signal_rank_cut": signal_to_noise(values, *entries.shape).signal_rank,
            }
            rows_.append(row)
            print(
                f"| {row['name']} | {row['shuffled_signal_rank']} | {row['largest_over_deviation']:.0f} | "
                f"{row['shuffled_signal_rank_cut']} |"
            )
    return rows_


def _strength(first: dict, row: dict) -> str:
    level = f"{first['snr_db']:.1f} dB".replace("-", "−") if first["signal_rank"] else "no signal"
    return f"{first['signal_rank']} of {row['values']}, {level}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# Figures


def draw_both(axes: Axes, found: SingularValues, matrix: MatrixScan, title: str) -> None:
    """Draws the histogram with our law and edge and with the published edge."""
    draw_histogram(axes, found, matrix, legend=False)
    rows, cols = found.alive
    theirs = signal_to_noise(found.values, rows, cols, "spectrum")
    axes.axvline(theirs.edge, color=PUBLISHED_EDGE, linewidth=1.4, linestyle=(0, (1, 1.5)), label="published edge")
    axes.set_title(
        f"{title}\nsignal: {matrix.signal_rank} of {len(found.values)}; published: {theirs.signal_rank}", fontsize=8
    )


def legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    labels = [label.split(":")[0] if label.startswith(("noise:", "signal:")) else label for label in labels]
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8, frameon=False)


def draw_noise() -> None:
    figure = Figure(figsize=(10, 3.2), dpi=140, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.1, 1, 0.9))  # type: ignore[union-attr]
    for axes, (rows, cols) in zip(figure.subplots(1, 3), [s for s in NOISE_SHAPES if s != (1024, 1536)], strict=True):
        found = noise(rows, cols)
        draw_both(axes, found, describe_scan("noise", found), f"Gaussian noise, {rows} × {cols}")
    legend(figure, figure.axes[0])
    save(figure, "published-noise")


def draw_model(model: str, kind: str) -> None:
    """Draws the matrix of a kind that the published formula ranks first, and the one that ours ranks first."""
    members = next(found for name, found in pairs(model).items() if name.endswith(kind))
    theirs = max((m for _, m in members if math.isfinite(m.snr)), key=lambda m: m.snr)
    ours = max((m for m, _ in members), key=lambda m: m.snr)
    figure = Figure(figsize=(10, 3.4), dpi=140, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.1, 1, 0.9))  # type: ignore[union-attr]
    for axes, name, title in zip(
        figure.subplots(1, 2), (theirs.name, ours.name), ("published puts first: ", "mp puts first: "), strict=True
    ):
        ((found, matrix),) = measured_singular_values(model, [name])
        draw_both(axes, found, matrix, title + name.removeprefix("model."))
    legend(figure, figure.axes[0])
    save(figure, f"published-{model}-{kind}")


def draw_ranks(model: str, kinds: dict[str, list[tuple[MatrixScan, MatrixScan]]], names: dict[str, str]) -> None:
    """Draws each layer's place by our ratio against its place by the published ratio; 1 is the highest."""
    columns = 4
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(10, 2.6 * lines), dpi=140, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (kind, members) in zip(panels, kinds.items(), strict=False):
        size = len(members)
        ours, theirs = (scipy.stats.rankdata([-m.snr for m in found]) for found in zip(*members, strict=True))
        quarter = max(1, math.ceil(size / 4)) + 0.5
        axes.axvspan(0.5, quarter, color="#e9eef5", linewidth=0)
        axes.axhspan(0.5, quarter, color="#e9eef5", linewidth=0)
        axes.scatter(ours, theirs, s=14, color="#1f4e79", linewidths=0, zorder=3)
        axes.set_xlim(0.5, size + 0.5)
        axes.set_ylim(0.5, size + 0.5)
        axes.set_aspect("equal")
        axes.set_title(f"{names[kind]}: {spearmanr(ours, theirs)[0]:+.2f}".replace("-", "−"), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("place by mp", fontsize=7)
        axes.set_ylabel("place by published", fontsize=7)
    for axes in list(panels):
        axes.set_axis_off()
    for axes in figure.axes[len(kinds) :]:
        axes.set_axis_off()
    save(figure, f"published-{model}-ranks")


def save(figure: Figure, name: str) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="models, as `sgm scan` takes them")
    options = parser.parse_args()
    matplotlib.rcdefaults()
    start = time.perf_counter()
    rows = {"noise": measure_noise(), "scale": measure_scale(), **{m: measure_model(m) for m in options.models}}
    rows["outliers"] = [row | {"model": m} for m in options.models for row in measure_outliers(m)]
    draw_noise()
    if MODELS[0] in options.models:
        draw_model(MODELS[0], "v_proj")
    chosen = ["--models", *options.models] if tuple(options.models) != MODELS else []
    command = " ".join(["python benchmarks/published_formula.py", *chosen])
    append_run("published_formula", command, start, rows, ("torch", "numpy", "scipy"), seed=0)


if __name__ == "__main__":
    main()
