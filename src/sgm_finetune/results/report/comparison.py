"""Runs side by side: what each reached and cost, what was different, and which one is better by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.results.metrics import MEASURES, Measure
from sgm_finetune.results.pth import PTH
from sgm_finetune.results.report.formats import count, decimal, duration, finite, memory
from sgm_finetune.results.report.run_files import Run, load_run

_UNCOMPARED = ("output.dir", "output.overwrite", "training.resume")
_PER_TOKEN = ("loss", "perplexity")


@dataclass(frozen=True)
class Row:
    """One quantity of all runs, as numbers and as text."""

    name: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    better: Literal["higher", "lower"] | None = None
    """None: a cost, or a number of another's making."""
    best: int | None = None
    """Which run has the better value, of those that were tested on the same; None: none does."""

    @property
    def label(self) -> str:
        return f"{self.name} {'↑' if self.better == 'higher' else '↓'}" if self.better else self.name


@dataclass(frozen=True)
class Comparison:
    names: tuple[str, ...]
    """The runs' folders, as they were given."""
    runs: tuple[Run, ...]
    tested_alike: tuple[bool, ...]
    """Whether a run was tested on the same data as the first one."""
    rows: tuple[Row, ...]
    differing: dict[str, tuple[Any, ...]]
    """Configuration key -> its value in each run, where they are not all equal."""
    verdict: str
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "runs": [
                {"folder": name, "model": run.metrics["model"], "task": run.metrics["task"],
                 "data": run.metrics["data"], "test_fingerprint": run.metrics.get("test_fingerprint"),
                 "tested_alike": alike}
                for name, run, alike in zip(self.names, self.runs, self.tested_alike, strict=True)
            ],
            "measures": {
                row.name: {"values": list(row.values), "better": row.better, "best": row.best} for row in self.rows
            },
            "differing_keys": {key: list(values) for key, values in self.differing.items()},
            "verdict": self.verdict,
            "remarks": list(self.remarks),
        }  # fmt: skip


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Raises UserError for fewer than two runs, one named twice, or a folder without a finished run."""
    if len(folders) < 2:
        raise UserError("sgm compare takes two runs or more; name their folders")
    for at, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:at]]:
            raise UserError(f"{folder} is named twice; name each run once")
    runs = tuple(load_run(folder) for folder in folders)
    names = tuple(str(folder) for folder in folders)
    marks = [run.metrics.get("test_fingerprint") for run in runs]
    alike = tuple(at == 0 or (mark is not None and mark == marks[0]) for at, mark in enumerate(marks))
    measures = _measures(runs, alike)
    rows = [_quality(measure, runs, alike) for measure in measures] + _harness(runs)
    verdict, chance = _verdict(names, runs, alike, measures)
    return Comparison(
        names, runs, alike, (*rows, *_costs(runs)), differing_keys([run.config for run in runs]), verdict,
        (*_test_remarks(names, marks, alike), *chance),
    )  # fmt: skip


def differing_keys(configs: Sequence[Config]) -> dict[str, tuple[Any, ...]]:
    """
    >>> differing_keys([Config(), Config(plan="plan.json")])
    {'plan': (None, 'plan.json')}
    """
    flat = [dict(_leaves(config.model_dump(mode="json"))) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: tuple(one.get(key) for one in flat) for key in keys if key not in _UNCOMPARED}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _measures(runs: Sequence[Run], alike: Sequence[bool]) -> list[Measure]:
    """Those that any run has; a loss per token only where the runs that were tested alike count the same tokens."""
    tokens = {run.metrics["after"].get("num_tokens") for run, same in zip(runs, alike, strict=True) if same}
    return [
        measure
        for measure in MEASURES
        if any(finite(run.metrics["after"].get(measure.key)) for run in runs)
        and not (measure.key in _PER_TOKEN and len(tokens) > 1)
    ]


def _quality(measure: Measure, runs: Sequence[Run], alike: Sequence[bool]) -> Row:
    values = tuple(_number(run.metrics["after"].get(measure.key)) for run in runs)
    texts = tuple(decimal(value, measure.digits) for value in values)
    better = "higher" if measure.higher_is_better else "lower"
    return Row(measure.name, values, texts, better, _best(measure, values, alike))


def _harness(runs: Sequence[Run]) -> list[Row]:
    """The harness has its own test data, and its own opinion of what is better."""
    found = [run.metrics["after"].get("harness") or {} for run in runs]
    rows = []
    for task, key in dict.fromkeys((task, key) for one in found for task, numbers in one.items() for key in numbers):
        values = tuple(_number(one.get(task, {}).get(key)) for one in found)
        rows.append(Row(f"{task}: {key}", values, tuple(decimal(value, 4) for value in values)))
    return rows


def _best(measure: Measure, values: Sequence[float | None], alike: Sequence[bool]) -> int | None:
    sign = 1 if measure.higher_is_better else -1
    there = [(sign * value, at) for at, value in enumerate(values) if value is not None and alike[at]]
    if len(there) < 2 or max(there)[0] == min(there)[0]:
        return None
    return max(there, key=lambda pair: pair[0])[1]


def _costs(runs: Sequence[Run]) -> list[Row]:
    def row(name: str, values: Sequence[Any], text: Any) -> Row:
        numbers = tuple(_number(value) for value in values)
        return Row(name, numbers, tuple(text(number) for number in numbers))

    def each(*keys: str) -> list[Any]:
        found: list[Any] = [run.metrics for run in runs]
        for key in keys:
            found = [one.get(key) if isinstance(one, dict) else None for one in found]
        return found

    sizes = [(run.folder / PTH).stat().st_size if (run.folder / PTH).is_file() else None for run in runs]
    return [
        row("trainable parameters", each("trainable_parameters"), count),
        row(f"bytes of {PTH}", sizes, memory),
        row("steps", each("steps"), count),
        row("time to train", each("seconds", "train"), duration),
        row("time in all", each("seconds", "total"), duration),
        row("training tokens per second", each("tokens_per_second"), count),
        row("peak memory", each("peak_memory_bytes"), memory),
    ]


def _number(value: Any) -> float | None:
    return value if finite(value) else None


def _verdict(
    names: Sequence[str], runs: Sequence[Run], alike: Sequence[bool], measures: Sequence[Measure]
) -> tuple[str, list[str]]:
    """By the first measure that all runs tested alike have: (one line, remarks on it)."""
    compared = [at for at, same in enumerate(alike) if same]
    if len(compared) < 2:
        return "No two of these runs were tested on the same data, so none is called better.", []
    for measure in measures:
        values = {at: _number(runs[at].metrics["after"].get(measure.key)) for at in compared}
        known = {at: value for at, value in values.items() if value is not None}
        if len(known) == len(compared):
            break
    else:
        return "These runs have no measure in common, so none is called better.", []
    order = sorted(known, key=lambda at: -known[at] if measure.higher_is_better else known[at])
    (first, second), digits = order[:2], measure.digits
    if known[first] == known[second]:
        return f"{names[first]} and {names[second]} are level: {measure.name} {decimal(known[first], digits)}.", []
    gap = abs(known[first] - known[second])
    word = "more" if measure.higher_is_better else "less"
    line = (
        f"{names[first]} is better: {measure.name} {decimal(known[first], digits)}, {decimal(gap, digits)} {word} than "
        f"{names[second]}."
    )
    return line, _chance(measure, known[first], known[second], runs[first].metrics["after"].get("num_examples"))


def _chance(measure: Measure, one: float, two: float, number: Any) -> list[str]:
    """Of a share of examples: whether two other samples of as many could differ as much."""
    if measure.key not in ("accuracy", "exact_match") or not finite(number) or number < 1:
        return []
    error = math.sqrt(max(0.0, one * (1 - one) + two * (1 - two)) / number)
    if abs(one - two) >= 2 * error:
        return []
    return [
        f"That is within what chance does on {count(number)} test examples (two standard errors: "
        f"{decimal(2 * error, measure.digits)}); test on more, or repeat with other seeds."
    ]


def _test_remarks(names: Sequence[str], marks: Sequence[Any], alike: Sequence[bool]) -> list[str]:
    others = [name for name, same in zip(names, alike, strict=True) if not same]
    if not others:
        return []
    unknown = [name for name, mark in zip(names, marks, strict=True) if mark is None]
    if unknown:
        return [f"What {', '.join(unknown)} was tested on is not known (an older run): measures are not compared."]
    return [f"{', '.join(others)} was tested on other data than {names[0]}: those measures are not compared."]
