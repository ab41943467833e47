"""What a training of whole matrices changed: the trained parameters by name, read from a model and put into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sgm_finetune.base.errors import UserError

FILE = "trained.safetensors"
"""The trained parameters in a checkpoint."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that takes gradients, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: Path) -> None:
    """Writes the trained parameters into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous() for name, parameter in trained_parameters(model).items()}
    save_file(tensors, folder / FILE, {"format": "pt"})


@torch.no_grad()
def load_trained_into(model: nn.Module, folder: Path) -> None:
    """Puts the parameters that `save_trained` wrote into `model`, one at a time. Raises UserError where they do not
    fit."""
    with safe_open(folder / FILE, "pt") as file:
        names = list(file.keys())
    if lacking := trained_parameters(model).keys() - set(names):
        raise UserError(f"{folder / FILE} lacks `{min(lacking)}`, which this run trains; start a new run")
    for name in names:
        with safe_open(folder / FILE, "pt") as file:  # anew each time, so that what was read leaves the memory
            tensor = file.get_tensor(name)
            check_fit(model, {name: tensor}, str(folder))
            model.get_parameter(name).copy_(tensor)
            del tensor


def check_fit(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError unless `model` has a parameter of the same shape for each of the `tensors` of the file
    `where`."""
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in named:
            raise UserError(f"{where} does not fit the base model, which has no `{name}`")
        if named[name].shape != tensor.shape:
            raise UserError(
                f"{where} does not fit the base model: `{name}` is {list(tensor.shape)} there and "
                f"{list(named[name].shape)} in this model"
            )
        if not tensor.is_floating_point() or not named[name].is_floating_point():
            raise UserError(f"{where} does not fit the base model: `{name}` holds whole numbers")


def exchange(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts `tensors` in the place of the parameters of these names, in the model's own types, and returns what was
    there, in the host's memory. Nothing is copied on a machine without a GPU, unless the types differ."""
    former = {}
    for name, tensor in tensors.items():
        parameter = model.get_parameter(name)
        former[name] = parameter.data.cpu()
        parameter.data = tensor.to(parameter.device, parameter.dtype)
    return former


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which `model` holds `tensors`; its own come back at the end."""
    own = exchange(model, tensors)
    try:
        yield
    finally:
        exchange(model, own)
