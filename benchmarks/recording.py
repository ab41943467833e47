"""Appends a run to a results file: its command, date, versions, seconds and rows."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append_run(name: str, command: str, started: float, rows: Any, packages: tuple[str, ...], **more: Any) -> None:
    """Appends the run to benchmarks/results/`name`.json.

    `started`: time.perf_counter() at the beginning; `more`: further entries of the record, before the rows.
    """
    path = RESULTS / f"{name}.json"
    run = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        **more,
        "versions": versions(packages),
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.write_text(json.dumps([*runs, run], indent=1) + "\n", encoding="utf-8")


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The versions of Python and of the packages."""
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def processor() -> dict:
    """The processor's name, whether it has bfloat16 matrix units (AMX), and whether any bfloat16 instructions."""
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.exists() else ""
    name = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "processor": name or platform.machine(),
        "bfloat16_units": "amx_bf16" in text if text else None,
        "bfloat16_instructions": "amx_bf16" in text or "avx512_bf16" in text if text else None,
    }


def process_memory(key: str) -> float:
    """Memory of this process in MiB (Linux). VmRSS: resident; VmHWM: its peak; RssAnon: without files' pages."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024
