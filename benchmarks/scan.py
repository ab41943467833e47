"""Compares the speed and memory of the scan with those of the published algorithm on the same files.

    python benchmarks/scan.py [--repeats 3] [--layers 8]    speed and selection, for each shape of matrix
    python benchmarks/scan.py --memory [--folder DIR]       peak memory on a synthetic 8B checkpoint (16 GB on disk)
    python benchmarks/scan.py --precision                   float32 and bfloat16 products against float64

Speed: for each shape, the script writes a bfloat16 checkpoint of `--layers` matrices (noise with planted spikes, whose
strength differs between layers). Then it runs, interleaved, `repeats` times each and without remembered values: the
published algorithm (loads all of it as float32, calls `torch.linalg.svdvals` on each matrix, applies its formula) and
`scan`. It prints the median seconds per matrix, their ratio, and whether both choose the same layers at 25 and 50 %
with either estimator.

All runs are appended to benchmarks/results/scan.json. `--threads` (2) sets the threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from recording import append_run, processor
from safetensors import safe_open
from safetensors.torch import save_file

from sgm_finetune.measure.scan import scan
from sgm_finetune.method.selection import top_fraction_per_kind
from sgm_finetune.method.singular_values import exact_bfloat16_products, singular_values
from sgm_finetune.method.snr import signal_to_noise

SHAPES = [(1024, 4096), (4096, 1024), (4096, 4096), (4096, 14336), (14336, 4096)]
LLAMA_8B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
EMBEDDING = (128256, 4096)


def spiked_matrix(rows: int, cols: int, rank: int, strength: float, draw: torch.Generator) -> torch.Tensor:
    """Gaussian noise with `rank` spikes of 1 to 3 times `strength` noise edges, bfloat16, on the device of `draw`."""
    on = draw.device
    noise = torch.randn(rows, cols, generator=draw, device=on)
    left = torch.randn(rows, rank, generator=draw, device=on)
    right = torch.randn(rank, cols, generator=draw, device=on)
    edge = rows**0.5 + cols**0.5
    sizes = strength * edge * torch.linspace(1, 3, rank, device=on) / (rows * cols) ** 0.5
    return ((noise + (left * sizes) @ right) * 0.02).bfloat16()


def checkpoint(folder: Path, rows: int, cols: int, layers: int) -> None:
    draw = torch.Generator().manual_seed(0)
    folder.mkdir()
    for layer in range(layers):
        weights = spiked_matrix(rows, cols, 16 + 8 * layer, 1.2 + 0.15 * ((5 * layer) % layers), draw)
        file = folder / f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        save_file({f"model.layers.{layer}.proj.weight": weights}, file)


def published_values(folder: Path) -> dict[str, torch.Tensor]:
    """Singular values of every matrix of a model that is loaded in float32: the published algorithm."""
    model = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            model |= {name: tensors.get_tensor(name).float() for name in tensors.keys()}  # noqa: SIM118
    return {name.removesuffix(".weight"): torch.linalg.svdvals(weights) for name, weights in model.items()}


def chosen(snrs: dict[str, float], fraction: float) -> set[str]:
    return set(top_fraction_per_kind(snrs, dict.fromkeys(snrs, "proj"), fraction))


def measure_speed(layers: int, repeats: int) -> list[dict]:
    rows_ = []
    print(f"{'shape':>14} {'published':>10} {'sgm scan':>9} {'ratio':>6}   same selection at 25 and 50 %")
    for rows, cols in SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ["SGM_CACHE"] = str(Path(scratch) / "cache")
            folder = Path(scratch) / "model"
            checkpoint(folder, rows, cols, layers)
            published_values(folder), scan(folder, fresh=True)  # both warm: files in the page cache, libraries loaded
            seconds: dict[str, list[float]] = {"published": [], "scan": []}
            for _ in range(repeats):
                start = time.perf_counter()
                theirs = published_values(folder)
                seconds["published"].append((time.perf_counter() - start) / layers)
                start = time.perf_counter()
                scan(folder, fresh=True)
                seconds["scan"].append((time.perf_counter() - start) / layers)
            same = {}
            for estimator in ("mp", "spectrum"):
                ours = {m.name: m.snr for m in scan(folder, estimator=estimator).matrices}
                direct = {n: signal_to_noise(s, rows, cols, estimator).snr for n, s in theirs.items()}
                same[estimator] = all(chosen(ours, f) == chosen(direct, f) for f in (0.25, 0.5))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows_.append(
            {
                "shape": [rows, cols],
                "layers": layers,
                "seconds_per_matrix": {name: [round(v, 4) for v in values] for name, values in seconds.items()},
                "ratio": round(medians["published"] / medians["scan"], 2),
                "same_selection": same,
            }
        )
        print(
            f"{rows:>6} x {cols:<5} {medians['published']:>9.3f}s {medians['scan']:>8.3f}s "
            f"{rows_[-1]['ratio']:>5.1f}x   "
            + ", ".join(f"{name}: {'yes' if equal else 'NO'}" for name, equal in same.items()),
            flush=True,
        )
    return rows_


def synthetic_8b(folder: Path, layers: int) -> None:
    """Writes a checkpoint of LLaMA-3-8B's shapes, one shard a layer, with an index; keeps finished shards."""
    folder.mkdir(parents=True, exist_ok=True)
    total = layers + 1
    index = {}
    for number in range(total):
        file = folder / f"model-{number + 1:05d}-of-{total:05d}.safetensors"
        if number < layers:
            shapes = {f"model.layers.{number}.{name}.weight": shape for name, shape in LLAMA_8B.items()}
        else:
            shapes = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": EMBEDDING}
        index |= dict.fromkeys(shapes, file.name)
        if not file.exists():
            draw = torch.Generator().manual_seed(number)
            rank = 16 + 4 * number
            tensors = {name: spiked_matrix(*shape, rank, 1.2 + 0.02 * number, draw) for name, shape in shapes.items()}
            save_file(tensors, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
        print(f"\rmade {number + 1} of {total} shards", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def measure_memory(folder: Path, layers: int) -> list[dict]:
    """Peak resident memory of `sgm scan` in a separate process.

    Another process makes the checkpoint: what a parent had in memory would count as its child's.
    """
    maker = multiprocessing.get_context("spawn").Process(target=synthetic_8b, args=(folder, layers))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    largest = EMBEDDING[0] * EMBEDDING[1] * 4
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-c", "from sgm_finetune.commands.cli import main; main()", "scan", str(folder)]
        environment = os.environ | {"SGM_CACHE": scratch}
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--output", f"{scratch}/scan.json"], env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
        num_matrices = len(json.loads(Path(scratch, "scan.json").read_text())["matrices"])
    row = {
        "layers": layers,
        "matrices": num_matrices,
        "seconds": round(seconds, 1),
        "peak_resident_bytes": peak,
        "largest_matrix_float32_bytes": largest,
        "limit_bytes": 3 * largest + 10**9,
    }
    print(
        f"{num_matrices} matrices, {layers} layers: {seconds:.0f} s, peak {peak / 1e9:.2f} GB "
        f"(largest matrix in float32 {largest / 1e9:.2f} GB; limit {row['limit_bytes'] / 1e9:.2f} GB)"
    )
    return [row]


def measure_precision() -> list[dict]:
    """Errors against a float64 decomposition of the same bfloat16 matrix, with spikes of 0 to 1000 noise levels."""
    rows_ = []
    for rows, cols in ((1024, 1024), (4096, 1024), (2048, 2048)):
        for times in (0, 10, 100, 300, 1000):
            draw = torch.Generator().manual_seed(1)
            weights = torch.randn(rows, cols, generator=draw)
            for i in range(3 if times else 0):
                left, right = torch.randn(rows, 1, generator=draw), torch.randn(1, cols, generator=draw)
                weights += times * 0.9**i * rows**0.5 * left / left.norm() @ right / right.norm()
            weights = weights.bfloat16()
            exact = torch.linalg.svdvals(weights.double())
            expected = signal_to_noise(exact, rows, cols)
            products = weights.float().T @ weights.float()
            plain = torch.linalg.eigvalsh(products).flip(0).double().clamp_min(0).sqrt()
            with exact_bfloat16_products(True):
                ours = singular_values(weights)
            row = {"shape": [rows, cols], "largest_over_median": round(float(exact[0] / exact.median()), 1)}
            for name, values in (("float32_gram", plain), ("scan", ours)):
                errors = ((values - exact) / exact).abs()
                found = signal_to_noise(values, rows, cols)
                row[name] = {
                    "upper_half": errors[: cols // 2].max().item(),
                    "lower_quartile": errors[3 * cols // 4].item(),
                    "smallest": errors[-1].item(),
                    "sigma": abs(found.sigma / expected.sigma - 1),
                    "signal_rank": [found.signal_rank, expected.signal_rank],
                }
            rows_.append(row)
            print(json.dumps(row), flush=True)
    return rows_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="matrices of a shape (--memory: layers of the model, 32)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--folder", type=Path, help="folder in which the 8B checkpoint is written and kept")
    parser.add_argument("--precision", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    if options.memory:
        layers = options.layers if "--layers" in sys.argv else 32
        if options.folder:
            rows = measure_memory(options.folder, layers)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                rows = measure_memory(Path(scratch) / "model", layers)
    elif options.precision:
        rows = measure_precision()
    else:
        rows = measure_speed(options.layers, options.repeats)
    arguments = [a for a in sys.argv[1:] if a != "--folder" and a != str(options.folder)]
    command = " ".join(["python benchmarks/scan.py", *arguments])
    append_run("scan", command, start, rows, ("torch",), threads=options.threads, cores=os.cpu_count(), **processor())


if __name__ == "__main__":
    main()
