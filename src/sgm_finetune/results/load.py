"""A result read from its .pth file, with the base model that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgm_finetune.base.config import Config, LabelKind, ModelConfig, parse_config, set_overrides
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_mistake
from sgm_finetune.base.untrusted import check_bounded, read_object, read_torch, refuse
from sgm_finetune.measure.plan_file import parse_plan
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.folder import announce_own_code, local_folder
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.load import Head, load_model, skeleton
from sgm_finetune.model.tokenizer import load_tokenizer
from sgm_finetune.results.files import FORMAT, PTH, _plain
from sgm_finetune.train.adapters.apply import check_plan, lora_layers, tie


class _Settings(BaseModel):
    """PEFT's settings that a run writes; nothing else of PEFT's (regular expressions, classes to import, other
    files) is taken from a file."""

    model_config = ConfigDict(strict=True, extra="ignore")
    r: int = Field(ge=1, le=2**16)
    lora_alpha: float = Field(gt=0, allow_inf_nan=False)
    lora_dropout: float = Field(ge=0, lt=1)
    target_modules: list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM"] | None = None
    fan_in_fan_out: bool = False


class _Content(BaseModel):
    """A .pth file's."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)
    format: Literal["sgm-finetuned/1"]
    adapter: dict[str, torch.Tensor]
    peft_config: dict[str, Any]
    plan: dict[str, Any]
    config: dict[str, Any]
    labels: list[str]
    label_kind: LabelKind | None = None
    roles: list[str] = []


def load_pth(path: Path) -> dict[str, Any]:
    """The content of a .pth file that `save_pth` wrote, read without running any code from it, its types checked."""
    try:
        content = read_torch(path)
    except FileNotFoundError:
        raise UserError(f"No {path}; train first with `sgm finetune`, or name the folder with output.dir=...") from None
    except (OSError, ValueError):
        raise UserError(
            f"{path} is cut short, or holds more than tensors and plain data (it could be code, so it was not read); "
            "take a file that `sgm finetune` wrote"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} was not written by `sgm finetune` (format {FORMAT})")
    try:
        _Content.model_validate(content)
        for part in ("peft_config", "plan", "config"):
            check_bounded(content[part], leaf=_check_plain)
        _check_settings(content["peft_config"])
    except ValueError as error:
        refuse(path, "result", ValueError(first_mistake(error)) if isinstance(error, ValidationError) else error)
    return content


def _check_plain(value: Any) -> None:
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"it holds a {type(value).__name__} where plain data belongs")


def _check_settings(given: dict[str, Any]) -> None:
    """ValueError for settings that a run does not write, and which would change what PEFT does."""
    _Settings.model_validate(given)
    fields = LoraConfig.__dataclass_fields__
    ours = {*_Settings.model_fields, "peft_type", "inference_mode", "base_model_name_or_path", "revision",
            "auto_mapping", "peft_version"}  # fmt: skip
    plain = _plain(LoraConfig().to_dict())
    for key in given.keys() & fields.keys() - ours:
        if given[key] and given[key] != plain.get(key):
            raise ValueError(f"`peft_config.{key}` is {str(given[key])[:60]!r}, which `sgm finetune` does not write")


def stored_config(content: dict[str, Any], path: Path, config: Config, overrides: Sequence[str]) -> Config:
    """The configuration in a loaded .pth file, changed by `overrides` (key=value). Where results are, and whether a
    model's own code may run, is `config`'s, never the file's, which may be a stranger's. Raises UserError."""
    values = parse_config(content["config"], str(path)).model_dump(mode="json")
    values["output"]["dir"] = config.output.dir
    values["model"]["trust_remote_code"] = config.model.trust_remote_code
    return parse_config(values, str(path), set_overrides(values, overrides))


def lora_config(content: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration of the adapter in a loaded .pth file, for whatever folder its base is in now."""
    given = content["peft_config"]
    return LoraConfig(**{key: given[key] for key in _Settings.model_fields if key in given})


def attach_adapter(base: PreTrainedModel, content: dict[str, Any], where: Path) -> PeftModel:
    """`base` with the trained adapter of a loaded .pth file, its groups tied."""
    ready_for_backward(base)
    model = attach_untrained(base, content, where)
    try:
        outcome = set_peft_model_state_dict(model, content["adapter"])
    except RuntimeError as error:
        raise UserError(f"{where} does not fit the base model: {_brief(error)}") from None
    if outcome.unexpected_keys:
        raise UserError(f"{where} does not fit the base model: it holds `{outcome.unexpected_keys[0]}`")
    return model.eval()  # type: ignore[return-value]


def attach_untrained(base: PreTrainedModel, content: dict[str, Any], where: Path) -> PeftModel:
    """`base` with an adapter of the shapes that a loaded .pth file holds, its groups tied; also on device "meta"."""
    plan = parse_plan(content["plan"], str(where))
    try:
        check_plan(base, plan)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{where} does not fit the base model; take the one it was trained on. {reason}") from None
    try:
        model = get_peft_model(base, lora_config(content))
    except ValueError as error:
        raise UserError(f"{where} does not fit the base model: {_brief(error)}") from None
    if other := set(lora_layers(model)) ^ {matrix.name for matrix in plan.selected}:  # type: ignore[arg-type]
        raise UserError(f"{where} is no usable result: its plan and its adapter differ in `{min(other)}`")
    tie(model, plan)  # type: ignore[arg-type]
    return model  # type: ignore[return-value]


def _brief(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else type(error).__name__


@dataclass(frozen=True)
class Result:
    """A trained adapter, and where its base model is."""

    path: Path
    """The .pth file."""
    content: dict[str, Any]
    config: Config
    """As trained, with what the command line changes."""
    folder: Path
    """The base model's."""
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    label_kind: LabelKind | None

    @property
    def base_config(self) -> dict[str, Any]:
        """The base model's config.json."""
        return read_object(self.folder / "config.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json beside the result; {} where it is gone."""
        path = self.path.parent / "metrics.json"
        return read_object(path) if path.is_file() else {}


def read_result(config: Config, overrides: Sequence[str], log: StepLog) -> Result:
    """The result in `config.output.dir`; `overrides` (key=value) change the configuration that it was trained with.

    Raises UserError where there is none, and where its base model is not to be had.
    """
    path = Path(config.output.dir) / PTH
    content = load_pth(path)
    trained = stored_config(content, path, config, overrides)
    model = trained.model
    folder = local_folder(model.name, model.revision, lambda line: log.line("model", line))
    announce_own_code(model, folder, log)
    check_model(unquantised(model), folder)
    labels, kind = tuple(content["labels"]), content.get("label_kind")
    if kind is None and model.task == "sequence-classification" and not labels:
        kind = "number"  # nothing else is without names
    return Result(path, content, trained, folder, load_tokenizer(folder, model), labels, kind)


def unquantised(model: ModelConfig, dtype: str = "auto") -> ModelConfig:
    return model.model_copy(update={"quantization": "none", "dtype": dtype})


def base_skeleton(result: Result) -> PreTrainedModel:
    """The unquantised base model on device "meta", with the head of the task."""
    return skeleton(unquantised(result.config.model), result.folder, _head(result))


def load_unquantised(result: Result, dtype: str) -> PreTrainedModel:
    """The base model as its files have it, computing in `dtype`."""
    set_seed(result.config.training.seed)  # a new head is random, until the adapter brings its own
    model, _ = load_model(unquantised(result.config.model, dtype), result.folder, _head(result))
    return model


def _head(result: Result) -> Head:
    padding = result.tokenizer.pad_token_id
    return Head(result.labels, result.label_kind, padding)  # type: ignore[arg-type]  # one token's id


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
