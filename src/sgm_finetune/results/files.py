"""The files that a run leaves: their names, the PEFT adapter folder, config.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sgm_finetune.base.config import Config
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_text, writing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

PTH = "sgm_finetuned.pth"
RESULTS = (
    PTH, "adapter", "plan.json", "plan.safetensors", "config.yaml", "metrics.json", "report.html", "environment.json",
    "history.json", "examples.json", "pictures.json", "checkpoints", "export",
)  # fmt: skip
"""Everything that a run, or `sgm export`, writes into the output folder; `output.overwrite=true` replaces all of it."""


def find_result(output: Path) -> Path:
    """The .pth file of the run in the folder `output`. Raises UserError when there is none."""
    path = output / PTH
    if not path.is_file():
        raise UserError(f"No {path}; train first with `sgm finetune`, or name the folder with output.dir=...")
    return path


def write_config(path: Path, config: Config) -> None:
    """Writes the resolved configuration: every key with its value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base: str) -> None:
    """Writes a standard PEFT LoRA folder (adapter_config.json, adapter_model.safetensors) with the tokenizer's files.

    adapter_config.json names the base model `base`.
    Shared factors are written once per member, so that an unmodified `PeftModel.from_pretrained` loads it.
    """
    scratch, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    try:
        with writing(folder):
            for left in (scratch, old):
                shutil.rmtree(left, ignore_errors=True)
            for config in model.peft_config.values():
                config.base_model_name_or_path = base
            model.save_pretrained(str(scratch))
            tokenizer.save_pretrained(scratch)
            if folder.exists():
                folder.rename(old)
            scratch.rename(folder)
    finally:
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)


def clear_results(folder: Path) -> None:
    """Removes what an earlier run wrote, and nothing else."""
    for name in RESULTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
