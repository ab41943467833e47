"""Compares runs: what each reached and cost, how they were configured differently, which is better and by how much."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgm_finetune.base.config import Config, sections
from sgm_finetune.base.errors import UserError
from sgm_finetune.results.files import PTH
from sgm_finetune.results.metric_names import METRICS, Metric
from sgm_finetune.results.report.formats import NOTHING, count, decimal, duration, finite, memory
from sgm_finetune.results.report.run_files import Run, load_run

_UNCOMPARED = ("output.dir", "output.overwrite", "training.resume")
"""Configuration keys that do not change a result."""
_RATE = "training.learning_rate"
"""The key whose default depends on other keys and on the data; metrics.json has the number."""
_PER_TOKEN = ("loss", "perplexity")
"""Metrics that are comparable only over the same tokens."""


@dataclass(frozen=True)
class Row:
    """One quantity of every run, as numbers and as text."""

    name: str
    """Name on the page, and key in the output of `sgm compare --json`."""
    values: tuple[float | None, ...]
    texts: tuple[str, ...]
    better: Literal["higher", "lower"] | None = None
    """None: a cost, or a metric of the lm-evaluation-harness."""
    best: int | None = None
    """Index of the best run among those tested on the same data; None if there is no single best."""

    @property
    def label(self) -> str:
        """The name, with an arrow towards better values."""
        if self.better is None:
            return self.name
        return f"{self.name} {'↑' if self.better == 'higher' else '↓'}"


@dataclass(frozen=True)
class RunComparison:
    names: tuple[str, ...]
    """The folders of the runs, as given."""
    runs: tuple[Run, ...]
    tested_alike: tuple[bool, ...]
    """Whether a run was tested on the same data as the first one."""
    rows: tuple[Row, ...]
    differing: dict[str, tuple[Any, ...]]
    """Configuration key -> its value in each run, for keys whose values differ."""
    verdict: str
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
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


def compare_runs(folders: Sequence[Path]) -> RunComparison:
    """Compares the runs in `folders`; the first one's test data is the standard.

    Raises UserError for fewer than two runs, for a run named twice, and for a folder without a finished run.
    """
    if len(folders) < 2:
        raise UserError("sgm compare needs two runs or more; name their folders")
    for index, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:index]]:
            raise UserError(f"{folder} is named twice; name each run once")
    runs = tuple(load_run(folder) for folder in folders)
    names = tuple(str(folder) for folder in folders)
    fingerprints = [run.metrics.get("test_fingerprint") for run in runs]
    same = [fingerprint is not None and fingerprint == fingerprints[0] for fingerprint in fingerprints]
    alike = (True, *same[1:])
    metrics = _comparable_metrics(runs, alike)
    rows = [_metric_row(metric, runs, alike) for metric in metrics] + _harness_rows(runs)
    verdict, chance = _verdict(names, runs, alike, metrics)
    return RunComparison(
        names, runs, alike, (*rows, *_cost_rows(runs)), differing_keys(runs), verdict,
        (*_test_remarks(names, fingerprints, alike), *chance),
    )  # fmt: skip


def differing_keys(runs: Sequence[Run]) -> dict[str, tuple[Any, ...]]:
    """Returns each key whose values differ, with its value in every run.

    A learning rate that is written out is compared with the number that the default was.
    """
    flat = [dict(_leaves(run.config.to_compare())) for run in runs]
    differing = {}
    for key in dict.fromkeys(key for one in flat for key in one):
        values = tuple(one.get(key) for one in flat)
        if key == _RATE and len(set(values)) > 1:
            values = tuple(
                run.metrics.get("learning_rate") or one.get(key) for run, one in zip(runs, flat, strict=True)
            )
        if key not in _UNCOMPARED and any(value != values[0] for value in values):
            differing[key] = values
    return differing


def shown_value(config: Config, key: str, rate: float | None = None) -> str:
    """The value of a key that differs, as YAML writes it; for a key that is not set, what its default means.

    `rate` is the learning rate of the run.

    >>> [shown_value(Config(), key, 0.0125) for key in ("training.learning_rate", "data.num_train", "merge.side")]
    ['0.0125 (default)', 'all (default)', 'auto']
    >>> [shown_value(Config(plan="plan.json"), key) for key in ("plan", "data.columns.text", "data.packing")]
    ['plan.json', 'text (default)', 'false']
    >>> shown_value(Config(), "data.name")
    '–'
    """
    value = dict(_leaves(config.to_compare())).get(key)
    if value is not None:
        return str(value).lower() if isinstance(value, bool) else str(value)
    if key == _RATE:
        return "default" if rate is None else f"{rate:g} (default)"
    if key.startswith("data.columns."):
        return f"{key.removeprefix('data.columns.')} (default)"
    section, _, leaf = key.rpartition(".")
    model = sections(Config)[section] if section else Config
    meaning = re.search(r"\(null: ([^)]*)\)", model.model_fields[leaf].description or "")
    return f"{meaning[1]} (default)" if meaning else NOTHING


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Returns (dotted key, value) of a nested mapping."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _comparable_metrics(runs: Sequence[Run], alike: Sequence[bool]) -> list[Metric]:
    """Returns the metrics that any run has, without those per token if the runs tested alike counted other tokens."""
    tokens = {run.metrics["after"].get("num_tokens") for run, same in zip(runs, alike, strict=True) if same}
    return [
        metric
        for metric in METRICS
        if any(finite(run.metrics["after"].get(metric.key)) for run in runs)
        and not (metric.key in _PER_TOKEN and len(tokens) > 1)
    ]


def _metric_row(metric: Metric, runs: Sequence[Run], alike: Sequence[bool]) -> Row:
    values = tuple(_number(run.metrics["after"].get(metric.key)) for run in runs)
    texts = tuple(decimal(value, metric.digits) for value in values)
    if metric.higher_is_better is None:
        return Row(metric.name, values, texts)
    better = "higher" if metric.higher_is_better else "lower"
    return Row(metric.name, values, texts, better, _best(metric, values, alike))


def _harness_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns a row for each metric of lm-evaluation-harness, which has its own test data; none is called better."""
    found = [run.metrics["after"].get("harness") or {} for run in runs]
    rows = []
    for task, key in dict.fromkeys((task, key) for one in found for task, numbers in one.items() for key in numbers):
        values = tuple(_number(one.get(task, {}).get(key)) for one in found)
        rows.append(Row(f"{task}: {key}", values, tuple(decimal(value, 4) for value in values)))
    return rows


def _best(metric: Metric, values: Sequence[float | None], alike: Sequence[bool]) -> int | None:
    sign = 1 if metric.higher_is_better else -1
    ranked = [(sign * value, index) for index, value in enumerate(values) if value is not None and alike[index]]
    if len(ranked) < 2 or max(ranked)[0] == min(ranked)[0]:
        return None
    return max(ranked, key=lambda pair: pair[0])[1]


def _cost_rows(runs: Sequence[Run]) -> list[Row]:
    def row(name: str, values: Sequence[Any], to_text: Callable[[float | None], str]) -> Row:
        numbers = tuple(_number(value) for value in values)
        return Row(name, numbers, tuple(to_text(number) for number in numbers))

    def each(*keys: str) -> list[Any]:  # the value under nested keys, of every run
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
    names: Sequence[str], runs: Sequence[Run], alike: Sequence[bool], metrics: Sequence[Metric]
) -> tuple[str, list[str]]:
    """Returns one line and remarks on it. The first metric that all runs tested alike have decides."""
    compared = [index for index, same in enumerate(alike) if same]
    if len(compared) < 2:
        return "No two of these runs were tested on the same data, so none is called better.", []
    for metric in metrics:
        values = {index: _number(runs[index].metrics["after"].get(metric.key)) for index in compared}
        known = {index: value for index, value in values.items() if value is not None}
        if len(known) == len(compared):
            break
    else:
        return "These runs have no metric in common, so none is called better.", []
    first, second = sorted(known, key=known.__getitem__, reverse=bool(metric.higher_is_better))[:2]
    digits = metric.digits
    if known[first] == known[second]:
        return f"{names[first]} and {names[second]} are equal: {metric.name} {decimal(known[first], digits)}.", []
    gap = abs(known[first] - known[second])
    word = "more" if metric.higher_is_better else "less"
    line = (
        f"{names[first]} is better: {metric.name} {decimal(known[first], digits)}, {decimal(gap, digits)} {word} than "
        f"{names[second]}."
    )
    chance = _chance(metric, known[first], known[second], runs[first].metrics["after"].get("num_examples"))
    return line, [*_attribution(runs[first], runs[second]), *chance]


def value_of(run: Run, key: str) -> str:
    """`shown_value` of a run."""
    return shown_value(run.config, key, run.metrics.get("learning_rate"))


def _attribution(one: Run, two: Run) -> list[str]:
    """Returns a remark on what the difference between two runs can come from: the one key that differs, or none of
    several."""
    keys = list(differing_keys([one, two]))
    if not keys:
        return []
    if len(keys) > 1:
        return [
            f"{len(keys)} keys differ between the two ({', '.join(keys)}), so the difference cannot be attributed to "
            "one of them; compare runs that differ in one key."
        ]
    values = " and ".join(value_of(run, keys[0]) for run in (one, two))
    if keys[0] == "training.seed":
        return [f"Only training.seed differs between the two ({values}), so the difference is chance."]
    return [f"Only {keys[0]} differs between the two ({values}): the difference comes from it, or from chance."]


def _chance(metric: Metric, one: float, two: float, number: Any) -> list[str]:
    """Returns a remark when a share of examples differs by less than two standard errors of two such samples."""
    if metric.key not in ("accuracy", "exact_match") or not finite(number) or number < 1:
        return []
    error = math.sqrt(max(0.0, one * (1 - one) + two * (1 - two)) / number)
    if abs(one - two) >= 2 * error:
        return []
    return [
        f"Chance alone can cause such a difference on {count(number)} test examples (two standard errors: "
        f"{decimal(2 * error, metric.digits)}); test on more examples, or repeat with other seeds."
    ]


def _test_remarks(names: Sequence[str], fingerprints: Sequence[Any], alike: Sequence[bool]) -> list[str]:
    others = [name for name, same in zip(names, alike, strict=True) if not same]
    if not others:
        return []
    unknown = [name for name, fingerprint in zip(names, fingerprints, strict=True) if fingerprint is None]
    if unknown:
        return [f"The test data of {', '.join(unknown)} is unknown (an older run), so metrics are not compared."]
    verb, whose = ("was", "its") if len(others) == 1 else ("were", "their")
    return [f"{', '.join(others)} {verb} tested on other data than {names[0]}, so {whose} metrics are not compared."]
