"""output.dir: whether a run may use it, what a run writes there before its first step, and how it is resumed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.environment import environment_file
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import refuse, require_json_object
from sgm_finetune.data.encoding import fingerprint
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.measure.plan_file import save_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.files import PTH, RESULTS, clear_results, write_config
from sgm_finetune.train.budget.fit import reuse_fit
from sgm_finetune.train.checkpoints import best_checkpoint, is_whole, last_whole_checkpoint

_PROGRESS = Path("checkpoints") / "progress.json"


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


def begin(
    config: Config, asked: Config, output: Path, start: Start, prepared: PreparedData, seconds: dict[str, float]
) -> None:
    """Removes an earlier run's results from the output folder and writes this run's plan and numbers.

    `asked` is the configuration before it was fitted to memory.budget. The first file shows that a run has begun, so
    that one that was killed before its first checkpoint can begin anew.
    """
    if config.output.overwrite or _has_only_begun(output):
        clear_results(output)
    progress = {
        "before": start.before,
        "predicted": start.predictions,
        "probe": start.probe,
        "seconds": seconds,
        "asked": asked.model_dump(mode="json"),
        "data": _fingerprints(prepared),
    }
    write_json(output / _PROGRESS, progress)
    write_json(output / "environment.json", environment_file(config))
    write_config(output / "config.yaml", config)
    save_plan(start.plan, output / "plan.json")


def recall_start(output: Path, plan: Plan, seconds: dict[str, float]) -> Start:
    """Returns what the interrupted run knew before its first step, and adds its seconds to `seconds`."""
    progress = _progress(output)
    seconds |= progress.seconds
    return Start(plan, progress.before, progress.predicted, progress.probe)


def as_it_began(config: Config, output: Path) -> Config:
    """The configuration of a resumed run, with what memory.budget chose when the run began."""
    if not (output / "config.yaml").is_file() or not (output / _PROGRESS).is_file():
        return config
    return reuse_fit(config, load_config(output / "config.yaml"), _progress(output).asked)


def check_same_data(prepared: PreparedData, output: Path) -> None:
    """Raises UserError if a resumed run would get other examples than it began with."""
    before = _progress(output).data
    for name, now in _fingerprints(prepared).items():
        if before.get(name, now) != now:
            raise UserError(
                f"training.resume=true: the {name} examples are not those that the run began with; bring back the "
                "files as they were, or start a new run"
            )


def _fingerprints(prepared: PreparedData) -> dict[str, str]:
    return {name: fingerprint(getattr(prepared, name).dataset) for name in ("train", "validation", "test")}


class _Progress(BaseModel):
    before: dict[str, Any]
    predicted: list[Any] = []
    probe: dict[str, Any] | None
    seconds: dict[str, float]
    asked: Config | None = None
    data: dict[str, str] = {}


def _progress(output: Path) -> _Progress:
    try:
        return _Progress.model_validate(require_json_object(output / _PROGRESS))
    except ValidationError as error:
        refuse(output / _PROGRESS, "progress of a run", ValueError(first_mistake(error)))


def _has_only_begun(output: Path) -> bool:
    """Whether the folder holds a run that saved neither a checkpoint nor a result, so that nothing can be lost."""
    return (
        (output / _PROGRESS).is_file()
        and not (output / PTH).exists()
        and last_whole_checkpoint(output / "checkpoints") is None
    )


def claim_output(config: Config, output: Path) -> Path | None:
    """Returns the checkpoint to resume from, or None for a fresh run.

    Raises UserError if the folder holds earlier results that may not be replaced, if there is nothing to resume, or if
    the folder cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output.dir={output} is a file; name a folder")
    present = [name for name in RESULTS if (output / name).exists()]
    if config.training.resume:
        checkpoint = last_whole_checkpoint(output / "checkpoints")
        if checkpoint is None:
            raise UserError(f"training.resume=true finds no checkpoint in {output / 'checkpoints'}; start without it")
        if not (output / "plan.json").is_file() or not (output / _PROGRESS).is_file():
            raise UserError(
                f"{output} lacks the plan or the progress of the run to resume; start without training.resume"
            )
        best = best_checkpoint(checkpoint)  # if it is gone, a later and better one had taken its place
        if best is not None and best.is_dir() and not is_whole(best):
            raise UserError(f"{best}, the best checkpoint of the run to resume, is damaged; start a new run")
        _check_same_run(config, output)
        _check_writable(output)
        return checkpoint
    if present and not config.output.overwrite and not _has_only_begun(output):
        can_resume = PTH not in present and last_whole_checkpoint(output / "checkpoints") is not None
        unfinished = "; continue it with training.resume=true" if can_resume else ""
        raise UserError(
            f"{output} holds an earlier run ({', '.join(present[:3])}){unfinished}; name another output.dir, or "
            "replace it with output.overwrite=true"
        )
    _check_writable(output)
    return None


def _check_writable(output: Path) -> None:
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"output.dir={output} cannot be made: {parent} is a file; name another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"output.dir={output} cannot be written: {parent} is read-only for you")


_FREE = (
    "training.resume", "training.shard", "training.micro_batch_size", "training.checkpointing", "output.dir",
    "output.overwrite", "training.report_to", "plan",
)  # fmt: skip
"""Keys that may change when a run is resumed: they change no result beyond rounding."""


def _check_same_run(config: Config, output: Path) -> None:
    """Raises UserError if a key that shapes the result differs from the interrupted run's."""
    earlier = load_config(output / "config.yaml").model_dump(mode="json")
    now = config.model_dump(mode="json")
    for section, values in now.items():
        pairs = {section: (earlier.get(section), values)}
        if isinstance(values, dict):
            pairs = {f"{section}.{key}": (earlier[section].get(key), value) for key, value in values.items()}
        for key, (old, new) in pairs.items():
            if old != new and key not in _FREE:
                raise UserError(
                    f"training.resume=true: `{key}` is {new!r} now and was {old!r} when the run began; "
                    "use the same value, or start a new run"
                )
