"""output.dir: whether a run may use it, and what an interrupted run left there. Nothing here needs torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import refuse, require_json_object
from sgm_finetune.results.files import PTH, RESULTS, check_links
from sgm_finetune.results.paths import found_from, with_absolute_paths
from sgm_finetune.train.budget.reuse import reuse_fit
from sgm_finetune.train.checkpoints import check_best, last_whole_checkpoint

PROGRESS = Path("checkpoints") / "progress.json"


def as_it_began(config: Config, output: Path) -> Config:
    """The configuration of a resumed run, with what was chosen when the run began."""
    if not (output / "config.yaml").is_file() or not (output / PROGRESS).is_file():
        return config
    return reuse_fit(config, load_config(output / "config.yaml"), read_progress(output).asked)


class Progress(BaseModel):
    """What a run knows before its first step, as checkpoints/progress.json keeps it."""

    before: dict[str, Any]
    predicted: list[Any] = []
    probe: dict[str, Any] | None
    rate_trials: dict[str, Any] | None = None
    seconds: dict[str, float]
    asked: Config | None = None
    data: dict[str, str] = {}
    earlier: str | None = None


def read_progress(output: Path) -> Progress:
    """The progress of the run in `output`. Raises UserError when it cannot be read."""
    try:
        return Progress.model_validate(require_json_object(output / PROGRESS))
    except ValidationError as error:
        refuse(output / PROGRESS, "progress of a run", ValueError(first_mistake(error)))


def has_only_begun(output: Path) -> bool:
    """Whether the folder holds a run that saved neither a checkpoint nor a result, so that nothing can be lost."""
    return (
        (output / PROGRESS).is_file()
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
    check_links(output)
    present = [name for name in RESULTS if (output / name).exists()]
    if config.training.resume:
        checkpoint = last_whole_checkpoint(output / "checkpoints")
        if checkpoint is None:
            raise UserError(f"training.resume=true finds no checkpoint in {output / 'checkpoints'}; start without it")
        if not (output / "plan.json").is_file() or not (output / PROGRESS).is_file():
            raise UserError(
                f"{output} lacks the plan or the progress of the run to resume; start without training.resume"
            )
        check_best(checkpoint)
        _check_same_run(config, output)
        _check_writable(output)
        return checkpoint
    if present and not config.output.overwrite and not has_only_begun(output):
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
    earlier = found_from(load_config(output / "config.yaml").to_compare(), output)
    now = with_absolute_paths(config).to_compare()
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
