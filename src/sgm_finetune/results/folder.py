"""output.dir: what a run writes there before its first step, and how it is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm_finetune.base.config import Config
from sgm_finetune.base.environment import environment_file
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.data.encoding import fingerprint
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.plan_file import save_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.claim import PROGRESS, has_only_begun, read_progress
from sgm_finetune.results.earlier_run import checksum_of_earlier
from sgm_finetune.results.files import clear_results, write_config
from sgm_finetune.results.paths import with_absolute_paths


@dataclass(frozen=True)
class Start:
    """What a run knows before its first step; checkpoints/progress.json keeps it for a run that is resumed."""

    plan: Plan
    before: dict[str, Any]
    """Metrics of the untouched model on the test data."""
    predictions: list[Any]
    """Its predictions for `kept_indices` of the test examples."""
    probe: dict[str, Any] | None
    """What metrics.json reports about the probe; None: there was none."""
    rate_trials: dict[str, Any] | None = None
    """What metrics.json reports about the trials of training.learning_rate=auto; None: there were none."""


def begin(
    config: Config, asked: Config, output: Path, start: Start, prepared: PreparedData, seconds: dict[str, float]
) -> None:
    """Removes an earlier run's results from the output folder and writes this run's plan and numbers.

    `asked` is the configuration before the run chose anything. The first file shows that a run has begun, so
    that one that was killed before its first checkpoint can begin anew.
    """
    if config.output.overwrite or has_only_begun(output):
        clear_results(output)
    progress = {
        "before": start.before,
        "predicted": start.predictions,
        "probe": start.probe,
        "rate_trials": start.rate_trials,
        "seconds": seconds,
        "asked": with_absolute_paths(asked).model_dump(mode="json"),
        "data": _fingerprints(prepared),
        "earlier": checksum_of_earlier(config),
    }
    write_json(output / PROGRESS, progress)
    write_json(output / "environment.json", environment_file(config))
    write_config(output / "config.yaml", with_absolute_paths(config))
    save_plan(start.plan, output / "plan.json")


def recall_start(output: Path, plan: Plan, seconds: dict[str, float]) -> Start:
    """Returns what the interrupted run knew before its first step, and adds its seconds to `seconds`."""
    progress = read_progress(output)
    seconds |= progress.seconds
    return Start(plan, progress.before, progress.predicted, progress.probe, progress.rate_trials)


def check_same_data(prepared: PreparedData, output: Path) -> None:
    """Raises UserError if a resumed run would get other examples than it began with."""
    before = read_progress(output).data
    for name, now in _fingerprints(prepared).items():
        if before.get(name, now) != now:
            raise UserError(
                f"training.resume=true: the {name} examples are not those that the run began with; bring back the "
                "files as they were, or start a new run"
            )


def _fingerprints(prepared: PreparedData) -> dict[str, str]:
    return {name: fingerprint(getattr(prepared, name).dataset) for name in ("train", "validation", "test")}
