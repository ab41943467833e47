"""How exact the signal-to-noise estimators are, on matrices whose noise and signal are known.

    python benchmarks/snr_accuracy.py [--seed 0] [--quick]

For each shape and share of signal: a Gaussian noise matrix with σ = 1, plus orthogonal spikes of 1.5 to 10 times the
noise edge. Printed and appended to benchmarks/results/snr_accuracy.json: the mean over the trials of σ's error (plain
median, deflated median), of the error of the spike count, and of the share of pure noise that is called signal, for
our estimator (mp) and the published formula (spectrum).
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
import torch

from sgm_finetune.method.snr import bulk_median, noise_edge, signal_to_noise

RESULTS = Path(__file__).parent / "results" / "snr_accuracy.json"
SHAPES = [(8, 8), (8, 512), (64, 64), (64, 1280), (192, 576), (576, 576), (1536, 576), (1024, 1024), (1024, 256)]
SHARES = [0.0, 0.25, 0.5]
QUICK = 4  # smallest number of trials stays 1


def num_trials(rows: int, cols: int) -> int:
    smaller = min(rows, cols)
    return 5000 if smaller <= 8 else 500 if smaller <= 64 else 20 if smaller <= 256 else 8


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a quarter of the trials; nothing is written")
    options = parser.parse_args()
    draw = torch.Generator().manual_seed(options.seed)
    start = time.perf_counter()
    rows = []
    print(
        f"{'shape':>12} {'rank':>5} {'σ plain':>8} {'σ mp':>8} {'rms':>7} {'count ±':>8} {'wrong mp':>9} {'spectrum':>9}"
    )
    for shape in SHAPES:
        for share in SHARES:
            trials = num_trials(*shape)
            row = measure(*shape, share, max(1, trials // QUICK) if options.quick else trials, draw)
            rows.append(row)
            print(
                f"{shape[0]:>5} x {shape[1]:<4} {row['signal_rank']:>5} {row['sigma_error_plain_median']:>+8.2%} "
                f"{row['sigma_error_mean']:>+8.2%} {row['sigma_error_rms']:>7.2%} {row['count_error_largest']:>8} "
                f"{row['wrong_share']:>9.4%} {row['wrong_share_spectrum']:>9.2%}",
                flush=True,
            )
    if options.quick:
        return
    run = {
        "command": "python " + " ".join(["benchmarks/snr_accuracy.py", *sys.argv[1:]]),
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
