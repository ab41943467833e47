"""Reads benchmarks/results/quality.jsonl: each method's chosen learning rate and its runs on test data."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from quality_adapt import Method
from quality_tasks import dtype_of

from sgm_finetune.method.rate_search import best_rate


@dataclass(frozen=True)
class Finished:
    """The test runs of one method on one task, at the learning rate that validation chose."""

    method: str
    rate: float
    at_edge: bool
    """Whether the chosen rate is the smallest or the largest of those tried."""
    runs: dict[int, dict]
    """Seed -> run."""

    @property
    def one(self) -> dict:
        """One of the runs, for the values that every seed shares."""
        return next(iter(self.runs.values()))

    def numbers(self, name: str) -> list[float]:
        """The test metric `name`, one value a seed."""
        return [run["test"][name] for run in self.runs.values()]

    def paired(self, reference: Finished) -> list[float]:
        """Test loss minus the reference's, one value for each seed that both have."""
        seeds = self.runs.keys() & reference.runs.keys()
        return [self.runs[s]["test"]["loss"] - reference.runs[s]["test"]["loss"] for s in sorted(seeds)]

    @property
    def state_bytes(self) -> int:
        """Bytes of the trained parameters, in float32, and of their optimizer state."""
        return 4 * self.one["trained_parameters"] + self.one["optimizer_bytes"]


def standard_error(values: list[float]) -> float:
    """Standard error of the mean; 0 for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def validation_losses(runs: list[dict], task: str, method: str, tuning_seed: int) -> dict[float, float]:
    """Rate -> validation loss, for the rates that have been tried, from the smallest to the largest."""
    losses = {
        run["rate"]: run["validation"]["loss"]
        for run in runs
        if (run["task"], run["method"], run["seed"]) == (task, method, tuning_seed)
    }
    return dict(sorted(losses.items()))


def tests_at(runs: list[dict], task: str, method: str, rate: float, tuning_seed: int) -> dict[int, dict]:
    """Seed -> test run at `rate`, for every seed except the tuning seed. All of them have one type of the weights: that
    of most seeds, or of the last run."""
    wanted = (task, method, rate)
    found: dict[str, dict[int, dict]] = {}
    for run in runs:
        if (run["task"], run["method"], run["rate"]) == wanted and run["seed"] != tuning_seed:
            found.setdefault(dtype_of(run), {})[run["seed"]] = run
    most = max(reversed(found.values()), key=len, default={})
    return dict(sorted(most.items()))


def finished_runs(
    runs: list[dict], task: str, rates: dict[str, tuple[float, ...]], tuning_seed: int
) -> dict[str, Finished]:
    """Method -> its test runs, for every method that has tried all of its rates and has a test run at the best one."""
    done = {}
    for method, planned in rates.items():
        losses = validation_losses(runs, task, method, tuning_seed)
        if not losses.keys() >= set(planned):
            continue
        rate = best_rate(losses)
        tests = tests_at(runs, task, method, rate, tuning_seed)
        if tests:
            edge = len(losses) > 1 and rate in (min(losses), max(losses))
            done[method] = Finished(method, rate, edge, tests)
    return done


def at_default_rates(runs: list[dict], task: str, methods: dict[str, Method], tuning_seed: int) -> dict[str, Finished]:
    """Method -> its test runs at its default learning rate, for every method that has one."""
    sizes = {run["method"]: (run["rank"], run["steps"]) for run in runs if run["task"] == task}
    rates = {name: m.default(*sizes[name]) for name, m in methods.items() if m.default is not None and name in sizes}
    tested = {name: tests_at(runs, task, name, rate, tuning_seed) for name, rate in rates.items()}
    return {name: Finished(name, rates[name], False, tests) for name, tests in tested.items() if tests}
