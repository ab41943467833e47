"""The earlier run from whose adapter a run goes on (`adapter.from_run`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict

from sgm_finetune.base.config import DECODER_TASKS, Config
from sgm_finetune.base.config_file import parse_config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import checksum
from sgm_finetune.measure.plan_file import load_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.results.claim import read_progress
from sgm_finetune.results.files import PTH, find_earlier
from sgm_finetune.results.paths import found_from
from sgm_finetune.results.pth import load_pth
from sgm_finetune.train.adapters.apply import ADAPTER


@dataclass(frozen=True)
class EarlierRun:
    """An adapter that was trained before, and its plan."""

    path: Path
    """The .pth file."""
    content: dict[str, Any]
    """What it holds."""
    plan: Plan


def read_earlier(config: Config) -> EarlierRun | None:
    """The run that `adapter.from_run` names; None if it names none. Raises UserError where there is no such run, or it
    is of another base model or task."""
    if config.adapter.from_run is None:
        return None
    folder = Path(config.adapter.from_run)
    if _is_same(str(folder), config.output.dir):
        raise UserError(f"adapter.from_run and output.dir are both {folder}; name another output.dir")
    path = find_earlier(folder)
    content = load_pth(path)
    if "tensors" in content:
        raise UserError(
            f"adapter.from_run={folder} trained whole matrices and has no adapter; export it (sgm export --to merged) "
            "and give that folder as model.name"
        )
    values = parse_config(content["config"], str(path)).model_dump(mode="json")
    before = parse_config(found_from(values, folder), str(path))
    if not _is_same(before.model.name, config.model.name):
        raise UserError(
            f"adapter.from_run={folder} is of the base model {before.model.name}, and this run has "
            f"model.name={config.model.name}; give both the same"
        )
    tasks = {before.model.task, config.model.task}
    if len(tasks) > 1 and not tasks <= set(DECODER_TASKS):
        raise UserError(
            f"adapter.from_run={folder} has model.task={before.model.task}, and this run has {config.model.task}; give "
            "both the same, or train a new adapter"
        )
    return EarlierRun(path, content, load_plan(folder / "plan.json"))


def _is_same(left: str, right: str) -> bool:
    """Whether two names are one folder, or one name."""
    return left == right or (os.path.isdir(left) and os.path.isdir(right) and os.path.samefile(left, right))


def checksum_of_earlier(config: Config) -> str | None:
    """The checksum of the earlier run's .pth file; None if the run begins with a new adapter."""
    return None if config.adapter.from_run is None else checksum(Path(config.adapter.from_run) / PTH)


def check_same_earlier(config: Config, output: Path) -> None:
    """Raises UserError if a resumed run would go on from something else than it began with."""
    if config.adapter.from_run is not None and read_progress(output).earlier != checksum_of_earlier(config):
        raise UserError(
            f"training.resume=true: {config.adapter.from_run} holds another result than the run began with; bring it "
            "back, or start a new run"
        )


def check_labels(earlier: EarlierRun, labels: tuple[str, ...]) -> None:
    """Raises UserError if the head of the earlier run has other classes than the data."""
    if tuple(earlier.content["labels"]) != labels:
        raise UserError(
            f"{earlier.path.parent} was trained on the labels {earlier.content['labels']}, and the data has "
            f"{list(labels)}; take data with the same, or train a new adapter"
        )


def take_factors(model: PeftModel, earlier: EarlierRun) -> None:
    """Gives all that `model` trains the values of the earlier run. Raises UserError where they do not fit."""
    given = earlier.content["adapter"]
    own = {name.replace(f".{ADAPTER}.", "."): tensor for name, tensor in get_peft_model_state_dict(model).items()}
    for name in own.keys() ^ given.keys():
        raise UserError(f"{earlier.path} does not fit this run: only one of them trains `{name}`; train a new adapter")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != given[name].shape:
                raise UserError(
                    f"{earlier.path} does not fit this run: `{name}` has the shape {list(given[name].shape)}, not "
                    f"{list(tensor.shape)}; train a new adapter"
                )
            tensor.copy_(given[name])
