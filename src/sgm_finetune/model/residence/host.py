"""A frozen base in the host's memory: blocks, embeddings and output layer are there, and what computes is on the GPU.

A block is copied to the GPU before it computes (`buffers.py`). The rows of embeddings that a batch reads are gathered
on the host. The output layer is copied in slices where the loss is computed in parts, else as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils

from sgm_finetune.model.names import block_of
from sgm_finetune.model.residence.buffers import (
    Block,
    Buffers,
    copy_beside,
    frozen_tensors,
    scales_of,
    stream,
    without_numbers,
)
from sgm_finetune.model.residence.host_memory import HostMemory
from sgm_finetune.model.residence.parts import Convert, add_account, divide, ends_of, loading_by_parts, tables_of
from sgm_finetune.model.residence.window import elsewhere

NUM_BUFFERS = 2
"""Blocks that are on the device at a time: the one that computes, and the next one."""


class Table:
    """The weights of embeddings or of the output layer, in the host's memory."""

    def __init__(self, weight: Tensor, device: torch.device):
        on_gpu = device.type == "cuda"
        self.memory = HostMemory(weight.numel() * weight.element_size(), on_gpu)
        self.host = self.memory.bytes.view(weight.dtype).view(weight.shape)
        self.host.copy_(weight.detach())
        self.absent, self.device = without_numbers(weight), device
        self.copies: Any = torch.cuda.Stream(device) if on_gpu else None
        self.weight = weight
        elsewhere[self.absent.data_ptr()] = self
        self.leave()

    def leave(self) -> None:
        """Takes the weight's numbers away."""
        self.weight.data = self.absent
        torch.autograd.graph.increment_version(self.weight)

    def slices(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """As `window.slices`, on the device: while one slice is used, the next one is copied."""
        parts = self.host.split(size)
        shape = (min(size, len(self.host)), *self.host.shape[1:])
        buffers = [torch.empty(shape, dtype=self.host.dtype, device=self.device) for _ in parts[:2]]
        arrived: list[Any] = [torch.cuda.Event() if self.copies is not None else None for _ in buffers]

        def fetch(index: int) -> None:
            place = index % 2
            copy_beside(buffers[place][: len(parts[index])], parts[index], self.copies, arrived[place])

        try:
            fetch(0)
            for index, part in enumerate(parts):
                if index + 1 < len(parts):
                    fetch(index + 1)
                if self.copies is not None:
                    torch.cuda.current_stream().wait_event(arrived[index % 2])
                yield index * size, buffers[index % 2][: len(part)]
        finally:  # also where the caller fails: other tensors may get the memory of these buffers
            if self.copies is not None:
                torch.cuda.current_stream().wait_stream(self.copies)

    def gather_in(self, module: nn.Module) -> None:
        """Makes a module of embeddings read its rows on the host."""
        module.register_forward_pre_hook(self._rows_begin, with_kwargs=True)
        module.register_forward_hook(self._rows_end, always_call=True)

    def _rows_begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.weight.data = self.host
        for buffer in module.buffers():  # a scale
            buffer.data = buffer.data.cpu()
        return send_to_device((args, kwargs), "cpu")

    def _rows_end(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.leave()
        return send_to_device(output, self.device, non_blocking=True)

    def compute_in(self, module: nn.Module) -> None:
        """Makes an output layer bring its weights to the device when it computes logits."""
        module.register_forward_pre_hook(self._logits_begin)
        module.register_forward_hook(self._logits_end, always_call=True)

    def leave_before(self, model: nn.Module) -> None:
        """Makes the weights leave when a forward pass of `model` begins: an output layer's may have stayed."""
        model.register_forward_pre_hook(lambda module, args: self.leave())

    def _logits_begin(self, module: nn.Module, args: Any) -> None:
        if args[0].numel():  # the loss in parts asks for no logits
            self.weight.data = self.host.to(self.device, non_blocking=True)

    def _logits_end(self, module: nn.Module, args: Any, output: Any) -> None:
        """The weights leave, unless a backward pass reads them again: then when the next forward pass begins."""
        if not (isinstance(output, Tensor) and output.requires_grad):
            self.leave()


@dataclass
class HostBase:
    """What has been loaded into the host's memory."""

    device: torch.device
    blocks: dict[str, Block] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    """Embeddings or output layer -> their weights."""

    def take_block(self, name: str, module: nn.Module) -> None:
        """Moves a block, whose tensors are on the device, to the host's memory."""
        self.blocks[name] = Block(frozen_tensors(module.requires_grad_(False)), self.device.type == "cuda")

    def take_table(self, name: str, weight: Tensor) -> None:
        """Moves the weights of embeddings or of the output layer, which are on the device, to the host's memory."""
        self.tables[name] = Table(weight, self.device)


@contextmanager
def loading_to_host(base: HostBase) -> Iterator[None]:
    """Makes Transformers' `from_pretrained` leave blocks, embeddings and output layer in the host's memory, inside the
    context. Each is converted on the device, as for a base that stays there."""
    loader: Any = modeling_utils
    warm_up = loader.caching_allocator_warmup  # it allocates as much of the device as the whole base takes
    loader.caching_allocator_warmup = lambda *args: None
    try:
        with loading_by_parts(partial(_load, base)):
            yield
    finally:
        loader.caching_allocator_warmup = warm_up


def _load(
    base: HostBase, convert: Convert, model: PreTrainedModel, state_dict: Mapping[str, Any], load_config: Any
) -> tuple[Any, Any]:
    """Loads part by part what `convert` loads at once."""
    parts, rest = divide(model, state_dict)
    ends, held = ends_of(model), tables_of(model)
    info, index = convert(model=model, state_dict=rest, load_config=load_config, disk_offload_index=None)
    for part, tensors in parts.items():
        found, _ = convert(model=model, state_dict=tensors, load_config=load_config)
        add_account(info, found)
        if found.mismatched_keys or found.conversion_errors:  # the caller says what is wrong
            continue
        if part in ends:
            weight: Any = ends[part].weight
            if part in held and not weight.is_meta:
                base.take_table(part, weight)
            continue
        base.take_block(part, model.get_submodule(part))
    return info, index


_buffers: WeakKeyDictionary[nn.Module, Buffers] = WeakKeyDictionary()
"""The models whose blocks are in the host's memory."""


def keep_on_host(model: PreTrainedModel, base: HostBase) -> list[str]:
    """Brings the blocks of a model that was loaded inside `loading_to_host` to the device as they compute.

    Returns remarks. Parameters that several blocks share stay on the device.
    """
    ends, tables = ends_of(model), {id(table.weight): table for table in base.tables.values()}
    assert {id(module.weight) for module in ends.values()} >= tables.keys(), "Transformers exchanged a parameter"
    for module in ends.values():
        if (table := tables.get(id(module.weight))) is not None:
            (table.gather_in if isinstance(module, nn.Embedding) else table.compute_in)(module)
    for table in tables.values():
        table.leave_before(model)
    owners: dict[nn.Parameter, set[str | None]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, set()).add(block_of(name))
    shared = [parameter for parameter, blocks in owners.items() if len(blocks) > 1]
    staying = {id(tensor) for parameter in shared for tensor in (parameter, *scales_of(parameter))}
    for name, block in base.blocks.items():
        now = {id(tensor) for tensor in frozen_tensors(model.get_submodule(name))}
        assert now >= {id(tensor) for tensor in block.tensors}, "Transformers exchanged a parameter"
        block.keep_on_device([index for index, tensor in enumerate(block.tensors) if id(tensor) in staying])
    buffers = stream(model, base.blocks, base.device, NUM_BUFFERS)
    _buffers[model] = buffers
    memories = [*(block.memory for block in buffers.blocks), *(table.memory for table in tables.values())]
    pageable = sum(memory.bytes.numel() for memory in memories if not memory.is_pinned)
    if base.device.type == "cuda" and pageable:
        return [f"the system pins no more memory: {pageable / 2**30:.2f} GiB of the base are copied more slowly"]
    return []


def differentiable(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which `model` can be differentiated without checkpointing, wherever its base is."""
    buffers = _buffers.get(model)
    return nullcontext() if buffers is None else buffers.kept_by_place()
