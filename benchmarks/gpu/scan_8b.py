"""Measures `sgm scan` on an 8B checkpoint, which it writes first: seconds, matrices, and the process' peak memory.

python benchmarks/gpu/scan_8b.py --out gpu-results/scan.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from checkpoint import checkpoint_folder, write_checkpoint
from llama_8b import DEVICE, LLAMA_8B, PICO
from record import update
from recording import versions


def measure_scan(model: Path, repeats: int) -> list[dict]:
    """Rows of `repeats` scans, each in a process of its own, without what an earlier one remembered."""
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            asked = [sys.executable, "-m", "sgm_finetune", "scan", str(model), "--output", f"{cache}/scan.json"]
            began = time.perf_counter()
            process = subprocess.Popen(asked, env=os.environ | {"SGM_CACHE": cache})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if status:
                raise SystemExit(f"sgm scan ended with {process.returncode}")
            found = json.loads(Path(cache, "scan.json").read_text(encoding="utf-8"))
            rows.append(
                {
                    "seconds": round(time.perf_counter() - began, 1),
                    "matrices": len(found["matrices"]),
                    "peak_resident_bytes": usage.ru_maxrss * 1024,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pico", action="store_true")
    options = parser.parse_args()
    folder = checkpoint_folder(options.out, options.pico)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    update(options.out, device=device, versions=versions(("torch",)), cores=os.cpu_count())
    update(options.out, writing_seconds=write_checkpoint(folder, PICO if options.pico else LLAMA_8B, DEVICE))
    update(options.out, rows=measure_scan(folder, 1 if options.pico else 2))


if __name__ == "__main__":
    main()
