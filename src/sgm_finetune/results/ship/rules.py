"""The rules of the gate: what passes, on which numbers (docs/tutorials/ship.md has them as a table)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sgm_finetune.results.bootstrap import Sums, changes, mean
from sgm_finetune.results.metric_names import Metric

Subject = Literal["task", "classes", "text", "answers", "calls", "refusals", "kept"]

FEWEST = 10
"""Examples from which on an improvement can pass, and a class must be predicted."""
PERPLEXITY_RISE = 0.05
"""Largest relative rise of the perplexity of general text."""
GAIN = f"the 95 % interval of the improvement is above 0, on {FEWEST} examples or more"
KEEP = "the 95 % interval of the change is not below 0"
BOUND = f"the 95 % interval of the rise ends at {PERPLEXITY_RISE:.0%} or below"
NAMED = f"every class with {FEWEST} test examples is predicted"


@dataclass(frozen=True)
class Check:
    """One comparison of a model before and after, and what the rules say of it."""

    subject: Subject
    name: str
    """What is compared."""
    passed: bool | None
    """None: it was not measured."""
    line: str
    """The numbers, or why there are none, in one line."""
    rule: str = ""
    before: float | None = None
    after: float | None = None
    change: tuple[float, float] | None = None
    """The 95 % interval of what the rule is about."""
    number: int | None = None
    """Examples that were compared."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite is None."""
        values = asdict(self)
        values["before"], values["after"] = _plain(self.before), _plain(self.after)
        values["change"] = None if self.change is None else [_plain(end) for end in self.change]
        return values


def ships(checks: Sequence[Check]) -> bool:
    """Whether all that was measured has passed, the task among it."""
    return any(check.subject == "task" and check.passed for check in checks) and not failed(checks)


def failed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.passed is False]


def unmeasured(subject: Subject, name: str, why: str) -> Check:
    return Check(subject, name, None, why)


def gains(metric: Metric, before: Sums, after: Sums) -> Check:
    """Passes if chance alone does not explain that the metric is better than before."""
    sign = 1 if metric.higher_is_better else -1
    low, high = _interval(before, after, metric.key, lambda old, new: sign * (new - old))
    line = f"{metric.name} {_arrow(before, after, metric.key)} on {after.number:,} test examples"
    if after.number < FEWEST:
        line += f", too few to tell (at least {FEWEST})"
    else:
        line += f"; better by {_number(low)} to {_number(high)}"
    passed = low > 0 and after.number >= FEWEST
    return _check("task", metric.name, passed, line, GAIN, before, after, metric.key, (low, high))


def keeps(subject: Subject, name: str, before: Sequence[float], after: Sequence[float], what: str) -> Check:
    """Passes unless the mean outcome of the examples fell by more than chance explains."""
    old, new = mean(before), mean(after)
    low, high = _interval(old, new, "mean")
    line = f"{name} {_arrow(old, new, 'mean')} on {new.number:,} {what}; change {low + 0.0:+.3g} to {high + 0.0:+.3g}"
    return _check(subject, name, high >= 0, line, KEEP, old, new, "mean", (low, high))


def stays_low(name: str, before: Sums, after: Sums) -> Check:
    """Passes if the perplexity did not rise by more than PERPLEXITY_RISE, chance included."""
    low, high = _interval(before, after, "perplexity", lambda old, new: new / old - 1)
    line = f"{name} {_arrow(before, after, 'perplexity')}; change {low:+.1%} to {high:+.1%}"
    passed = high <= PERPLEXITY_RISE
    return _check("text", name, passed, line, BOUND, before, after, "perplexity", (low, high))


def names_all(counts: Sequence[tuple[str, int, int]]) -> Check:
    """Passes if every class that the test data has often is predicted at all. `counts`: class, true, predicted."""
    often = [(name, predicted) for name, true, predicted in counts if true >= FEWEST]
    missing = [name for name, predicted in often if not predicted]
    line = f"{len(often) - len(missing)} of {len(often)} classes with {FEWEST} test examples are predicted"
    if missing:
        line += f"; never: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
    return Check("classes", "predicted classes", not missing, line, NAMED, number=sum(true for _, true, _ in counts))


def _check(
    subject: Subject, name: str, passed: bool, line: str, rule: str, before: Sums, after: Sums, key: str,
    change: tuple[float, float],
) -> Check:  # fmt: skip
    return Check(
        subject, name, bool(passed), line, rule, before.values()[key], after.values()[key], change, after.number
    )


def _interval(before: Sums, after: Sums, key: str, *compare: Any) -> tuple[float, float]:
    low, high = changes(before, after, *compare)[key]
    return float(low), float(high)


def _arrow(before: Sums, after: Sums, key: str) -> str:
    return f"{_number(before.values()[key])} → {_number(after.values()[key])}"


def _number(value: float) -> str:
    """A number with four digits at most.

    >>> _number(0.48829), _number(1.0), _number(-0.0)
    ('0.4883', '1', '0')
    """
    return f"{value + 0.0:.4g}"


def _plain(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
