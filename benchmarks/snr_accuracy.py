"""How exact the signal-to-noise estimators are, on matrices whose noise and signal are known.

    python benchmarks/snr_accuracy.py [--seed 0] [--quick]
    python benchmarks/snr_accuracy.py --model FOLDER [--label NAME]

For each shape and share of signal: a Gaussian noise matrix with σ = 1, plus orthogonal spikes of 1.5 to 10 times the
noise edge. Printed and appended to benchmarks/results/snr_accuracy.json: the mean over the trials of σ's error (plain
median, deflated median), of the error of the spike count, and of the share of pure noise that is called signal, for
our estimator (mp) and the published formula (spectrum).

With --model, the layers of a real model instead, per kind of matrix: range of SNR and signal rank, rank correlation of
the two SNRs over the layers, and how far the values below the edge are from the Marchenko-Pastur law (largest
difference of the distribution functions; 0 is noise).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy
import scipy
import scipy.stats
import torch

from sgm_finetune.measure.scan import kind_of, scan
from sgm_finetune.measure.weights import stored_matrices
from sgm_finetune.method.snr import bulk_median, noise_edge, signal_to_noise, singular_values

RESULTS = Path(__file__).parent / "results" / "snr_accuracy.json"
SHAPES = [(8, 8), (8, 512), (64, 64), (64, 1280), (192, 576), (576, 576), (1536, 576), (1024, 1024), (1024, 256)]
SHARES = [0.0, 0.25, 0.5, 0.75]
QUICK = 4  # smallest number of trials stays 1


def num_trials(rows: int, cols: int) -> int:
    smaller = min(rows, cols)
    return 4000 if smaller <= 8 else 100 if smaller <= 64 else 8 if smaller <= 256 else 4


def matrix(rows: int, cols: int, rank: int, draw: torch.Generator) -> torch.Tensor:
    def gaussian(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=draw, dtype=torch.float64)

    noise = gaussian(rows, cols)
    if rank == 0:
        return noise
    strength = noise_edge(1.0, rows, cols) * torch.linspace(1.5, 10, rank, dtype=torch.float64)
    left, right = (torch.linalg.qr(gaussian(side, rank)).Q for side in (rows, cols))
    return noise + (left * strength) @ right.T


def measure(rows: int, cols: int, share: float, trials: int, draw: torch.Generator) -> dict:
    rank = int(share * min(rows, cols))
    plain, deflated, counts, published = [], [], [], []
    for _ in range(trials):
        s = torch.linalg.svdvals(matrix(rows, cols, rank, draw))
        larger, smaller = max(rows, cols), min(rows, cols)
        plain.append(float(s.quantile(0.5)) / (math.sqrt(larger) * bulk_median(smaller / larger)) - 1)
        found = signal_to_noise(s, rows, cols)
        deflated.append(found.sigma - 1)
        counts.append(found.signal_rank - rank)
        published.append(signal_to_noise(s, rows, cols, "spectrum").signal_rank - rank)
    smaller = min(rows, cols)
    return {
        "shape": [rows, cols],
        "signal_rank": rank,
        "trials": trials,
        "sigma_error_plain_median": statistics.fmean(plain),
        "sigma_error_mean": statistics.fmean(deflated),
        "sigma_error_rms": math.sqrt(statistics.fmean(e * e for e in deflated)),
        "count_error_mean": statistics.fmean(counts),
        "count_error_largest": max(map(abs, counts)),
        "wrong_share": statistics.fmean(map(abs, counts)) / smaller,
        "count_error_mean_spectrum": statistics.fmean(published),
        "wrong_share_spectrum": statistics.fmean(map(abs, published)) / smaller,
    }


def distance_from_noise(s: torch.Tensor, rows: int, cols: int, sigma: float, rank: int) -> float:
    """Largest difference between the distribution of s below the `rank` largest and the Marchenko-Pastur law."""
    m, n = max(rows, cols) - rank, min(rows, cols) - rank
    aspect = n / m
    grid = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)  # y² = 1 + β + 2√β·cos θ
    density = 2 * grid.sin().square() / (1 + aspect + 2 * math.sqrt(aspect) * grid.cos()).clamp(min=1e-12) / math.pi
    above = torch.cumulative_trapezoid(density, grid)
    y = s[rank:] / (sigma * math.sqrt(m))
    theta = ((y.square() - 1 - aspect) / (2 * math.sqrt(aspect))).clamp(-1, 1).acos()
    law = 1 - above[(theta / math.pi * 20_000).long().clamp(max=19_999)]
    share = 1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return float((law - share).abs().max())


def measure_model(folder: str) -> list[dict]:
    """One row per kind of layer matrix."""
    chosen = {f"{matrix.name}.weight" for matrix in scan(folder).matrices}
    kinds: dict[str, list[tuple]] = {}
    for matrix in stored_matrices(folder):
        if matrix.name in chosen:
            s, shape = singular_values(matrix.load()), matrix.shape
            found = signal_to_noise(s, *shape)
            far = distance_from_noise(s, *shape, found.sigma, found.signal_rank)
            kind = kind_of(matrix.name.removesuffix(".weight"))
            kinds.setdefault(kind, []).append((found, signal_to_noise(s, *shape, "spectrum").snr, far, min(shape)))
    rows = []
    for kind, members in kinds.items():
        levels = [found.snr_db for found, *_ in members]
        ranks = [found.signal_rank for found, *_ in members]
        rows.append(
            {
                "kind": kind,
                "layers": len(members),
                "values": members[0][3],
                "snr_db": [min(levels), statistics.median(levels), max(levels)],
                "signal_rank": [min(ranks), statistics.median(ranks), max(ranks)],
                "at_limit": sum(rank >= size - size // 8 for rank, (*_, size) in zip(ranks, members, strict=True)),
                "distance_from_noise": [min(m[2] for m in members), max(m[2] for m in members)],
                "correlation_with_spectrum": float(scipy.stats.spearmanr(levels, [m[1] for m in members])[0]),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_planted(seed: int, quick: bool) -> list[dict]:
    """One row per shape and share of signal."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    print(
        f"{'shape':>12} {'rank':>5} {'σ plain':>8} {'σ mp':>8} {'rms':>7} {'count':>8} {'wrong mp':>9} {'spectrum':>9}"
    )
    for shape in SHAPES:
        for share in SHARES:
            trials = num_trials(*shape)
            row = measure(*shape, share, max(1, trials // QUICK) if quick else trials, draw)
            rows.append(row)
            print(
                f"{shape[0]:>5} x {shape[1]:<4} {row['signal_rank']:>5} {row['sigma_error_plain_median']:>+8.2%} "
                f"{row['sigma_error_mean']:>+8.2%} {row['sigma_error_rms']:>7.2%} {row['count_error_largest']:>8} "
                f"{row['wrong_share']:>9.4%} {row['wrong_share_spectrum']:>9.2%}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of the trials; nothing is written")
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--label", help="its name in the results")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = measure_model(options.model) if options.model else measure_planted(options.seed, options.quick)
    if options.quick:
        return
    run = {
        "command": "python benchmarks/snr_accuracy.py"
        + (f" --model {options.label or 'FOLDER'}" if options.model else "".join(f" {a}" for a in sys.argv[1:])),
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*runs, run], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
