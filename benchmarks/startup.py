"""Measures how long `sgm` takes to answer where it needs no model: mistakes, help, reports, the first line of doctor.

    python benchmarks/startup.py --source before=../before/src --source after=src --repeats 3

runs every command with each source in turn, `--repeats` times, appends the medians to benchmarks/results/startup.json
and prints the table of docs/troubleshooting.md. Processor time (user and system, of the process) is the number to read:
on a machine that does other work too, the wall time says more about that work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pty
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results" / "startup.json"
COMMANDS = {
    "--version": "--version",
    "finetune --help": "finetune --help",
    "a mistyped key": "finetune training.epoch=2",
    "finetune, a missing data file": "finetune data.train=none.csv",
    "finetune, a column that is not there": "finetune data.train=rows.csv",
    "finetune, an occupied output folder": "finetune data.train=good.csv output.dir=taken",
    "evaluate, no run": "evaluate output.dir=none",
    "generate, no run": "generate --prompt text output.dir=none",
    "export, no run": "export --to merged output.dir=none",
    "compare, one run": "compare run",
    "compare, two runs": "compare run again",
    "report, a finished run": "report run",
}


FIRST_WORDS = {"doctor, its first row": ("doctor", b"python"), "init, its first question": ("init new.yaml", b"1/4")}
"""Commands that go on after they have answered: measured on a terminal until these words appear."""


def prepare(folder: Path) -> None:
    """Writes the files that the commands find."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from made_up_runs import leave_run

    (folder / "rows.csv").write_text("title,stars\n" + "".join(f"row {i},{i % 2}\n" for i in range(50)))
    (folder / "good.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(50)))
    (folder / "config.yaml").write_text("model: {task: sequence-classification}\n")
    (folder / "taken").mkdir()
    (folder / "taken" / "metrics.json").write_text("{}")
    for name in ("run", "again"):
        leave_run(folder / name, 0.8)


def measure(command: str, source: str, folder: Path) -> tuple[float, float]:
    """Processor and wall seconds of one run of `sgm`."""
    environment = os.environ | {"PYTHONPATH": source}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "sgm_finetune", *command.split()],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure_first_words(command: str, words: bytes, source: str, folder: Path) -> tuple[float, float]:
    """Processor and wall seconds until `sgm` has written `words` on a terminal."""
    environment = os.environ | {"PYTHONPATH": source, "TERM": "xterm"}
    ours, terminal = pty.openpty()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    call = [sys.executable, "-m", "sgm_finetune", *command.split()]
    child = subprocess.Popen(call, cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    while words not in said:
        said += os.read(ours, 4096)
    wall = time.perf_counter() - began
    child.kill()
    child.wait()
    os.close(ours)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", action="append", required=True, metavar="NAME=PATH", help="a src folder; repeatable"
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    sources = {name: str(Path(path).resolve()) for name, path in (text.split("=", 1) for text in options.source)}
    taken: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {source: [] for source in sources} for name in (*COMMANDS, *FIRST_WORDS)
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        for _ in range(options.repeats):
            for name, command in COMMANDS.items():
                for source, path in sources.items():
                    taken[name][source].append(measure(command, path, folder))
            for name, (command, words) in FIRST_WORDS.items():
                for source, path in sources.items():
                    taken[name][source].append(measure_first_words(command, words, path, folder))
    seconds = {
        name: {
            source: {"processor": round(median(p for p, _ in pairs), 2), "wall": round(median(w for _, w in pairs), 2)}
            for source, pairs in by_source.items()
        }
        for name, by_source in taken.items()
    }
    entry = {
        "date": time.strftime("%Y-%m-%d"), "processor": processor(), "cores": os.cpu_count(),
        "repeats": options.repeats, "seconds": seconds,
    }  # fmt: skip
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    RESULTS.write_text(json.dumps([*earlier, entry], indent=1) + "\n")
    print(f"| `sgm` | {' | '.join(sources)} |\n|---|{'---|' * len(sources)}")
    for name, by_source in seconds.items():
        cells = [f"{found['processor']:.1f} s" for found in by_source.values()]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
