"""Combines the adapter of a result with others of the same base, by PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sgm_finetune.base.config import DECODER_TASKS, Config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.measure.plan_file import parse_plan, plan_document
from sgm_finetune.method.plan import Plan, PlannedMatrix, PlanSettings
from sgm_finetune.model.matrices import Matrix, adaptable
from sgm_finetune.model.names import kind_of, layer_of
from sgm_finetune.results.export.combination import OF_ONE_RANK, Combination
from sgm_finetune.results.export.target import base_for_peft
from sgm_finetune.results.files import PTH
from sgm_finetune.results.load import Result, base_skeleton, read_result
from sgm_finetune.results.pth import lora_config, plain_settings
from sgm_finetune.train.adapters.pool import plain_factors

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_COMBINED = "combined"
_WITHOUT_EFFECT = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
    "inference_mode",
}  # fmt: skip
"""Settings of a PEFT adapter that are read elsewhere, or only say how it was trained and to which layers."""
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Starts of a PEFT adapter after which its base is as it was."""


@dataclass(frozen=True)
class _Adapter:
    """A plain LoRA adapter."""

    folder: Path
    rank: int
    alpha: float
    factors: Mapping[str, Tensor]
    """Tensors under PEFT's names."""

    @property
    def layers(self) -> set[str]:
        """Names of the linear layers that it changes. Raises UserError for a tensor that is no factor of one."""
        found = {name: _FACTOR.fullmatch(name) for name in self.factors}
        if other := next((name for name, match in found.items() if match is None), None):
            raise UserError(
                f"{self.folder} holds `{other[:80]}`, which was trained whole or is no factor of a linear layer; PEFT "
                "combines such factors only"
            )
        return {match[1] for match in found.values() if match is not None}


def combine(result: Result, combination: Combination, config: Config, overrides: Sequence[str], log: StepLog) -> Result:
    """`result` with the combined adapter, in which every layer has two factors of its own and the scale is 1.

    Raises UserError when another adapter has another base, task or kind, or when the method cannot combine their ranks.
    """
    adapters = [_of_result(result), *(_read(folder, result, config, overrides, log) for folder in combination.others)]
    ranks = [adapter.rank for adapter in adapters]
    if combination.method in OF_ONE_RANK and len(set(ranks)) > 1:
        raise UserError(
            f"--method {combination.method} combines adapters of one rank, and they have {', '.join(map(str, ranks))}; "
            "take --method cat, or svd"
        )
    skeleton = base_skeleton(result)
    matrices = adaptable(skeleton, sorted({name for adapter in adapters for name in adapter.layers}))
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    settings, factors = _weighted(skeleton, matrices, adapters, combination, result)
    if bad := next((name for name, tensor in factors.items() if not bool(tensor.isfinite().all())), None):
        raise UserError(f"The combined `{bad}` is not finite; look at the adapters, or take smaller --weights")
    content = {
        **result.content,
        "adapter": factors,
        "peft_config": plain_settings(settings),
        "plan": plan_document(_plan(result, shapes, settings)),
    }
    return dataclasses.replace(result, content=content)


def _of_result(result: Result) -> _Adapter:
    """The adapter of a run. Raises UserError where it has none that can be combined."""
    folder = result.path.parent
    if result.is_full:
        raise UserError(
            f"{folder} trained whole matrices; export it with --to adapter --rank R first, and combine that folder"
        )
    settings = lora_config(result.content)
    if settings.target_parameters:
        raise UserError(f"{folder} adapts stacks of experts, which PEFT does not combine")
    return _Adapter(folder, settings.r, settings.lora_alpha, plain_factors(result.content["adapter"]))


def _read(folder: Path, result: Result, config: Config, overrides: Sequence[str], log: StepLog) -> _Adapter:
    """The adapter of another run, or of a PEFT folder. Raises UserError where it does not fit `result`."""
    if not (folder / PTH).is_file():
        return _read_peft(folder, result)
    output = config.output.model_copy(update={"dir": str(folder)})
    rest = [override for override in overrides if not override.startswith("output.")]
    other = read_result(config.model_copy(update={"output": output}), rest, log)
    if other.folder.resolve() != result.folder.resolve():
        raise UserError(
            f"{folder} was trained on {other.config.model.name}, and output.dir on {result.config.model.name}; only "
            "adapters of one base can be combined (model.name=FOLDER names the place of both)"
        )
    tasks = result.config.model.task, other.config.model.task
    if tasks[0] != tasks[1] and not set(tasks) <= set(DECODER_TASKS):
        raise UserError(f"{folder} was trained for {tasks[1]}, and output.dir for {tasks[0]}; take runs of one task")
    return _of_result(other)


def _read_peft(folder: Path, result: Result) -> _Adapter:
    """A PEFT adapter's folder. Its tensors' names say which layers it changes; patterns in it are not followed."""
    path = folder / "adapter_config.json"
    settings = require_json_object(path)
    usual = plain_settings(LoraConfig())
    for key in sorted(settings.keys() & usual.keys() - _WITHOUT_EFFECT):
        value = settings[key]
        if (value or None) != (usual[key] or None) and not (key == "init_lora_weights" and value in _STARTS):
            raise UserError(f"{path}: `{key}` is {str(value)[:60]!r}, and only plain LoRA can be combined")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float) and alpha > 0):
        raise UserError(f"{path}: `r` is a rank and `lora_alpha` a number above 0; take a folder that PEFT wrote")
    base = str(settings.get("base_model_name_or_path"))
    known = (result.config.model.name, str(result.folder), base_for_peft(result.config.model.name, result.folder))
    if base not in known and not (Path(base).is_dir() and Path(base).resolve() == result.folder.resolve()):
        raise UserError(
            f"{path} names the base {base[:80]}, and output.dir was trained on {result.config.model.name}; only "
            "adapters of one base can be combined"
        )
    kind = lora_config(result.content).task_type
    if settings.get("task_type") not in (None, kind):
        raise UserError(f"{path} is for {settings['task_type']}, and output.dir for {kind}; take adapters of one task")
    weights = folder / "adapter_model.safetensors"
    try:
        factors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{weights} cannot be read: {first_line(error)}; take a folder that PEFT wrote") from None
    return _Adapter(folder, rank, float(alpha), {name: tensor.float() for name, tensor in factors.items()})


def _weighted(
    skeleton: PreTrainedModel,
    matrices: Mapping[str, Matrix],
    adapters: Sequence[_Adapter],
    combination: Combination,
    result: Result,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The combined adapter's settings and factors. PEFT combines on a model whose weights take no memory."""
    for matrix in matrices.values():
        empty = torch.zeros(()).expand(matrix.module.get_parameter(matrix.parameter).shape)
        matrix.module.register_parameter(matrix.parameter, nn.Parameter(empty, requires_grad=False))
    is_conv = any(isinstance(matrix.module, Conv1D) for matrix in matrices.values())
    kind = lora_config(result.content).task_type
    model: Any = None
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        settings = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=sorted(adapter.layers), fan_in_fan_out=is_conv,  # type: ignore[arg-type]
        )  # fmt: skip
        if model is None:
            model = get_peft_model(skeleton, settings, name)
        else:
            model.add_adapter(name, settings)
        _set(model, adapter, name)
    set_seed(result.config.training.seed)  # DARE draws what it keeps
    model.add_weighted_adapter(
        names, list(combination.weights), _COMBINED, combination.method, density=combination.density,
        svd_full_matrices=False,
    )  # fmt: skip
    rank = model.peft_config[_COMBINED].r
    settings = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(matrices), task_type=kind, fan_in_fan_out=is_conv
    )
    state = get_peft_model_state_dict(model, adapter_name=_COMBINED)
    return settings, {name: tensor.detach().float().contiguous().cpu() for name, tensor in state.items()}


def _set(model: PeftModel, adapter: _Adapter, name: str) -> None:
    try:
        outcome = set_peft_model_state_dict(model, dict(adapter.factors), adapter_name=name)
    except RuntimeError as error:
        raise UserError(f"{adapter.folder} does not fit the base model: {first_line(error)}") from None
    lacking = [key for key in outcome.missing_keys if f".{name}." in key and "lora_" in key]
    if lacking or outcome.unexpected_keys:
        wrong = (lacking or outcome.unexpected_keys)[0]
        raise UserError(f"{adapter.folder} is not a whole adapter: only one of its factors `{wrong}` is there")


def _plan(result: Result, shapes: Mapping[str, tuple[int, int]], settings: LoraConfig) -> Plan:
    """The run's plan with the layers of the combined adapter, of which none share a factor."""
    plan = parse_plan(result.content["plan"], str(result.path))
    known = {matrix.name: matrix for matrix in plan.matrices}
    for name, shape in shapes.items():
        known.setdefault(name, PlannedMatrix(name, kind_of(name), layer_of(name), shape, selected=True))
    return dataclasses.replace(
        plan,
        settings=PlanSettings(rank=settings.r, alpha=float(settings.lora_alpha), side="none"),
        matrices=tuple(dataclasses.replace(m, selected=m.name in shapes, group=None) for m in known.values()),
        groups=(),
    )
