"""Files with random changes give a result or the one line of a UserError, never a traceback, a hang or a crash
(docs/untrusted.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from processes import environment

WORKER = Path(__file__).with_name("fuzz_worker.py")
READERS = 41


def fuzzed(inputs: int, seed: int) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(WORKER), str(inputs), str(seed)], capture_output=True, text=True, timeout=1500,
        env={**environment(), "PYTHONIOENCODING": "utf-8:backslashreplace"},
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"reader"')]
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(rows) == READERS
    if sys.platform == "linux":
        assert max(row["most_seconds"] for row in rows) < 2
        assert max(row["most_mib"] for row in rows) < 200
    return rows


@pytest.mark.slow
def test_changed_files_give_a_result_or_one_line():
    rows = fuzzed(3, seed=0)
    assert all(row["inputs"] == 3 for row in rows)
    assert sum(row["errors"] for row in rows) > 6


@pytest.mark.slow
def test_thousands_of_changed_files_give_a_result_or_one_line():
    """SGM_SEED selects other files. SGM_RECORD=FILE appends the counts to FILE."""
    seed = int(os.environ.get("SGM_SEED", "1"))
    rows = fuzzed(500, seed)
    assert sum(row["inputs"] for row in rows) >= 10_000
    if file := os.environ.get("SGM_RECORD"):
        about = {"test": "fuzz", "seed": seed, "date": time.strftime("%Y-%m-%d")}
        about |= {name: version(name) for name in ("torch", "transformers", "hypothesis")}
        with open(file, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps({**about, **row}) + "\n" for row in rows)
