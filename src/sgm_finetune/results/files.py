"""The files that a run leaves: their names, the PEFT adapter folder, config.yaml."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import is_link, remove, whole_folder, write_text, writing

if TYPE_CHECKING:
    from peft import PeftModel

PTH = "sgm_finetuned.pth"
RESULTS = (
    PTH, "adapter", "plan.json", "plan.safetensors", "config.yaml", "metrics.json", "report.html", "environment.json",
    "history.json", "examples.json", "pictures.json", "prompts.json", "ship.json", "checkpoints", "export",
)  # fmt: skip
"""Everything that a run, or `sgm export`, writes into the output folder; `output.overwrite=true` replaces all of it."""


def find_result(output: Path) -> Path:
    """The .pth file of the run in the folder `output`. Raises UserError when there is none."""
    path = output / PTH
    if not path.is_file():
        raise UserError(f"No {path}; train first with `sgm finetune`, or name the folder with output.dir=...")
    return path


def find_earlier(folder: Path) -> Path:
    """The .pth file of the finished run that `adapter.from_run` names. Raises UserError when there is none, or no plan
    beside it."""
    for name in (PTH, "plan.json"):
        if not (folder / name).is_file():
            raise UserError(f"adapter.from_run={folder} has no {name}; name the folder of a finished run")
    return folder / PTH


def write_config(path: Path, config: Config) -> None:
    """Writes the resolved configuration: every key with its value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def save_adapter(model: PeftModel, folder: Path, base: str, write_tokenizer: Callable[[Path], None]) -> None:
    """Writes a standard PEFT LoRA folder (adapter_config.json, adapter_model.safetensors) with what `write_tokenizer`
    writes.

    adapter_config.json names the base model `base`. Shared factors are written once per member, lora_B of a pool times
    the member's codes, so that an unmodified `PeftModel.from_pretrained` loads it.
    """
    from sgm_finetune.train.adapters.pool import plain_factors  # needs torch

    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    with whole_folder(folder) as scratch:
        model.save_pretrained(str(scratch), state_dict=plain_factors(model.state_dict()))
        write_tokenizer(scratch)


def clear_results(folder: Path) -> None:
    """Removes what an earlier run wrote, and nothing else. A folder behind a link is emptied, and the link stays.

    Raises UserError before anything is removed if a link cannot be followed (see check_links), and where Windows lets
    a file that another program has open not be removed.
    """
    check_links(folder)
    for path in (folder / name for name in RESULTS):
        for found in path.iterdir() if is_link(path) and path.is_dir() else [path]:
            with writing(found, "; close the program that has it open"):
                remove(found)


def check_links(folder: Path) -> None:
    """Raises UserError if a result in `folder` is a link that leads nowhere, or to a folder that SGM did not fill:
    somebody else may have made the link, and SGM replaces what it leads to."""
    for path in (folder / name for name in RESULTS if is_link(folder / name)):
        if not path.exists():
            raise UserError(f"{path} is a link to {path.readlink()}, which does not exist; make that folder")
        if not path.is_dir():
            continue  # a new file takes the place of a link to a file
        for found in path.iterdir():
            if not _is_own(path.name, found):
                raise UserError(
                    f"{path} is a link to a folder with {found.name} in it, which SGM did not write and would remove; "
                    "let the link lead to an empty folder"
                )
        if path.name == "adapter" and (os.path.ismount(path) or not os.access(path.resolve().parent, os.W_OK)):
            raise UserError(
                f"{path} is a link to {path.resolve()}, which cannot be replaced as a whole; let the link lead to a "
                "folder in a folder that you may write to"
            )


def _is_own(result: str, found: Path) -> bool:
    """Whether SGM may have written `found` into the folder `result`."""
    match result:
        case "checkpoints":
            return any(found.match(pattern) for pattern in ("checkpoint-*", "progress.json", ".progress.json.partial"))
        case "adapter":
            return found.is_file() and (found.parent / "adapter_config.json").is_file()
        case "export":
            return found.match(".*.partial") or found.match(".*.old") or (found / "export.json").is_file()
    return False
