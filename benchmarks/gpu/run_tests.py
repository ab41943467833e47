"""Runs tests that need a GPU in one process, and writes each result as soon as it is known.

    python benchmarks/gpu/run_tests.py --out gpu-results/tests.json tests/test_gpu.py [-k NAME]

One process, because an error of the GPU stays in its process: the first failed test is the one to look at. Warnings do
not fail a test here, since the machine's libraries may be older or newer than those that the project pins.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
from record import update


class Recorder:
    """A plugin of pytest that keeps the outcome and the seconds of every test."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[dict] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            row["error"] = str(report.longrepr).strip().splitlines()[-25:]
        self.rows.append(row)
        update(self.out, rows=self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("files", nargs="+")
    parser.add_argument("-k", dest="chosen", default="", help="only tests whose names hold this")
    options = parser.parse_args()
    began = time.perf_counter()
    update(options.out, rows=[])
    alone = ["-o", "addopts=--import-mode=importlib", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", "-q"]
    status = pytest.main([*alone, *options.files, "-k", options.chosen], plugins=[Recorder(options.out)])
    update(options.out, seconds=round(time.perf_counter() - began, 1))
    raise SystemExit(int(status))


if __name__ == "__main__":
    main()
