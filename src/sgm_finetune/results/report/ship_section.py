"""The section "Before shipping": the checks of `sgm ship`, from ship.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sgm_finetune.results.report.formats import NOTHING, finite


class ShipLine(NamedTuple):
    """One check, as text."""

    name: str
    before: str
    after: str
    change: str
    rule: str
    passed: bool | None
    """None: not measured."""


def ship_section(ship: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section's values for the template; `ship` is the content of ship.json, {} without one."""
    lines = [_line(check) for check in ship.get("checks", [])]
    return {
        "ships": ship.get("ship"),
        "ship_lines": lines,
        "ship_data": ship.get("data", ""),
        "ship_failed": sum(line.passed is False for line in lines),
        "ship_measured": sum(line.passed is not None for line in lines),
    }


def _line(check: Mapping[str, Any]) -> ShipLine:
    if check["passed"] is None:
        return ShipLine(check["name"], NOTHING, NOTHING, NOTHING, check["line"], None)
    ends = [_change(end, check["subject"] == "text") for end in check["change"] or []]
    before, after = (_number(check[key]) for key in ("before", "after"))
    rule = check["line"] if check["subject"] == "classes" else check["rule"]
    return ShipLine(check["name"], before, after, " to ".join(ends) or NOTHING, rule, check["passed"])


def _number(value: float | None) -> str:
    return f"{value + 0.0:.4g}".replace("-", "−") if finite(value) else NOTHING


def _change(value: float | None, is_share: bool) -> str:
    if not finite(value):
        return NOTHING
    return (f"{value + 0.0:+.1%}" if is_share else f"{value + 0.0:+.3g}").replace("-", "−").replace("%", " %")
