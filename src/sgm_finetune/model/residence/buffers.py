"""Blocks that stay in the host's memory and are copied into a few reused buffers on the device before they compute.

It has not run on a GPU. On a CPU its copies are ordinary ones, and its logic is tested there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sgm_finetune.model.residence.window import announce_blocks

_ALIGNMENT = 256
"""Every tensor begins at a multiple of this in its buffer, as an allocated one does on a GPU."""


class Block:
    """The frozen tensors of a block, one behind the other in the host's memory, pinned if the device is a GPU."""

    def __init__(self, tensors: Sequence[Tensor], pinned: bool):
        self.tensors = list(tensors)
        self.shapes = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self.places: list[tuple[int, int]] = []
        at = 0
        for dtype, shape in self.shapes:
            size = math.prod(shape) * dtype.itemsize
            self.places.append((at, at + size))
            at = -(-(at + size) // _ALIGNMENT) * _ALIGNMENT
        self.host = torch.empty(at, dtype=torch.uint8, pin_memory=pinned)
        for tensor, (first, end) in zip(tensors, self.places, strict=True):
            self.host[first:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        self.leave()

    def stand_in(self, buffer: Tensor) -> None:
        """Makes the tensors views of a buffer, which holds the block's bytes or will before the next kernel reads."""
        for tensor, (dtype, shape), (first, end) in zip(self.tensors, self.shapes, self.places, strict=True):
            tensor.data = buffer[first:end].view(dtype).view(shape)

    @torch.no_grad()
    def leave(self) -> None:
        """Makes the tensors empty. What autograd kept of them is out of date, and it refuses to use it."""
        for tensor, (dtype, _) in zip(self.tensors, self.shapes, strict=True):
            tensor.data = torch.empty(0, dtype=dtype, device=tensor.device)
            tensor.zero_()  # counts as a change


class Buffers:
    """The blocks of a model, of which a few are on the device at a time.

    A block is recomputed and differentiated in one go (checkpointing), so nothing that autograd keeps of its tensors
    has to survive until the buffer is used again.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], device: torch.device, number: int):
        on_gpu = device.type == "cuda"
        self.blocks = [Block(tensors, on_gpu) for tensors in blocks]
        largest = max(block.host.numel() for block in self.blocks)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(number)]
        self.holds: list[int | None] = [None] * number
        """Buffer -> the block in it."""
        self.copies: Any = torch.cuda.Stream(device) if on_gpu else None
        self.arrived: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(number)]
        self.current: int | None = None

    def enter(self, index: int, towards: int) -> None:
        """Block `index` is about to compute; the ones that follow in the direction `towards` (1 or -1) are fetched
        into the other buffers."""
        if index == self.current:
            return
        wanted = [index + towards * step for step in range(len(self.buffers))]
        wanted = [block for block in wanted if 0 <= block < len(self.blocks)]
        self.current = index
        for block in wanted:
            if block not in self.holds:
                self._fetch(block)
        if self.copies is not None:
            torch.cuda.current_stream().wait_event(self.arrived[self.holds.index(index)])

    def place(self, index: int) -> int:
        """The buffer of a block, always the same: what a kernel's backward pass keeps by its address stays right."""
        return index % len(self.buffers)

    def _fetch(self, index: int) -> None:
        """Copies a block into its buffer, behind the kernels that read what was in it."""
        place = self.place(index)
        if (before := self.holds[place]) is not None:
            self.blocks[before].leave()
        self.holds[place] = index
        block, buffer = self.blocks[index], self.buffers[place]
        if self.copies is not None:
            self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies) if self.copies is not None else nullcontext():
            buffer[: block.host.numel()].copy_(block.host, non_blocking=True)
            if self.copies is not None:
                self.arrived[place].record(self.copies)
        block.stand_in(buffer)


def stream(
    model: nn.Module, blocks: Mapping[str, Sequence[Tensor]], device: torch.device, num_buffers: int = 2
) -> Buffers:
    """Keeps the `blocks` of `model` in the host's memory from now on, and copies them to `device` as they compute.

    `blocks` maps the name of a block to its frozen tensors, scales of 4-bit weights included, which must not be shared
    between blocks. The model must be checkpointed when it trains.
    """
    buffers = Buffers(list(blocks.values()), device, num_buffers)
    announce_blocks(model, blocks, buffers.enter)
    return buffers
