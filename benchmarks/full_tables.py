"""Writes docs/full-results.md: whole matrices by optimizer and by selection, each method at its best learning rate.

`python benchmarks/full_weights.py --tables` calls `write_page`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from quality_numbers import Finished, finished_runs
from quality_tables import mean_error, tries
from quality_tasks import TUNING_SEED, Task

INTRODUCTION = """# Results: whole matrices

`python benchmarks/full_weights.py --seeds 3` measures this page, and `--tables` writes it from
[full_weights.jsonl](../benchmarks/results/full_weights.jsonl); do not edit it by hand.

Every method trains matrices inside the blocks of the same base model (adapters: factors beside all of them), on the
same batches, for the same number of steps, with gradients clipped to norm 1. A new classification head learns at 1e-3.
Learning rates are tried on validation data with a seed of their own until the best one lies between two others, with
neighbours a factor of 2 apart; a star marks where it does not. Only then other seeds train at that rate and are
measured on test data.

The columns:

- *state, MiB*: bytes of the optimizer's state after the last step, in float32. It is what the methods differ in;
  weights and gradients are those of the matrices.
- *test loss*, and its difference to AdamW on all matrices at equal seeds: mean ± standard error over the seeds.
- *right*: accuracy.

GaLore and APOLLO are their authors' packages. *Merged* keeps Adam's moments in one basis for all layers of a kind (or
of a group of the probe), *own bases* in one for each layer, both turned every 10 steps; *random bases* never turn;
*factored* takes Adafactor's second moments. The rank in a name sets the bytes: others have the largest rank within
them.
"""
REFERENCE = "AdamW"


def write_page(runs: list[dict], tasks: Mapping[str, Task], rates: dict[str, tuple[float, ...]], root: Path) -> Path:
    """Writes docs/full-results.md below `root`; returns its path."""
    parts = [INTRODUCTION]
    for name, task in tasks.items():
        finished = finished_runs(runs, name, rates, TUNING_SEED)
        if not finished:
            continue
        chosen = [method for method in finished if method.startswith(f"{REFERENCE}, ")]
        others = [method for method in finished if method not in chosen]
        parts.append(f"## {name}\n\n{_described(task, runs, finished)}\n")
        if others:
            parts.append(f"### {name}: How all matrices are trained\n\n{_table(others, finished)}\n")
        if chosen:
            parts.append(f"### {name}: Which layers are trained\n\n{_table([REFERENCE, *chosen], finished)}\n")
        parts.append(f"### {name}: Learning rates tried\n\n{tries(runs, name, rates, TUNING_SEED)}\n")
    path = root / "docs" / "full-results.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def products_of(run: dict) -> str:
    """The type of a run's matrix products; until 2026-11-28 the records did not say it."""
    return run.get("products", "bfloat16")


def _described(task: Task, runs: list[dict], finished: Mapping[str, Finished]) -> str:
    tests = [run for done in finished.values() for run in done.runs.values()]
    return (
        f"{task.about} Base model {task.model}, {task.num_steps} steps of {task.batch_size}; "
        f"{tests[0]['test']['num_examples']:,} test examples. Matrix products of the test runs: "
        f"{' and '.join(sorted(set(map(products_of, tests))))}. The tries on validation data have either type; where "
        f"both were run, the losses differ by {_largest_difference(task, runs):.4f} at most. CPU; "
        f"{'; '.join(sorted({'torch ' + run['torch'] for run in tests}))}."
    )


def _largest_difference(task: Task, runs: list[dict]) -> float:
    """Between the validation losses of tries that were run with both types of products; 0 without one."""
    losses: dict[tuple, list[float]] = {}
    for run in runs:
        if run["task"] == task.name and run["seed"] == TUNING_SEED:
            losses.setdefault((run["method"], run["rate"]), []).append(run["validation"]["loss"])
    return max(max(found) - min(found) for found in losses.values())


def _table(methods: Iterable[str], finished: Mapping[str, Finished]) -> str:
    reference = finished.get(REFERENCE)
    lines = [
        f"| method | state, MiB | rate | test loss | minus {REFERENCE}, paired | right | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for done in (finished[method] for method in methods if method in finished):
        paired = done.paired(reference) if reference and done is not reference else []
        right = [100 * value for value in done.numbers("right")]
        cells = [
            done.method,
            f"{done.one['state_bytes'] / 2**20:.2f}",
            f"{done.rate:g}{'*' if done.at_edge else ''}",
            mean_error(done.numbers("loss"), ".3f"),
            mean_error(paired, "+.3f") if paired else "–",
            f"{mean_error(right, '.1f')} %" if any(right) else "–",
            str(len(done.runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
