"""How large the parts of a base are that need not be on the device."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from sgm_finetune.model.residence.parts import ends_of, movable_block, tables_of


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts on disk, or in the host's memory."""

    blocks: int
    largest_block: int
    output_layer: int
    """0 for a model without one."""
    embeddings: int
    is_tied: bool
    """Whether the output layer's weights are one of the embeddings too."""

    @property
    def total(self) -> int:
        return self.blocks + self.embeddings + (0 if self.is_tied else self.output_layer)


def sizes_elsewhere(model: PreTrainedModel, place: Literal["host", "disk"]) -> Sizes:
    """What `residence: host` leaves in the host's memory of a model without numbers, or `disk` on disk."""
    blocks: dict[str, set[str]] = {}
    for name, _ in model.named_parameters():
        if (block := movable_block(model, name)) is not None:
            blocks.setdefault(block, set()).add(name)
    sizes = [num_bytes(model, names) for names in blocks.values()]
    output = model.get_output_embeddings()
    ends = list((tables_of if place == "host" else ends_of)(model).values())
    tables = {id(module.weight): module.weight for module in ends if isinstance(module, nn.Embedding)}
    head: Any = output.weight if output in ends else None
    return Sizes(
        sum(sizes),
        max(sizes, default=0),
        0 if head is None else head.numel() * head.element_size(),
        sum(weight.numel() * weight.element_size() for weight in tables.values()),
        id(head) in tables,
    )


def num_bytes(model: nn.Module, names: Collection[str]) -> int:
    """Bytes of parameters without numbers, as they are held elsewhere: 64 weights of 4 bits have a float32 scale."""
    total = 0.0
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module, parameter = model.get_submodule(owner), model.get_parameter(name)
        packed = leaf == "weight" and hasattr(module, "quant_state")
        total += parameter.numel() * (0.5 + 4 / 64 if packed else parameter.element_size())
    return int(total)
