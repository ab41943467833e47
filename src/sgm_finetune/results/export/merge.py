"""The merged model, tensor by tensor: W + ΔW out of the base's own files, never out of a quantised copy of them.

Letters: `A` r x d_in and `B` d_out x r are a matrix's factors, `s` the scale alpha / r; a stack of experts holds theirs
as PEFT does: A one expert below another, B direction by direction (docs/method.md 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import stored_to_model_names
from sgm_finetune.model.weights.quantized import quantisation
from sgm_finetune.model.weights.stored import stored_tensors
from sgm_finetune.model.weights.tensors import StoredTensor
from sgm_finetune.results.load import Result, attach_untrained, base_skeleton
from sgm_finetune.train.adapters.apply import ADAPTER, lora_layers, num_experts


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model; not yet read."""

    name: str
    """In the merged model's files: as the base's files call it, in a task model of a bare encoder as that one does."""
    model_name: str
    """In the model."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the base's files."""
    is_changed: bool
    read: Callable[[], Tensor]
    """On the CPU; what is changed is in float32 (float64 files: float64), all else as stored."""

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def rounded(self) -> Tensor:
        """In the files' dtype, rounded once. Raises UserError where a number is not finite there."""
        return checked(self.read().to(self.dtype), self.name)


def checked(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"`{name}` is not finite as {tensor.dtype}; export to a wider type, and look at the base's files"
        )
    return tensor


def linear_update(A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """ΔW = s·B·A, d_out x d_in, or its transpose where the layer stores that (Conv1D).

    >>> linear_update(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 2.0, transposed=False).tolist()
    [[6.0, 12.0], [8.0, 16.0]]
    """
    update = (B @ A).mul_(scale)
    return update.T if transposed else update


def stack_update(A: Tensor, B: Tensor, scale: float, num_experts: int, transposed: bool) -> Tensor:
    """ΔW_e = s·B_e·A_e of every expert e, (experts, d_out, d_in); `transposed`: (experts, d_in, d_out)."""
    factors_a = A.unflatten(0, (num_experts, -1))
    factors_b = B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    update = (factors_b @ factors_a).mul_(scale)
    return update.transpose(1, 2) if transposed else update


def added(weight: Tensor, update: Tensor) -> Tensor:
    """W + ΔW in float32, or in W's own type where that is wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return wide.add_(update)


def merged_tensors(result: Result) -> tuple[list[MergedTensor], PreTrainedModel]:
    """Every tensor of the merged model in the order of the base's files, new heads last; and the model on device
    "meta". Nothing large is read.

    Raises UserError where the base's files are quantised, and where the adapter does not fit them.
    """
    if (method := quantisation(result.base_config)) and method.get("quant_method"):
        raise UserError(
            f"model.name={result.config.model.name} is stored quantised ({method['quant_method']}), and an update is "
            "merged into unquantised weights only; name those with model.name=..., or take --to adapter"
        )
    stored = stored_tensors(result.folder)
    skeleton = base_skeleton(result)
    names = stored_to_model_names(skeleton)
    known = dict.fromkeys(skeleton.state_dict())
    prefix = skeleton.base_model_prefix
    updates, heads = _updates(result, skeleton, stored, names)
    found: list[MergedTensor] = []
    for name, tensor in stored.items():
        model_name = names(name)
        if model_name not in known or model_name in heads:
            continue  # of another task's head; or trained whole
        written = model_name if prefix and model_name == f"{prefix}.{name}" else name
        dtype = getattr(torch, tensor.dtype)
        update = updates.get(name)
        read = tensor.get if update is None else partial(_read_merged, tensor, update)
        found.append(MergedTensor(written, model_name, tensor.shape, dtype, update is not None, read))
    if left := [name for name in updates if name not in {s for s in stored if names(s) in known}]:
        raise UserError(f"{result.path} trains `{left[0]}`, which the files of {result.folder} lack")
    floats = next((t.dtype for t in found if t.dtype.is_floating_point), torch.float32)
    found += [
        MergedTensor(name, name, tuple(head.shape), floats, True, partial(head.to, torch.float32))
        for name, head in heads.items()
    ]
    return found, skeleton


def _read_merged(tensor: StoredTensor, update: Callable[[], Tensor]) -> Tensor:
    return added(tensor.get(), update())


def _updates(
    result: Result, skeleton: PreTrainedModel, stored: dict[str, StoredTensor], names: Callable[[str], str]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor]]:
    """Name in the files -> its update, computed when called; and name in the model -> a tensor that was trained
    whole."""
    sources: dict[str, list[str]] = {}
    for name in stored:
        sources.setdefault(names(name), []).append(name)
    matrices = adaptable(skeleton)
    parameters = {
        name: name if matrix.num_experts is not None else f"{name}.{matrix.parameter}"
        for name, matrix in matrices.items()
    }
    transposed = {name for name, matrix in matrices.items() if matrix.transposed}
    shapes = {name: tuple(skeleton.get_parameter(parameter).shape) for name, parameter in parameters.items()}
    reverted = _Reverted(skeleton)
    state: dict[str, Tensor] = dict(result.content["adapter"])
    model = attach_untrained(base_skeleton(result), result.content, result.path)
    found: dict[str, Callable[[], Tensor]] = {}
    for name, update in _layer_updates(model, state, transposed, result).items():
        parameter = parameters[name]
        pieces = reverted.shapes(parameter, shapes[name])
        if set(pieces) == set(sources.get(parameter, ())) and len(pieces) > 1:
            read = lru_cache(maxsize=1)(partial(reverted.pieces, parameter, update))
            found |= {piece: partial(_piece, read, piece) for piece in pieces}
        elif len(sources.get(parameter, ())) == 1:
            (source,) = sources[parameter]
            pieces = {source: shapes[name]}
            found[source] = update
        else:
            raise UserError(
                f"`{parameter}` is kept in {len(sources.get(parameter, ()))} pieces in the files of {result.folder}, "
                "and how they make it up is not known here; take --to adapter"
            )
        for piece, shape in pieces.items():
            if stored[piece].shape != shape or not stored[piece].is_float:
                raise UserError(
                    f"`{piece}` is {stored[piece].dtype} of {list(stored[piece].shape)} in the files of "
                    f"{result.folder}, and its update {list(shape)}; take the base it was trained on, or --to adapter"
                )
    heads = {key.removeprefix("base_model.model."): state.pop(key) for key in list(state) if "lora_" not in key}
    if state:
        raise UserError(f"{result.path} does not fit the base model: it holds `{next(iter(state))}`")
    return found, heads


def _layer_updates(
    model: PeftModel, state: dict[str, Tensor], transposed: Iterable[str], result: Result
) -> dict[str, Callable[[], Tensor]]:
    """Name of an adapted matrix -> its update; its factors are taken out of `state`."""
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Callable[[], Tensor]] = {}
    for name, layer in lora_layers(model).items():
        try:
            A, B = (state.pop(f"{paths[id(layer)]}.{factor}.weight").float() for factor in ("lora_A", "lora_B"))
        except KeyError as key:
            raise UserError(f"{result.path} lacks {key}; train again, or take the file as it was written") from None
        scale, experts = float(layer.scaling[ADAPTER]), num_experts(layer)  # type: ignore[index]
        if experts == 1 and name not in transposed:
            found[name] = partial(linear_update, A, B, scale, bool(layer.fan_in_fan_out))
        else:
            found[name] = partial(stack_update, A, B, scale, experts, name in transposed)
    return found


def _piece(read: Callable[[], dict[str, Tensor]], name: str) -> Tensor:
    return read()[name]


class _Reverted:
    """What a model's parameter is in its files, by the rules that Transformers saves models with; they are linear, so
    that they hold for an update as for the weight."""

    def __init__(self, skeleton: PreTrainedModel):
        self.skeleton = skeleton

    def shapes(self, parameter: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Of the parameter's pieces."""
        with torch.device("meta"):
            pieces = revert_weight_conversion(self.skeleton, {parameter: torch.empty(shape)})
        return {name: tuple(piece.shape) for name, piece in pieces.items()}

    def pieces(self, parameter: str, update: Callable[[], Tensor]) -> dict[str, Tensor]:
        return revert_weight_conversion(self.skeleton, {parameter: update()})
