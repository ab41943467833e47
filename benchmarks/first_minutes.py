"""Times the first minutes: a clone, the installation, `make demo` to the report; appends them to a results file.

    python benchmarks/first_minutes.py            # on this processor, as it is
    python benchmarks/first_minutes.py --avx2     # as a processor computes that has neither AVX-512 nor bfloat16

The clone is of the last commit, into a new folder with a new virtual environment. The model comes from SGM's cache only
where --keep-cache says so; packages come from pip's cache where it has them. With --avx2 the libraries are held to AVX2
by their own switches, and the model computes in float32, which is what `model.dtype=auto` chooses on such a processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from recording import append_run, processor

ROOT = Path(__file__).parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="hold the libraries to AVX2, the model to float32")
    parser.add_argument("--keep-cache", action="store_true", help="use SGM's cache of models instead of a new one")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), options.avx2, options.keep_cache)
    command = " ".join(["python benchmarks/first_minutes.py", *_flags(options)])
    machine = {**processor(), "cores": len(os.sched_getaffinity(0)), "held_to_avx2": options.avx2}
    append_run("first_minutes", command, started, rows, ("torch", "transformers"), **machine)
    print(json.dumps(rows, indent=1))


def measure(scratch: Path, avx2: bool, keep_cache: bool) -> dict:
    """Seconds of each part (wall time), processor seconds of the demo, and the accuracy that it reached."""
    environment = {**os.environ, **(AVX2 if avx2 else {})}
    if not keep_cache:
        environment["SGM_CACHE"] = str(scratch / "cache")
    clone = scratch / "sgm"
    arguments = ["ARGS=model.dtype=float32"] if avx2 else []
    seconds = {
        "clone": _seconds(["git", "clone", "-q", str(ROOT), str(clone)], scratch, environment),
        "install": _seconds(["make", ".venv/installed"], clone, environment),
    }
    before = os.times()
    seconds["demo"] = _seconds(["make", "demo", *arguments], clone, environment)
    after = os.times()
    metrics = json.loads((clone / "output" / "metrics.json").read_text(encoding="utf-8"))
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "demo_processor_seconds": round(
            after.children_user + after.children_system - before.children_user - before.children_system, 1
        ),
        "run_seconds": metrics["seconds"],
        "accuracy": {when: metrics[when]["accuracy"] for when in ("before", "after")},
        "num_test": metrics["after"]["num_examples"],
        "report_bytes": (clone / "output" / "report.html").stat().st_size,
    }


def _seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return time.perf_counter() - started


def _flags(options: argparse.Namespace) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in vars(options).items() if value]


if __name__ == "__main__":
    main()
