"""Runs what waits for a GPU: `make gpu`. docs/gpu.md says what each item settles.

    make gpu                                  every item, most valuable first
    make gpu ARGS=--list                      what there is, its time limit and its bytes; nothing runs
    make gpu ARGS="--only step graphs"        some of them
    make gpu ARGS="--seconds 560"             ends after that time; the item that runs then keeps what it measured
    make gpu ARGS=--pico                      every item in seconds on a CPU: shows that the list works

Each item is a process with its own time limit and its own file in --results, which holds every number as soon as it is
measured. An item that fails does not stop the list. Where a folder gpu-pack/ exists (`make gpu-pack`), its wheels are
installed into a scratch folder first. This script itself needs Python alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from items import ITEMS, Item  # noqa: E402
from record import read, update  # noqa: E402
from unpack import unpack  # noqa: E402

PICO_SECONDS = 300
"""Time limit of an item with --pico."""
_KEPT = 6000
"""Characters of an item's output that its results file keeps, from the end."""


def command(item: Item, results: Path, pico: bool) -> list[str]:
    places = {"out": results / f"{item.name}.json", "step": results / "step.json"}
    return [sys.executable, item.script, *(a.format(**places) for a in (item.pico if pico else item.arguments))]


def run(item: Item, results: Path, pico: bool, limit: float, environment: dict[str, str]) -> str:
    """Runs one item and returns how it ended: done, failed or time limit. Whatever it started ends with it."""
    out = results / f"{item.name}.json"
    asked = command(item, results, pico)
    began = time.perf_counter()
    update(out, item=item.name, date=time.strftime("%Y-%m-%d"), pico=pico, limit=round(limit), status="running",
           command=" ".join(["python", *asked[1:]]))  # fmt: skip
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            asked, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        try:
            ended = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "time limit"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        output = said.read().decode(errors="replace")[-_KEPT:]
    update(out, status=ended, wall_seconds=round(time.perf_counter() - began, 1), output=output)
    return ended


def listing(items: list[Item], pack: Path | None) -> str:
    """Every item with its time limit, the GPU's memory that it needs, and what it needs of the pack."""
    lines = []
    for item in items:
        lines.append(f"{item.name}: up to {item.seconds} s, {item.gib} GiB of the GPU; carries {_carried(item, pack)}")
        lines.append(f"    {item.settles}")
        lines.append(f"    python {item.script} {' '.join(item.arguments)}")
    minutes = sum(item.seconds for item in items) / 60
    return "\n".join([*lines, f"{len(items)} items, {minutes:.0f} minutes at most"])


def _carried(item: Item, pack: Path | None) -> str:
    if pack is None:
        return f"{', '.join(item.packs)} (make gpu-pack says their sizes)"
    return ", ".join(f"{name} {_bytes(pack / name) / 1e6:.1f} MB" for name in item.packs)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def has_gpu(environment: dict[str, str]) -> bool:
    asked = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(asked, env=environment, stderr=subprocess.DEVNULL).returncode == 0


def run_all(items: list[Item], options: argparse.Namespace, pack: Path | None) -> int:
    """Runs the items one after the other; 1 if one of them failed, else 0."""
    began = time.perf_counter()
    failed = False
    options.results.mkdir(parents=True, exist_ok=True)
    for item in items:
        left = options.seconds - (time.perf_counter() - began)
        if left < 1:
            print(f"{item.name}: not begun, the time is over", flush=True)
            continue
        limit = min(left, PICO_SECONDS if options.pico else item.seconds)
        out = options.results / f"{item.name}.json"
        if not item.resumes or read(out).get("pico", False) != options.pico:
            out.unlink(missing_ok=True)
        try:
            found = unpack(pack, item.packs) if pack is not None else {}
            ended = run(item, options.results, options.pico, limit, surroundings(found))
        except (OSError, subprocess.CalledProcessError) as error:  # the pack cannot be installed
            ended = "failed"
            update(out, status=ended, wall_seconds=0.0, output=str(error))
        failed |= ended == "failed"
        taken = read(out)
        print(f"{item.name}: {ended} after {taken['wall_seconds']} s", flush=True)
        if ended == "failed":
            print("    " + "\n    ".join(taken["output"].splitlines()[-12:]), flush=True)
    print(f"Results: {options.results}", flush=True)
    return int(failed)


def leave_in_order() -> None:
    """Makes this process end by an exception where it is asked to end, so that the item that runs ends with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def surroundings(found: dict[str, str]) -> dict[str, str]:
    """The environment of the items: this repository's code, then what the pack holds, then what was there."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
    paths += [found.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return os.environ | quiet | found | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [item.name for item in ITEMS]
    parser.add_argument("--list", action="store_true", help="show the items; nothing runs")
    parser.add_argument("--pico", action="store_true", help="every item in seconds on a CPU")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="ITEM", help=", ".join(names))
    parser.add_argument("--results", type=Path, help="folder of the results files (gpu-results; gpu-results/pico)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for all items together")
    parser.add_argument("--pack", type=Path, help="folder that `make gpu-pack` made (gpu-pack, if it exists)")
    options = parser.parse_args()
    items = [item for item in ITEMS if item.name in options.only]
    kept = ROOT / "gpu-pack"
    pack = options.pack or (kept if kept.is_dir() and not options.pico else None)
    if options.list:
        print(listing(items, pack))
        return
    options.results = (options.results or ROOT / "gpu-results" / ("pico" if options.pico else "")).resolve()
    if not options.pico and not has_gpu(surroundings({})):
        print("PyTorch finds no GPU here; --pico tries every item on the CPU, --list shows them", file=sys.stderr)
        raise SystemExit(2)
    leave_in_order()
    raise SystemExit(run_all(items, options, pack))


if __name__ == "__main__":
    main()
