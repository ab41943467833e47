"""Memory of the host from which a GPU copies while it computes."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_SUCCESS = 0


class HostMemory:
    """Some bytes in the host's memory, pinned if that was asked for and the system allows it.

    It is not torch's pinned memory, which takes a power of two: a block of 130 MB would take 256 MiB. It has pages of
    its own, since no page can be pinned twice.
    """

    def __init__(self, size: int, pinned: bool):
        if not (pinned and size):
            self.bytes, self.is_pinned = torch.empty(size, dtype=torch.uint8), False
            return
        pages = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)  # fewer pages are pinned sooner
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        self.is_pinned = pin(self.bytes)
        if self.is_pinned:
            weakref.finalize(self, _unpin, self.bytes.data_ptr())


def pin(tensor: Tensor) -> bool:
    """Pins the pages of a tensor; False if the system declines."""
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)) == _SUCCESS:
        return True
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # the next kernel reports the error, which is forgotten then
    return False


def _unpin(address: int) -> None:
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)
