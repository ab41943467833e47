"""Measures the errors of the signal-to-noise estimators on matrices with known noise and signal.

    python benchmarks/snr_accuracy.py [--seed 0] [--quick]
    python benchmarks/snr_accuracy.py --model FOLDER [--label NAME]

- Spikes: for each shape and fraction of signal, a Gaussian noise matrix with σ = 1 plus orthogonal spikes, either
  strong (1.5 to 10 times the noise edge) or weak (2 to 4 times the detectable limit).
- Noise: singular values of Gaussian matrices of 64 to 8192 values at six aspect ratios, drawn from their bidiagonal
  form (Dumitriu & Edelman 2002).

The script prints means over the trials and appends them to benchmarks/results/snr_accuracy.json: the error of σ (plain
median, ours), the error of the spike count, and the fraction of pure noise that is called signal, for our estimator
(mp) and the published formula (spectrum).

With --model it measures the layers of a real model instead. For each kind of matrix: the range of SNR and signal rank,
the rank correlation of the two SNRs over the layers, and the distance of the values below the edge from the
Marchenko-Pastur law (largest difference of the distribution functions; 0 is noise).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time

import numpy as np
import scipy
import scipy.stats
import torch
from recording import append_run
from scipy.linalg import eigvalsh_tridiagonal

from sgm_finetune.measure.scan import scan
from sgm_finetune.method.singular_values import singular_values
from sgm_finetune.method.snr import bulk_median, distance_from_noise, noise_edge, signal_to_noise
from sgm_finetune.model.names import kind_of
from sgm_finetune.model.weights.stored import stored_matrices

SHAPES = [(8, 8), (8, 512), (64, 64), (64, 1280), (192, 576), (576, 576), (1536, 576), (1024, 1024), (1024, 256)]
SHARES = [0.0, 0.25, 0.5, 0.75]
NOISE_SIZES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
NOISE_ASPECTS = [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
QUICK = 4  # divisor of the number of trials, which stays at least 1


def num_trials(rows: int, cols: int) -> int:
    smaller = min(rows, cols)
    return 4000 if smaller <= 8 else 100 if smaller <= 64 else 8 if smaller <= 256 else 4


def matrix(rows: int, cols: int, strengths: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    def gaussian(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=draw, dtype=torch.float64)

    noise, rank = gaussian(rows, cols), len(strengths)
    if rank == 0:
        return noise
    left, right = (torch.linalg.qr(gaussian(side, rank)).Q for side in (rows, cols))
    return noise + (left * strengths) @ right.T


def noise_spectrum(rows: int, cols: int, draw: np.random.Generator) -> torch.Tensor:
    """Singular values of a Gaussian matrix, rows >= cols, from a bidiagonal of χ variables."""
    diagonal = draw.chisquare(rows - np.arange(cols))
    lower = draw.chisquare(cols - 1 - np.arange(cols - 1))
    squares = eigvalsh_tridiagonal(diagonal + np.r_[0, lower], np.sqrt(diagonal[:-1] * lower))
    return torch.from_numpy(np.sqrt(np.maximum(squares, 0))[::-1].copy())


def errors(spectra: list[torch.Tensor], rows: int, cols: int, rank: int) -> dict:
    plain, sigma, counts, published = [], [], [], []
    larger, smaller = max(rows, cols), min(rows, cols)
    for s in spectra:
        plain.append(float(s.quantile(0.5)) / (math.sqrt(larger) * bulk_median(smaller / larger)) - 1)
        found = signal_to_noise(s, rows, cols)
        sigma.append(found.sigma - 1)
        counts.append(found.signal_rank - rank)
        published.append(signal_to_noise(s, rows, cols, "spectrum").signal_rank - rank)
    return {
        "shape": [rows, cols],
        "signal_rank": rank,
        "trials": len(spectra),
        "sigma_error_plain_median": statistics.fmean(plain),
        "sigma_error_mean": statistics.fmean(sigma),
        "sigma_error_rms": math.sqrt(statistics.fmean(e * e for e in sigma)),
        "count_error_mean": statistics.fmean(counts),
        "count_error_largest": max(map(abs, counts)),
        "wrong_share": statistics.fmean(map(abs, counts)) / smaller,
        "count_error_mean_spectrum": statistics.fmean(published),
        "wrong_share_spectrum": statistics.fmean(map(abs, published)) / smaller,
    }


def measure_model(folder: str) -> list[dict]:
    """One row per kind of layer matrix."""
    chosen = {matrix.name for matrix in scan(folder).matrices if matrix.layer is not None}
    kinds: dict[str, list[tuple]] = {}
    for matrix in stored_matrices(folder):
        if matrix.name in chosen:
            s, shape = singular_values(matrix.load()), matrix.shape
            found = signal_to_noise(s, *shape)
            far = distance_from_noise(s, *shape, found.signal_rank)
            kind = kind_of(matrix.name)
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
    """One row per shape, share of signal and strength of the spikes."""
    draw = torch.Generator().manual_seed(seed)
    rows_ = []
    for rows, cols in SHAPES:
        limit, edge = (rows * cols) ** 0.25, noise_edge(1.0, rows, cols)
        trials = max(1, num_trials(rows, cols) // (QUICK if quick else 1))
        for share in SHARES:
            for name, least, most in (("strong", 1.5 * edge, 10 * edge), ("weak", 2 * limit, 4 * limit)):
                if share == 0 and name == "weak":
                    continue
                rank = int(share * min(rows, cols))
                strengths = torch.linspace(least, most, rank, dtype=torch.float64)
                spectra = [torch.linalg.svdvals(matrix(rows, cols, strengths, draw)) for _ in range(trials)]
                rows_.append({"spikes": name if rank else "none", **errors(spectra, rows, cols, rank)})
                show(rows_[-1])
    return rows_


def measure_noise(seed: int, quick: bool) -> list[dict]:
    """One row per size and aspect ratio of pure noise."""
    draw = np.random.default_rng(seed)
    rows_ = []
    for size in NOISE_SIZES:
        for aspect in NOISE_ASPECTS:
            trials = max(2, min(1000, 400_000 // size // (8 if size >= 2048 else 1)) // (QUICK if quick else 1))
            rows = round(size / aspect)
            spectra = [noise_spectrum(rows, size, draw) for _ in range(trials)]
            rows_.append({"spikes": "none", "aspect": aspect, **errors(spectra, rows, size, 0)})
            show(rows_[-1])
    return rows_


HEAD = f"{'shape':>14} {'rank':>5} {'spikes':>7} {'σ plain':>8} {'σ mp':>8} {'rms':>7} {'count':>6} {'wrong mp':>9}"


def show(row: dict) -> None:
    print(
        f"{row['shape'][0]:>6} x {row['shape'][1]:<5} {row['signal_rank']:>5} {row['spikes']:>7} "
        f"{row['sigma_error_plain_median']:>+8.2%} {row['sigma_error_mean']:>+8.2%} {row['sigma_error_rms']:>7.2%} "
        f"{row['count_error_largest']:>6} {row['wrong_share']:>9.4%} {row['wrong_share_spectrum']:>9.2%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of the trials; writes nothing")
    parser.add_argument("--model", help="folder of a real model")
    parser.add_argument("--label", help="its name in the results")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.model:
        rows = measure_model(options.model)
    else:
        print(f"{HEAD} {'spectrum':>9}")
        rows = measure_planted(options.seed, options.quick) + measure_noise(options.seed, options.quick)
    if options.quick:
        return
    chosen = ["--model", options.label or "FOLDER"] if options.model else sys.argv[1:]
    command = " ".join(["python benchmarks/snr_accuracy.py", *chosen])
    append_run("snr_accuracy", command, start, rows, ("torch", "numpy", "scipy"), seed=options.seed)


if __name__ == "__main__":
    main()
