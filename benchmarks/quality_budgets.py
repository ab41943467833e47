"""Writes docs/budgets.md: every method at 0.1 to 3 million trained numbers, each at its best learning rate.

`python benchmarks/quality.py --tables` calls `write_budgets`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from quality_adapt import Method
from quality_numbers import Finished, at_default_rates, finished_runs, standard_error, validation_losses
from quality_tables import REFERENCE, ROOT, describe_task, mean_error, tries
from quality_tasks import BUDGETED, BUDGETS, Task, at_budget

INTRODUCTION = """# Loss by budget

`python benchmarks/quality.py --tasks "sentiment at 0.3 M" --methods LoRA pool` measures a part of this page, and
`--tables` writes it from [quality.jsonl](../benchmarks/results/quality.jsonl); do not edit it by
hand.

The rules are those of [results.md](results.md), except for the size: every method trains the largest rank that stays
within the budget, classification heads not counted. Each learning rate is swept until the best one lies between two
others. A cell holds the mean test loss and its standard error over seeds, and in brackets the rank and the learning
rate that validation chose; a star marks the smallest or largest rate tried. *Default* is the loss at the rate that
users get without tuning. A method without a cell has not been measured at this size, or its smallest size is larger.
"""


def write_budgets(
    runs: list[dict], tasks: dict[str, Task], methods: dict[str, Method], tuning_seed: int, root: Path = ROOT
) -> None:
    """Writes docs/budgets.md and its pictures below `root`, once a task has two methods at one size."""
    rates = {name: method.rates for name, method in methods.items()}
    parts = [INTRODUCTION]
    for name in BUDGETED:
        sized = {budget: at_budget(name, budget) for budget in BUDGETS}
        found = {budget: finished_runs(runs, task, rates, tuning_seed) for budget, task in sized.items()}
        if not any(len(finished) > 1 for finished in found.values()):
            continue
        untuned = {budget: at_default_rates(runs, task, methods, tuning_seed) for budget, task in sized.items()}
        described = next(finished for finished in found.values() if finished)
        parts.append(
            f"## {name}\n\n{describe_task(tasks[name], described)}\n\n{budget_table(methods, found, untuned)}\n"
        )
        path = root / "docs" / "figures" / f"budgets-{name}.png"
        if budget_picture(name, found, path):
            parts.append(f"![Test loss against trained numbers](figures/{path.name})\n")
        for budget, task in sized.items():
            if any(validation_losses(runs, task, method, tuning_seed) for method in methods):
                parts.append(
                    f"### {name} at {budget}: Learning rates tried\n\n{tries(runs, task, rates, tuning_seed)}\n"
                )
    if len(parts) > 1:
        (root / "docs" / "budgets.md").write_text("\n".join(parts), encoding="utf-8")


Sized = dict[str, dict[str, Finished]]
"""Budget -> method -> its test runs."""


def budget_table(methods: dict[str, Method], found: Sized, untuned: Sized) -> str:
    """Methods by budgets."""
    budgets = [budget for budget in BUDGETS if found[budget]]
    lines = [f"| method | {' | '.join(budgets)} |", f"|---|{'---|' * len(budgets)}"]
    for method in methods:
        if any(method in found[budget] for budget in budgets):
            cells = [cell(found[budget].get(method), untuned[budget].get(method)) for budget in budgets]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(done: Finished | None, untuned: Finished | None) -> str:
    if done is None:
        return "–"
    rank = f"rank {done.one['rank']}, " if done.one["rank"] else ""
    text = f"{mean_error(done.numbers('loss'), '.4f')} ({rank}{done.rate:g}{'*' if done.at_edge else ''})"
    if untuned is not None and untuned.rate != done.rate:
        text += f"; default {mean_error(untuned.numbers('loss'), '.4f')}"
    return text


def budget_picture(name: str, found: Sized, path: Path) -> bool:
    """Draws test loss against trained numbers, a line for each method with several sizes; False if there is none."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for finished in found.values():
        for method, done in finished.items():
            losses = done.numbers("loss")
            point = done.one["trained_parameters"] / 1e6, statistics.fmean(losses), standard_error(losses)
            lines.setdefault(method, []).append(point)
    lines = {method: sorted(points) for method, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for method, points in lines.items():
        style = "-" if method == REFERENCE or "pool" in method or "our step" in method or "SGM" in method else ":"
        sizes, losses, errors = zip(*points, strict=True)
        axes.errorbar(sizes, losses, yerr=errors, fmt="o", linestyle=style, capsize=3, markersize=4, label=method)
    axes.set_xscale("log")
    axes.set_xlabel("trained numbers, million")
    axes.set_ylabel("test loss")
    axes.set_title(name)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return True
