"""The merged model, tensor by tensor: W + ΔW, with W from the base's own files, or as it was quantised in training.

Letters: `A` (r x d_in) and `B` (d_out x r) are the factors of a matrix, and `s` is the scale alpha / r. A stack of
experts holds its factors as PEFT does: A expert by expert, B direction by direction (docs/method.md 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.model.as_trained import quantised_layers, weight_as_trained
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.names import stored_to_model_names
from sgm_finetune.model.weights.quantized import quantisation
from sgm_finetune.model.weights.stored import stored_tensors
from sgm_finetune.model.weights.tensors import StoredTensor
from sgm_finetune.results.load import Result, attach_untrained, base_skeleton, check_whole
from sgm_finetune.train.adapters.apply import ADAPTER, lora_layers, num_experts
from sgm_finetune.train.adapters.pool import plain_factors


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the merged model, not yet read."""

    name: str
    """Name in the merged model's files: the name in the base's files, or the task model's name where the base is a bare
    encoder."""
    model_name: str
    """Name in the model."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """dtype in the base's files."""
    is_changed: bool
    """Whether it differs from the tensor in the base's files."""
    read: Callable[[], Tensor]
    """Returns the tensor on the CPU: float32 (float64 for float64 files) if it is changed, else the stored dtype."""

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def read_rounded(self) -> Tensor:
        """Returns the tensor in the files' dtype, rounded once. Raises UserError when a number is not finite."""
        return checked_finite(self.read().to(self.dtype), self.name)


def checked_finite(tensor: Tensor, name: str) -> Tensor:
    """Returns `tensor`. Raises UserError when a number in it is not finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise UserError(f"`{name}` is not finite as {tensor.dtype}; export to a wider type, or check the base's files")
    return tensor


def linear_update(A: Tensor, B: Tensor, scale: float, transposed: bool) -> Tensor:
    """Returns ΔW = s·B·A, (d_out, d_in), or its transpose if the layer stores its weight transposed (Conv1D).

    >>> linear_update(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), 2.0, transposed=False).tolist()
    [[6.0, 12.0], [8.0, 16.0]]
    """
    update = (B @ A).mul_(scale)
    return update.T if transposed else update


def stack_update(A: Tensor, B: Tensor, scale: float, num_experts: int, transposed: bool) -> Tensor:
    """Returns ΔW_e = s·B_e·A_e of every expert e: (experts, d_out, d_in), or (experts, d_in, d_out) if `transposed`."""
    factors_a, factors_b = expert_factors(A, B, num_experts)
    update = (factors_b @ factors_a).mul_(scale)
    return update.transpose(1, 2) if transposed else update


def expert_factors(A: Tensor, B: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Returns the factors of a stack expert by expert: (experts, r, d_in) and (experts, d_out, r)."""
    return A.unflatten(0, (num_experts, -1)), B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def add_update(weight: Tensor, update: Tensor) -> Tensor:
    """Returns W + ΔW in float32, or in W's own dtype if that is wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return wide.add_(update)


def merged_tensors(result: Result, with_update: bool = True) -> tuple[list[MergedTensor], PreTrainedModel]:
    """Returns the merged model's tensors, in the order of the base's files with new heads last, and the model on device
    "meta"; without the update, the base's tensors. Reads nothing large.

    Raises UserError when the base's files are quantised, or the adapter does not fit them.
    """
    method = quantisation(result.base_config)
    if method and method.get("quant_method"):
        raise UserError(
            f"model.name={result.config.model.name} is stored quantised ({method['quant_method']}), and SGM merges an "
            "update into unquantised weights only; name those with model.name=..., or take --to adapter"
        )
    stored = stored_tensors(result.folder)
    skeleton = base_skeleton(result)
    names = stored_to_model_names(skeleton)
    known = dict.fromkeys(skeleton.state_dict())
    prefix = skeleton.base_model_prefix
    files = _Files(stored, names, skeleton, result.folder)
    changes, heads = {}, {}
    if with_update:
        changes, heads = _whole_changes(result, files) if result.is_full else _updates(result, files)
    rounded = _rounded(result, files) if result.base_weights == "trained" else {}
    found: list[MergedTensor] = []
    for name, tensor in stored.items():
        model_name = names(name)
        if model_name not in known or model_name in heads:
            continue  # belongs to another task's head, or was trained whole
        written = model_name if prefix and model_name == f"{prefix}.{name}" else name
        dtype = getattr(torch, tensor.dtype)
        change, base = changes.get(name), rounded.get(name, tensor.get)
        read = base if change is None else partial(change, base)
        is_changed = change is not None or name in rounded
        found.append(MergedTensor(written, model_name, tensor.shape, dtype, is_changed, read))
    usable = {name for name in stored if names(name) in known}
    lacking = [name for name in changes if name not in usable]
    if lacking:
        raise UserError(
            f"{result.path} trains `{lacking[0]}`, which the files in {result.folder} lack; name the base that it was "
            "trained on with model.name=..."
        )
    floats = next((t.dtype for t in found if t.dtype.is_floating_point), torch.float32)
    found += [
        MergedTensor(name, name, tuple(head.shape), floats, True, partial(head.to, torch.float32))
        for name, head in heads.items()
    ]
    return found, skeleton


_Read = Callable[[], Tensor]
_Change = Callable[[_Read], Tensor]
"""Returns what takes the place of a tensor of the base, which its argument reads."""


def _add(update: _Read) -> _Change:
    return lambda base: add_update(base(), update())


def _replace(read: _Read) -> _Change:
    return lambda base: read()


def _rounded(result: Result, files: _Files) -> dict[str, _Read]:
    """Returns name in the files -> function that returns the tensor as the quantised base computed with it, for the
    tensors that training quantised. Raises UserError where a layer is stored in several tensors."""
    found: dict[str, _Read] = {}
    for name, layer in quantised_layers(files.skeleton).items():
        stored = files.sources.get(f"{name}.weight", ())
        if len(stored) != 1:
            raise UserError(
                f"`{name}.weight` is stored as {len(stored)} pieces in {files.folder}, and SGM cannot quantise them as "
                "training did; take --base original"
            )
        found[stored[0]] = partial(_read_rounded, files.stored[stored[0]], layer, result.config.model)
    return found


def _read_rounded(tensor: StoredTensor, layer: nn.Module, config: ModelConfig) -> Tensor:
    return weight_as_trained(tensor.get(), layer, config)


def _updates(result: Result, files: _Files) -> tuple[dict[str, _Change], dict[str, Tensor]]:
    """Returns name in the files -> function that adds its update, and name in the model -> tensor that was trained
    whole beside the adapter."""
    matrices = adaptable(files.skeleton)
    parameters = {
        name: name if matrix.num_experts is not None else f"{name}.{matrix.parameter}"
        for name, matrix in matrices.items()
    }
    transposed = {name for name, matrix in matrices.items() if matrix.transposed}
    shapes = {name: tuple(files.skeleton.get_parameter(parameter).shape) for name, parameter in parameters.items()}
    state: dict[str, Tensor] = plain_factors(result.content["adapter"])
    model = attach_untrained(base_skeleton(result), result.content, result.path)
    found: dict[str, _Change] = {}
    for name, update in _layer_updates(model, state, transposed, result).items():
        pieces = files.pieces(parameters[name], shapes[name], update)
        found |= {piece: _add(read) for piece, read in pieces.items()}
    heads = {key.removeprefix("base_model.model."): state.pop(key) for key in list(state) if "lora_" not in key}
    if state:
        raise UserError(
            f"{result.path} does not fit the base model: the model has no `{next(iter(state))}`; name the base that "
            "it was trained on with model.name=..."
        )
    return found, heads


def _whole_changes(result: Result, files: _Files) -> tuple[dict[str, _Change], dict[str, Tensor]]:
    """Returns name in the files -> function that returns what was trained in its place, and name in the model -> tensor
    of a head that the files lack, or hold for other classes."""
    check_whole(files.skeleton, result.content, result.path)
    found: dict[str, _Change] = {}
    heads: dict[str, Tensor] = {}
    named = list(files.skeleton.named_parameters(remove_duplicate=False))
    for name, tensor in result.content["tensors"].items():
        parameter = files.skeleton.get_parameter(name)
        stored = [alias for alias, same in named if same is parameter and files.holds(alias, tuple(tensor.shape))]
        for alias in stored:
            pieces = files.pieces(alias, tuple(tensor.shape), partial(tensor.to, torch.float32))
            found |= {piece: _replace(read) for piece, read in pieces.items()}
        if not stored:
            heads[name] = tensor
    return found, heads


def _layer_updates(
    model: PeftModel, state: dict[str, Tensor], transposed: Iterable[str], result: Result
) -> dict[str, _Read]:
    """Returns name of an adapted matrix -> function that computes its update. Removes the factors from `state`."""
    found: dict[str, _Read] = {}
    for name, (layer, factors) in layer_factors(model, state, result.path).items():
        A, B = (state.pop(factor).float() for factor in factors)
        scale, experts = float(layer.scaling[ADAPTER]), num_experts(layer)  # type: ignore[index]
        if experts == 1 and name not in transposed:
            found[name] = partial(linear_update, A, B, scale, bool(layer.fan_in_fan_out))
        else:
            found[name] = partial(stack_update, A, B, scale, experts, name in transposed)
    return found


def layer_factors(
    model: PeftModel, state: Mapping[str, Tensor], path: Path
) -> dict[str, tuple[nn.Module, tuple[str, str]]]:
    """Returns name of an adapted matrix -> its layer in `model`, and the names of its factors A and B in `state`.

    Raises UserError when a factor is missing in `state`, which comes from the .pth file `path`, or has another shape.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, layer in lora_layers(model).items():
        a, b = (f"{paths[id(layer)]}.{factor}.weight" for factor in ("lora_A", "lora_B"))
        if missing := next((key for key in (a, b) if key not in state), None):
            raise UserError(f"{path} lacks `{missing}`; train again, or restore the file as the run wrote it")
        for key, factor in ((a, layer.lora_A), (b, layer.lora_B)):
            expected = factor[ADAPTER].weight.shape  # type: ignore[index]
            if state[key].shape != expected:
                raise UserError(
                    f"{path} does not fit the base model: `{key}` is {list(state[key].shape)} instead of "
                    f"{list(expected)}; name the base that it was trained on with model.name=..."
                )
        found[name] = layer, (a, b)
    return found


def _piece(read: Callable[[], dict[str, Tensor]], name: str) -> Tensor:
    return read()[name]


class _Files:
    """The tensors in a base's files, and which of them make up a parameter of the model."""

    def __init__(
        self,
        stored: dict[str, StoredTensor],
        names: Callable[[str], str],
        skeleton: PreTrainedModel,
        folder: Path,
    ):
        self.stored, self.skeleton, self.folder = stored, skeleton, folder
        self.form = _StoredForm(skeleton)
        self.sources: dict[str, list[str]] = {}
        for name in stored:
            self.sources.setdefault(names(name), []).append(name)

    def holds(self, parameter: str, shape: tuple[int, ...]) -> bool:
        """Whether the files hold the parameter, whole in this shape or in pieces."""
        sources = self.sources.get(parameter, ())
        return len(sources) > 1 or (len(sources) == 1 and self.stored[sources[0]].shape == shape)

    def pieces(self, parameter: str, shape: tuple[int, ...], read: _Read) -> dict[str, _Read]:
        """Returns name in the files -> function that returns its piece of what `read` returns, a tensor of the shape of
        the parameter. Raises UserError where the files hold other pieces."""
        sources, shapes = self.sources.get(parameter, ()), self.form.shapes(parameter, shape)
        if set(shapes) == set(sources) and len(shapes) > 1:
            whole = lru_cache(maxsize=1)(partial(self.form.pieces, parameter, read))
            found: dict[str, _Read] = {piece: partial(_piece, whole, piece) for piece in shapes}
        elif len(sources) == 1:
            shapes, found = {sources[0]: shape}, {sources[0]: read}
        else:
            raise UserError(
                f"`{parameter}` is stored as {len(sources)} pieces in {self.folder}, and SGM cannot split its update "
                "into them; take --to adapter"
            )
        for piece, expected in shapes.items():
            if self.stored[piece].shape != expected or not self.stored[piece].is_float:
                raise UserError(
                    f"`{piece}` is {self.stored[piece].dtype} {list(self.stored[piece].shape)} in {self.folder}, and "
                    f"its update is {list(expected)}; name the base that it was trained on, or take --to adapter"
                )
        return found


class _StoredForm:
    """Converts a parameter to the pieces in which its files store it, by Transformers' own rules for saving.

    The rules are linear, so they hold for an update as well as for the weight.
    """

    def __init__(self, skeleton: PreTrainedModel):
        self.skeleton = skeleton

    def shapes(self, parameter: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each piece of a parameter of `shape`."""
        with torch.device("meta"):
            pieces = revert_weight_conversion(self.skeleton, {parameter: torch.empty(shape)})
        return {name: tuple(piece.shape) for name, piece in pieces.items()}

    def pieces(self, parameter: str, update: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Returns the pieces of a parameter's update."""
        return revert_weight_conversion(self.skeleton, {parameter: update()})
