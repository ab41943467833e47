"""Blocks that stay in the host's memory and are copied into a few reused buffers on the device before they compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgm_finetune.model.residence.host_memory import HostMemory
from sgm_finetune.model.residence.window import announce_blocks

_ALIGNMENT = 256
"""Every tensor begins at a multiple of this in its buffer, as an allocated one does on a GPU."""


def frozen_tensors(module: nn.Module) -> list[Tensor]:
    """The frozen parameters of a module that have numbers, each followed by its scales if it is a 4-bit one."""
    frozen = (p for p in module.parameters() if not p.requires_grad and not p.is_meta)
    return [tensor for parameter in frozen for tensor in (parameter, *scales_of(parameter))]


def scales_of(parameter: nn.Parameter) -> list[Tensor]:
    """The scales of a 4-bit parameter, and the scales of these; none for another parameter."""
    state: Any = getattr(parameter, "quant_state", None)
    if state is None:
        return []
    return [state.absmax] if state.state2 is None else [state.absmax, state.state2.absmax]


def without_numbers(tensor: Tensor) -> Tensor:
    """A tensor of the same type, shape and device that takes one entry: NaN, or 0 if the type has none. Whoever reads
    it by mistake notices."""
    filling = math.nan if tensor.dtype.is_floating_point else 0
    return torch.full((1,), filling, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


class Block:
    """The frozen tensors of a block, one behind the other in the host's memory."""

    def __init__(self, tensors: Sequence[Tensor], pinned: bool):
        self.tensors = list(tensors)
        self.absent = [without_numbers(tensor) for tensor in tensors]
        self.places: list[tuple[int, int]] = []
        at = 0
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            self.places.append((at, at + size))
            at = -(-(at + size) // _ALIGNMENT) * _ALIGNMENT
        self.memory = HostMemory(at, pinned)
        for tensor, (first, end) in zip(tensors, self.places, strict=True):
            self.host[first:end].copy_(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        self.leave()

    @property
    def host(self) -> Tensor:
        """The bytes."""
        return self.memory.bytes

    def stand_in(self, buffer: Tensor) -> None:
        """Makes the tensors views of a buffer, which holds the block's bytes or will before the next kernel reads."""
        for tensor, absent, (first, end) in zip(self.tensors, self.absent, self.places, strict=True):
            tensor.data = buffer[first:end].view(absent.dtype).view(absent.shape)

    def leave(self) -> None:
        """Takes the tensors' numbers away. What autograd kept of them is out of date, and it refuses to use it."""
        for tensor, absent in zip(self.tensors, self.absent, strict=True):
            tensor.data = absent
            torch.autograd.graph.increment_version(tensor)

    def keep_on_device(self, indices: Sequence[int]) -> None:
        """Brings some of the tensors back to the device for good."""
        for index in reversed(indices):
            (first, end), absent = self.places.pop(index), self.absent.pop(index)
            tensor = self.tensors.pop(index)
            tensor.data = self.host[first:end].view(absent.dtype).view(absent.shape).to(absent.device, copy=True)


class _Kept(NamedTuple):
    """A tensor in a buffer that autograd keeps: where it is, and of which block."""

    buffer: int
    block: int
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]


class Buffers:
    """The blocks of a model, of which a few are on the device at a time.

    With checkpointing a block is recomputed and differentiated in one go, so nothing that autograd keeps of its tensors
    has to survive until the buffer is used again. Without it, forward passes must run inside `kept_by_place`.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, number: int):
        on_gpu = device.type == "cuda"
        self.blocks = list(blocks)
        largest = max((block.host.numel() for block in self.blocks), default=0)
        self.buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(number)]
        self.holds: list[int | None] = [None] * number
        """Buffer -> the block in it."""
        self.copies: Any = torch.cuda.Stream(device) if on_gpu else None
        self.arrived: list[Any] = [torch.cuda.Event() if on_gpu else None for _ in range(number)]
        self.current: int | None = None

    @torch.inference_mode(False)  # what is made inside of that mode could not be differentiated later
    def enter(self, index: int, towards: int) -> None:
        """Block `index` is about to compute; the ones that follow in the direction `towards` (1 or -1) are fetched
        into the other buffers."""
        if index == self.current:
            return
        wanted = [index + towards * step for step in range(len(self.buffers))]
        wanted = [block for block in wanted if 0 <= block < len(self.blocks)]
        self.current = None  # an interrupt may come at any moment, and the next forward pass has to notice it
        for block in wanted:
            if block not in self.holds:
                self._fetch(block)
        if self.copies is not None:
            torch.cuda.current_stream().wait_event(self.arrived[self.holds.index(index)])
        self.current = index

    def place(self, index: int) -> int:
        """The buffer of a block, always the same: what a kernel's backward pass keeps by its address stays right."""
        return index % len(self.buffers)

    def _fetch(self, index: int) -> None:
        """Copies a block into its buffer, behind the kernels that read what was in it."""
        place = self.place(index)
        before, self.holds[place] = self.holds[place], None
        if before is not None:
            self.blocks[before].leave()
        block, buffer = self.blocks[index], self.buffers[place]
        copy_beside(buffer[: block.host.numel()], block.host, self.copies, self.arrived[place])
        block.stand_in(buffer)
        self.holds[place] = index

    @contextmanager
    def kept_by_place(self) -> Iterator[None]:
        """A context for forward passes without checkpointing: autograd keeps a tensor in a buffer by its place, and
        reads it there when its block has come back for the backward pass."""
        numbers = {buffer.data_ptr(): number for number, buffer in enumerate(self.buffers)}

        def pack(tensor: Tensor) -> Tensor | _Kept:
            number = numbers.get(tensor.untyped_storage().data_ptr()) if tensor.device.type != "meta" else None
            if number is None or (block := self.holds[number]) is None:
                return tensor
            return _Kept(number, block, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

        def unpack(kept: Tensor | _Kept) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            assert self.holds[kept.buffer] == kept.block, "another block is in the buffer"
            storage: Any = self.buffers[kept.buffer].untyped_storage()
            empty: Any = torch.empty(0, dtype=kept.dtype, device=self.buffers[kept.buffer].device)
            return empty.set_(storage, kept.offset, kept.shape, kept.stride)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):  # type: ignore[arg-type]
            yield


def copy_beside(target: Tensor, source: Tensor, copies: Any, arrived: Any) -> None:
    """Copies on the stream `copies`, behind everything that the current stream has been given, and records `arrived`
    after it. Without a stream, copies at once."""
    if copies is not None:
        copies.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copies) if copies is not None else nullcontext():
        target.copy_(source, non_blocking=True)
        if copies is not None:
            arrived.record(copies)


def stream(model: nn.Module, blocks: Mapping[str, Block], device: torch.device, num_buffers: int) -> Buffers:
    """Copies the `blocks` of `model`, by name, to `device` as they compute, from now on. They share no tensor."""
    buffers = Buffers(list(blocks.values()), device, num_buffers)
    announce_blocks(model, blocks, buffers.enter)
    return buffers
