"""What a run leaves: the PEFT adapter folder, sgm_finetuned.pth and the plain files, each whole or absent."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedTokenizerBase

from sgm_finetune.base.config import Config, LabelKind
from sgm_finetune.base.files import whole_file, write_text, writing
from sgm_finetune.measure.plan_file import plan_document
from sgm_finetune.method.plan import Plan
from sgm_finetune.train.adapters.apply import ADAPTER

PTH = "sgm_finetuned.pth"


FORMAT = "sgm-finetuned/1"


RESULTS = (
    PTH, "adapter", "plan.json", "plan.safetensors", "config.yaml", "metrics.json", "report.html", "environment.json",
    "history.json", "examples.json", "pictures.json", "checkpoints", "export",
)  # fmt: skip
"""Everything that a run, or `sgm export`, writes into the output folder; `output.overwrite=true` replaces all of it."""


def write_config(path: Path, config: Config) -> None:
    """The resolved configuration: every key with its value."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A standard PEFT LoRA folder (adapter_config.json, adapter_model.safetensors) with the tokenizer's files.

    Shared factors are written once per member, so that an unmodified `PeftModel.from_pretrained` loads it.
    """
    scratch, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    try:
        with writing(folder):
            for left in (scratch, old):
                shutil.rmtree(left, ignore_errors=True)
            model.save_pretrained(str(scratch))
            tokenizer.save_pretrained(scratch)
            if folder.exists():
                folder.rename(old)
            scratch.rename(folder)
    finally:
        for left in (scratch, old):
            shutil.rmtree(left, ignore_errors=True)


def save_pth(
    path: Path,
    model: PeftModel,
    plan: Plan,
    config: Config,
    labels: Sequence[str],
    label_kind: LabelKind | None,
    roles: Sequence[str] = (),
) -> None:
    """One file of tensors and plain data with all that `sgm evaluate` needs but the base model.

    Keys: format, adapter (name -> tensor, a shared factor's storage once), peft_config, plan, config; and of the data
    labels, label_kind and roles (text, label, messages ...).
    """
    state = {name: tensor.detach().cpu() for name, tensor in _once(get_peft_model_state_dict(model)).items()}
    content = {
        "format": FORMAT,
        "adapter": state,
        "peft_config": _plain(model.peft_config[ADAPTER].to_dict()),
        "plan": plan_document(plan),
        "config": config.model_dump(mode="json"),
        "labels": list(labels),
        "label_kind": label_kind,
        "roles": list(roles),
    }
    with whole_file(path) as scratch:
        torch.save(content, scratch)


def _once(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, with tensors that share memory still sharing it."""
    moved: dict[tuple[int, torch.Size], torch.Tensor] = {}
    return {n: moved.setdefault((t.data_ptr(), t.shape), t.detach().cpu()) for n, t in state.items()}


def _plain(value: Any) -> Any:
    """JSON's types only: sets become sorted lists, enumerations their values."""
    match value:
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case set() | frozenset():
            return sorted(_plain(v) for v in value)
        case list() | tuple():
            return [_plain(v) for v in value]
        case bool() | int() | float() | None:
            return value
        case _:
            return str(getattr(value, "value", value))


def clear_results(folder: Path) -> None:
    """Removes what an earlier run wrote, and nothing else."""
    for name in RESULTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
