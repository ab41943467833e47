"""A result: what a run left in its output folder, with the base model that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sgm_finetune.base.config import Config, LabelKind, ModelConfig
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.measure.plan_file import parse_plan
from sgm_finetune.method.plan import Plan
from sgm_finetune.model.architecture import check_model, why_not_at
from sgm_finetune.model.as_trained import round_as_trained
from sgm_finetune.model.files import ModelFiles, find_model_files
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.load import Head, load_model, skeleton
from sgm_finetune.results.export.target import BaseWeights
from sgm_finetune.results.files import find_result
from sgm_finetune.results.pth import load_pth, lora_config, stored_config
from sgm_finetune.train.adapters.apply import check_plan, lora_layers, tie
from sgm_finetune.train.adapters.pool import plain_factors
from sgm_finetune.train.base_model import load_base_weights
from sgm_finetune.train.budget.reuse import replaced
from sgm_finetune.train.full.changed import check_fit, exchange, exchanged
from sgm_finetune.train.launch import apply_launcher


@dataclass(frozen=True)
class StoredResult:
    """A trained adapter, or what was trained whole, as its .pth file holds it. The base model is not looked for yet."""

    path: Path
    """The .pth file."""
    content: dict[str, Any]
    """What the .pth file holds."""
    config: Config
    """The configuration that it was trained with, changed by the command line."""

    @property
    def is_full(self) -> bool:
        """Whether matrices were trained whole."""
        return "tensors" in self.content

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.content["labels"])

    @property
    def label_kind(self) -> LabelKind | None:
        """What the head predicts; None without a head. A file does not say it of a reward, nor an older one of a
        number: both have no names."""
        is_number = self.config.model.task in ("sequence-classification", "reward") and not self.labels
        return self.content.get("label_kind") or ("number" if is_number else None)

    @property
    def head(self) -> Head:
        """The head that was trained."""
        return Head(self.labels, self.label_kind, is_new=self.content.get("head_is_new", False))


@dataclass(frozen=True)
class Result(StoredResult):
    """A trained adapter, and the files of its base model. No weights of the base are loaded yet."""

    base: ModelFiles
    roles: tuple[str, ...]
    """Roles of the columns that it was trained on (text, label, messages ...); () where an older file does not say."""
    base_weights: BaseWeights = "original"
    """The weights that its update belongs to, in `load_unquantised` and in exports."""

    @property
    def folder(self) -> Path:
        """The base model's folder."""
        return self.base.folder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.base.tokenizer

    @property
    def head(self) -> Head:
        return replace(super().head, pad_token_id=self.tokenizer.pad_token_id)  # type: ignore[arg-type]  # one token

    @property
    def base_config(self) -> dict[str, Any]:
        """The base model's config.json."""
        return require_json_object(self.folder / "config.json")

    @property
    def metrics(self) -> dict[str, Any]:
        """metrics.json beside the result; {} where it is gone."""
        path = self.path.parent / "metrics.json"
        return require_json_object(path) if path.is_file() else {}


@dataclass(frozen=True, kw_only=True)
class LoadedResult(Result):
    """A result with its weights, ready to answer."""

    model: PeftModel | PreTrainedModel
    """The base model as it was trained, 4-bit weights included, with the adapter on it or the trained matrices in
    it."""
    former: Mapping[str, Tensor] = field(default_factory=dict)
    """What the base has in the place of matrices that were trained whole, by name."""

    def as_base(self) -> AbstractContextManager:
        """A context in which `model` is the base model."""
        return without_update(self.model, self.former)


def read_stored(config: Config, overrides: Sequence[str], log: StepLog) -> StoredResult:
    """Reads the .pth file in `config.output.dir`; `overrides` (key=value) change the configuration that trained it.

    Raises UserError where there is no usable result.
    """
    path = find_result(Path(config.output.dir))
    content = load_pth(path)
    settings = stored_config(content, path, config, overrides, lambda line: log.line("config", line))
    return StoredResult(path, content, apply_launcher(_on_this_machine(settings, overrides, log)))


def _on_this_machine(config: Config, overrides: Sequence[str], log: StepLog) -> Config:
    """`config` with the base in memory, if it was trained elsewhere on another machine and cannot be there on this one.
    What the command line asks for stays, and is refused later."""
    place = config.model.residence
    if place not in ("host", "disk") or any(override.startswith("model.residence=") for override in overrides):
        return config
    if (reason := why_not_at(place, config.model)) is None:
        return config
    log.line("base", f"in memory here: model.residence={place}, as it was trained, {reason}")
    return replaced(config, "model", residence=None)


def find_base(stored: StoredResult, log: StepLog) -> Result:
    """Finds the files of the result's base model; converts or downloads them first where that is needed.

    Raises UserError where the base model is not available.
    """
    model = stored.config.model
    is_path = Path(model.name).is_absolute() or model.name.startswith(("./", "../"))
    if is_path and not Path(model.name).exists():
        raise UserError(
            f"No model folder {model.name}, from which this run was trained; give its new place: model.name=FOLDER"
        )
    base = find_model_files(unquantised(model), log)
    return Result(**vars(stored), base=base, roles=tuple(stored.content.get("roles", ())))


def read_result(config: Config, overrides: Sequence[str], log: StepLog) -> Result:
    """`read_stored`, then `find_base`."""
    return find_base(read_stored(config, overrides, log), log)


def load_trained(result: Result, log: StepLog) -> LoadedResult:
    """Loads the base model as it was trained, and the adapter; in eval mode. Raises UserError where it does not fit."""
    check_model(result.config.model, result.folder)
    base, _ = load_base_weights(result.config, result.folder, result.head, log)
    model, former = attach(base, result.content, result.path)
    return LoadedResult(**vars(result), model=model, former=former)


def load_unquantised(result: Result, dtype: str) -> PreTrainedModel:
    """Loads the base model without quantisation, computing in `dtype`.

    Its weights are those in the files. If `result.base_weights` is "trained", they are what quantisation made of these
    in training, and all of them are in memory.
    """
    set_seed(result.config.training.seed)  # a new head is random until the adapter brings its own
    is_trained = result.base_weights == "trained"
    config = unquantised(result.config.model, dtype)
    if is_trained:  # elsewhere, weights are views of files, or copies that are made once
        config = config.model_copy(update={"residence": "device"})
    model, _ = load_model(config, result.folder, result.head)
    if is_trained:
        round_as_trained(model, result.config.model)
    return model


def base_skeleton(result: Result) -> PreTrainedModel:
    """The unquantised base model on device "meta", with the head of the task."""
    return skeleton(unquantised(result.config.model), result.folder, result.head)


def unquantised(model: ModelConfig, dtype: str = "auto") -> ModelConfig:
    """`model` without quantisation, computing in `dtype`."""
    return model.model_copy(update={"quantization": "none", "dtype": dtype})


def attach(
    base: PreTrainedModel, content: dict[str, Any], path: Path
) -> tuple[PeftModel | PreTrainedModel, dict[str, Tensor]]:
    """`base` as the content of the .pth file `path` trained it, in eval mode, and for `without_update` what was in the
    place of matrices that were trained whole. Raises UserError where it does not fit."""
    if "tensors" not in content:
        return attach_adapter(base, content, path), {}
    check_whole(base, content, path)
    return base.eval(), exchange(base, content["tensors"])


def without_update(model: PeftModel | PreTrainedModel, former: Mapping[str, Tensor]) -> AbstractContextManager:
    """A context in which a `model` from `attach` is the base model."""
    return model.disable_adapter() if isinstance(model, PeftModel) else exchanged(model, former)


def check_whole(base: PreTrainedModel, content: dict[str, Any], path: Path) -> None:
    """Raises UserError unless plan and tensors in the content of the .pth file `path` fit `base`."""
    plan = parse_plan(content["plan"], str(path))
    _check_plan_fits(base, plan, path)
    check_fit(base, content["tensors"], str(path))
    lacking = [m.name for m in plan.selected if f"{m.name}.weight" not in content["tensors"] and m.num_experts is None]
    if lacking:
        raise UserError(f"{path} is not a usable result: only its plan has `{lacking[0]}`")


def _check_plan_fits(base: PreTrainedModel, plan: Plan, path: Path) -> None:
    try:
        check_plan(base, plan)
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{path} does not fit the base model; take the one it was trained on. {reason}") from None


def attach_adapter(base: PreTrainedModel, content: dict[str, Any], path: Path) -> PeftModel:
    """`base` with the trained adapter in the content of the .pth file `path`, its groups tied; in eval mode.

    Raises UserError where it does not fit.
    """
    ready_for_backward(base)
    model = attach_untrained(base, content, path)
    set_factors(model, content, path)
    return model.eval()  # type: ignore[return-value]


def set_factors(model: PeftModel, content: dict[str, Any], path: Path) -> None:
    """Gives the adapter on `model` the numbers in the content of the .pth file `path`. Raises UserError where they do
    not fit."""
    try:
        outcome = set_peft_model_state_dict(model, plain_factors(content["adapter"]))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the base model: {_first_lines(error)}") from None
    if outcome.unexpected_keys:
        raise UserError(f"{path} does not fit the base model, which has no `{outcome.unexpected_keys[0]}`")


def attach_untrained(base: PreTrainedModel, content: dict[str, Any], path: Path) -> PeftModel:
    """Like `attach_adapter`, but the adapter has the right shapes and no trained numbers; works on device "meta"."""
    plan = parse_plan(content["plan"], str(path))
    _check_plan_fits(base, plan, path)
    try:
        model = get_peft_model(base, lora_config(content))
    except ValueError as error:
        raise UserError(f"{path} does not fit the base model: {_first_lines(error)}") from None
    if other := set(lora_layers(model)) ^ {matrix.name for matrix in plan.selected}:  # type: ignore[arg-type]
        raise UserError(f"{path} is not a usable result: only one of its plan and its adapter has `{min(other)}`")
    tie(model, plan)  # type: ignore[arg-type]
    return model  # type: ignore[return-value]


def _first_lines(error: BaseException) -> str:
    """The first two lines of an exception's message as one, at most 200 characters."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] if lines else type(error).__name__


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
