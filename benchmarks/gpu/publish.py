"""Puts the numbers of a run of `make gpu` into the documentation: `make gpu-publish`.

    make gpu-publish                              from gpu-results/
    make gpu-publish ARGS="--results FOLDER"      from another folder; none at all: the recorded numbers again

It adds the measurements to benchmarks/results/ (step_gpu.json, quality.jsonl, and gpu.json for all others), and then
writes the tables of docs/speed.md and docs/estimate.md between their marks, and docs/results.md. A second time it
changes nothing. The sentences beside the tables are for a person to check: it names the places.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu"), str(ROOT / "src")]

from items import ITEMS  # noqa: E402
from record import read  # noqa: E402

Records = list[dict[str, Any]]
_OF_THE_RUNNER = ("output", "limit", "pico", "wall_seconds")
"""Entries of a results file that are not recorded."""
HEADER = (
    "| batch | checkpointing | step | tokens/s | of PEFT's | of the floor | GiB | of PEFT's | over the floor |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
_ORDER = ("off", "on", "offload")


def recorded(root: Path, name: str) -> Records:
    path = root / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def record(results: Path, root: Path) -> bool:
    """Adds what the results files hold to benchmarks/results/, each once; whether there are new runs of adapters."""
    runs_added = False
    for item in ITEMS:
        measured = read(results / f"{item.name}.json")
        if measured.get("pico"):
            raise SystemExit(f"{results / item.name}.json is from --pico: it holds no measurement")
        if not measured.get("rows") and not measured.get("runs"):
            continue
        if item.name == "quality":
            runs_added |= add_runs(measured["runs"], root / "benchmarks" / "results" / "quality.jsonl")
            continue
        kept = {name: value for name, value in measured.items() if name not in _OF_THE_RUNNER}
        name = "step_gpu" if item.name == "step" else "gpu"
        before = recorded(root, name)
        if kept not in before:
            text = json.dumps([*before, kept], indent=1) + "\n"
            (root / "benchmarks" / "results" / f"{name}.json").write_text(text, encoding="utf-8")
    return runs_added


def add_runs(runs: Records, path: Path) -> bool:
    """Appends the runs of adapters that the file lacks; whether there were any."""
    lines = path.read_text(encoding="utf-8").splitlines()
    known = {_key(json.loads(line)) for line in lines}
    new = [run for run in runs if _key(run) not in known]
    path.write_text("".join(f"{line}\n" for line in [*lines, *map(json.dumps, new)]), encoding="utf-8")
    return bool(new)


def _key(run: dict[str, Any]) -> tuple:
    return run["task"], run["method"], run["rate"], run["seed"]


def last(records: Records, item: str) -> dict[str, Any]:
    return next((one for one in reversed(records) if one.get("item") == item), {})


def step_table(records: Records, steps: Records) -> str:
    """The table of the last run of the step; with it Unsloth's, if that ran on the same kind of card."""
    from step_gpu import table

    measured, unsloth = steps[-1], last(records, "unsloth")
    rows = list(measured["rows"])
    if unsloth.get("device") == measured["device"]:
        rows += unsloth["rows"]
    rows.sort(key=lambda row: (row["batch"], _ORDER.index(row["checkpointing"])))
    return f"{HEADER}\n{table(rows, measured['bfloat16_tflops'])}\n\nMeasured on one {measured['device']}."


def other_measurements(records: Records, steps: Records) -> str:
    """What the items beside the step found, as a list; what nobody has measured is named."""
    from step_gpu import table

    lines = []
    if found := last(records, "tests"):
        ran = [row for row in found["rows"] if row["outcome"] != "skipped"]
        failed = [row["test"].rpartition("::")[2] for row in ran if row["outcome"] == "failed"]
        ended = "" if found["status"] in ("done", "failed") else f"; ended by the {found['status']}"
        told = f" Failed: {', '.join(f'`{name}`' for name in failed)}." if failed else ""
        lines.append(f"- `pytest -m gpu`: {len(ran) - len(failed)} of {len(ran)} tests passed{ended}.{told}")
    if found := last(records, "scan"):
        seconds = " and ".join(f"{row['seconds']:.0f}" for row in found["rows"])
        lines.append(f"- The scan of an 8B model ({found['rows'][0]['matrices']} matrices) took {seconds} s "
                     f"on one {found['device']}.")  # fmt: skip
    missing = [item.name for item in ITEMS if item.name not in ("step", "quality") and not last(records, item.name)]
    if missing:
        lines.append(f"- Not measured yet ([gpu.md](gpu.md)): {', '.join(missing)}.")
    if found := last(records, "graphs"):
        rows = sorted(found["rows"], key=lambda row: (row["batch"], _ORDER.index(row["checkpointing"])))
        lines += ["", f"Steps recorded as a CUDA graph, an experiment, on one {found['device']}:", "", HEADER,
                  table(rows, found["bfloat16_tflops"])]  # fmt: skip
    return "\n".join(lines)


def planner_table(records: Records, steps: Records) -> str:
    from memory_gpu import table

    return table(last(records, "planner")["rows"])


REGIONS: dict[str, dict[str, Callable[[Records, Records], str]]] = {
    "speed.md": {"step": step_table, "others": other_measurements},
    "estimate.md": {"planner": planner_table},
}
"""Page -> mark -> what stands between the lines of that mark, from gpu.json and step_gpu.json."""


def between_marks(text: str, mark: str, body: str) -> str:
    """`text` with `body` between the two lines of the mark."""
    line = f"<!-- make gpu-publish: {mark} -->\n"
    before, first, rest = text.partition(line)
    _, second, after = rest.partition(line)
    if not second:
        raise SystemExit(f"the page lacks two lines {line.strip()}")
    return f"{before}{first}\n{body}\n\n{second}{after}"


def write_pages(root: Path) -> list[str]:
    """Writes what stands between the marks, and returns the pages that changed."""
    records, steps = recorded(root, "gpu"), recorded(root, "step_gpu")
    changed = []
    for page, marks in REGIONS.items():
        path = root / "docs" / page
        before = text = path.read_text(encoding="utf-8")
        for mark, body in marks.items():
            text = between_marks(text, mark, body(records, steps))
        if text != before:
            path.write_text(text, encoding="utf-8")
            changed.append(f"docs/{page}")
    return changed


def publish(results: Path, root: Path = ROOT) -> list[str]:
    """Records the results and writes the pages below `root`; returns the pages that changed."""
    runs_added = record(results, root)
    changed = write_pages(root)
    if runs_added:
        from quality_methods import METHODS
        from quality_tables import write_page
        from quality_tasks import TASKS, TUNING_SEED

        runs = (root / "benchmarks" / "results" / "quality.jsonl").read_text(encoding="utf-8").splitlines()
        write_page([json.loads(run) for run in runs], TASKS, METHODS, TUNING_SEED, root)
        changed.append("docs/results.md")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "gpu-results")
    options = parser.parse_args()
    changed = publish(options.results)
    print(f"Changed: {', '.join(changed)}" if changed else "Nothing changed")
    if changed:
        print("Check the sentences beside the tables: the first lines of docs/speed.md and docs/estimate.md, the lists "
              "below the tables, docs/index.md, README.md; note the verdict in docs/LOG.md")  # fmt: skip


if __name__ == "__main__":
    main()
