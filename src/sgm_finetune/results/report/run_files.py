"""Reads everything that a report needs from the folder of a finished run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import read_json
from sgm_finetune.measure.plan_file import read_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.report.pictures import Pictures, parse_pictures


@dataclass(frozen=True)
class Run:
    """A finished run. A field is empty if an older version did not write its file."""

    folder: Path
    config: Config
    plan: Plan
    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    pictures: Pictures = field(default_factory=Pictures)
    examples: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    ship: dict[str, Any] = field(default_factory=dict)
    """What `sgm ship` found."""


def load_run(folder: Path) -> Run:
    """Reads the run. Raises UserError if `folder` holds no finished run, or a file in it has other content."""
    check_finished(folder)
    pictures = _read(folder / "pictures.json", dict, {})
    return Run(
        folder=folder,
        config=load_config(folder / "config.yaml"),
        plan=read_plan(folder / "plan.json"),
        metrics=_checked_metrics(_read(folder / "metrics.json", dict), folder / "metrics.json"),
        history=_checked_history(_read(folder / "history.json", list, []), folder / "history.json"),
        pictures=parse_pictures(pictures, str(folder / "pictures.json")),
        examples=_checked_examples(_read(folder / "examples.json", dict, {}), folder / "examples.json"),
        environment=_read(folder / "environment.json", dict, {}),
        ship=_checked_ship(_read(folder / "ship.json", dict, {}), folder / "ship.json"),
    )


def check_finished(folder: Path) -> None:
    """Raises UserError if `folder` holds no finished run."""
    if not folder.is_dir():
        raise UserError(f"No folder {folder}; name the output.dir of a run")
    if not (folder / "metrics.json").is_file():
        raise UserError(f"{folder} holds no finished run (no metrics.json); train first with `sgm finetune`")


@contextmanager
def catch_bad_values(where: str) -> Iterator[None]:
    """Turns errors from values that no run writes into a UserError.

    `load_run` checks only the values that every page needs.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, UndefinedError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{where} holds files that differ from what `sgm finetune` writes ({reason}); restore them, or run it again"
        ) from None


def _read(path: Path, kind: type, default: Any = None) -> Any:
    """Returns the JSON in `path`, or `default` if it is given and the file does not exist."""
    if default is not None and not path.is_file():
        return default
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, kind):
        expected = "an object" if kind is dict else "a list"
        raise UserError(
            f"{path} holds a {type(found).__name__}, not {expected}; restore the file that `sgm finetune` wrote"
        )
    return found


def _checked_history(rows: list[Any], path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not all(isinstance(v, (int, float, type(None))) for v in row.values()):
            raise UserError(
                f"{path} is not a history: entry {number} is not an object of numbers; restore or remove the file"
            )
    return rows


_REQUIRED_METRICS: dict[str, type | tuple[type, ...]] = {
    "model": str, "task": str, "data": str, "labels": list, "before": dict, "after": dict, "seconds": dict,
    "trainable_parameters": int, "steps": int,
}  # fmt: skip


def _checked_metrics(metrics: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, kind in _REQUIRED_METRICS.items():
        if not isinstance(metrics.get(name), kind):
            raise UserError(
                f"{path} was not written by `sgm finetune`: its `{name}` is {metrics.get(name)!r:.60}; restore the file"
            )
    return metrics


_EXAMPLE_FIELDS = {"index": int, "text": str, "truth": str, "before": str, "after": str, "became": str}


def _checked_examples(examples: dict[str, Any], path: Path) -> dict[str, Any]:
    shown = examples.get("examples", [])
    valid = isinstance(shown, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in _EXAMPLE_FIELDS.items())
        for one in shown
    )
    if not valid or (shown and not isinstance(examples.get("num_changed"), dict)):
        raise UserError(f"{path} holds no examples in the form that `sgm finetune` writes; restore or remove the file")
    return examples


_CHECK_FIELDS = {"subject": str, "name": str, "passed": bool | None, "line": str, "rule": str}


def _checked_ship(ship: dict[str, Any], path: Path) -> dict[str, Any]:
    checks = ship.get("checks", [])
    valid = isinstance(checks, list) and all(
        isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in _CHECK_FIELDS.items())
        for one in checks
    )
    if ship and (not valid or not isinstance(ship.get("ship"), bool)):
        raise UserError(
            f"{path} holds no checks in the form that `sgm ship` writes; remove it, or run `sgm ship` again"
        )
    return ship
