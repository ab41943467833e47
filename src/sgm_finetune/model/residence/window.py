"""Which part of a mapped model is in memory: one block at a time, and the next one is read ahead.

The pages of a mapped file are clean, so they may go at any time, and the system reads them again when they are needed:
what is released too early costs time and changes no number.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import Tensor, nn

_POPULATE_READ = 22
"""madvise's number for reading pages and mapping them at once (Linux 5.14); Python has no name for it."""
_READ_ONLY = 1
"""mprotect's number for pages that nobody writes to."""


@dataclass(frozen=True)
class Span:
    """Whole pages of a mapped file."""

    first: int
    length: int

    def advise(self, advice: int) -> None:
        """Tells the system what to do with the pages. It may decline, and older ones do not know every advice."""
        _libc().madvise(ctypes.c_void_p(self.first), ctypes.c_size_t(self.length), advice)

    def protect(self) -> None:
        """Makes a write to the pages end the process: it would be lost with the page, and later numbers wrong."""
        _libc().mprotect(ctypes.c_void_p(self.first), ctypes.c_size_t(self.length), _READ_ONLY)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def spans_of(tensors: Iterable[Tensor]) -> list[Span]:
    """The pages that hold nothing but these tensors, in order; neighbours make one span."""
    places = sorted({(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel()})
    joined: list[list[int]] = []
    for first, end in places:
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([first, end])
    page = mmap.PAGESIZE
    whole = [(-(-first // page) * page, end // page * page) for first, end in joined]
    return [Span(first, end - first) for first, end in whole if end > first]


def are_mapped(tensors: Iterable[Tensor]) -> bool:
    """Whether the memory of each tensor is a part of a mapped file."""
    files = _mapped_files()
    return all(any(first <= t.data_ptr() < end for first, end in files) for t in tensors if t.numel())


def _mapped_files() -> list[tuple[int, int]]:
    """The addresses of all files that this process has mapped (Linux)."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            first, _, end = addresses.partition("-")
            found.append((int(first, 16), int(end, 16)))
    return found


class _OnDisk:
    """A mapped tensor, which keeps its address from being used again as long as it exists."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def slices(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """As `slices`; the next slice is read ahead."""
        parts, whole = self.tensor.split(size), spans_of([self.tensor])
        pages = [spans_of([part]) for part in parts]
        for index, part in enumerate(parts):
            _advise(pages[index], _POPULATE_READ)
            for following in pages[index + 1 : index + 2]:
                _advise(following, mmap.MADV_WILLNEED)
            yield index * size, part
            _advise(whole, mmap.MADV_DONTNEED)  # what is read at the border of two slices maps pages around it


class Elsewhere(Protocol):
    """A matrix that is not on the device as a whole."""

    def slices(self, size: int) -> Iterator[tuple[int, Tensor]]: ...


elsewhere: WeakValueDictionary[int, Elsewhere] = WeakValueDictionary()
"""Address -> what is there, for the tensors of all models whose base is on disk, and the output layers of those whose
base is in the host's memory."""


def slices(weight: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The first row of each slice of a matrix, and its `size` rows. A matrix that is elsewhere has one or two slices on
    the device at a time."""
    if (found := elsewhere.get(weight.data_ptr())) is not None:
        yield from found.slices(size)
    else:
        yield from ((index * size, part) for index, part in enumerate(weight.split(size)))


class Window:
    """The blocks of a model, of which one is in memory at a time."""

    def __init__(self, blocks: Mapping[str, list[Tensor]], ends: list[Tensor]):
        self.spans, self.ends = [spans_of(tensors) for tensors in blocks.values()], spans_of(ends)
        # kept: without its tensor a file is no longer mapped, and other memory takes its place
        self._kept = [_OnDisk(tensor) for tensors in (*blocks.values(), ends) for tensor in tensors]
        elsewhere.update({kept.tensor.data_ptr(): kept for kept in self._kept})
        self.current: int | None = None

    def enter(self, index: int, towards: int) -> None:
        """Block `index` is about to compute: the block before it goes, and the next one in the direction `towards` (1
        or -1) is read ahead. The embeddings and the output layer go too, since they compute outside of the blocks."""
        if index == self.current:
            return
        if self.current is not None:
            _advise(self.spans[self.current], mmap.MADV_DONTNEED)
        _advise(self.ends, mmap.MADV_DONTNEED)
        self.current = index
        _advise(self.spans[index], _POPULATE_READ)
        if 0 <= index + towards < len(self.spans):
            _advise(self.spans[index + towards], mmap.MADV_WILLNEED)


def announce_blocks(model: nn.Module, names: Iterable[str], enter: Callable[[int, int], None]) -> None:
    """Calls `enter(index, towards)` before each block of `model` computes, forward (`towards` 1) and backward (-1)."""

    def forward_begins(index: int, module: nn.Module, args: Any) -> None:
        enter(index, 1)

    def forward_ends(index: int, module: nn.Module, args: Any, output: Any) -> None:
        # the gradient of the block's output announces its backward pass, and the recomputation before it
        for tensor in _tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(backward_begins, index))

    def backward_begins(index: int, gradient: Tensor) -> None:
        enter(index, -1)

    for index, name in enumerate(names):
        block = model.get_submodule(name)
        block.register_forward_pre_hook(partial(forward_begins, index))
        block.register_forward_hook(partial(forward_ends, index))


def _tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors that a block returned: one, or some in tuples and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors_in(part)


def _advise(spans: Iterable[Span], advice: int) -> None:
    for span in spans:
        span.advise(advice)


def slide_over(model: nn.Module, blocks: Mapping[str, list[Tensor]], ends: list[Tensor]) -> Window:
    """Keeps one of the `blocks` of `model` in memory at a time, from now on, whatever runs the model.

    `blocks` maps the name of a block to its mapped tensors, `ends` are those of the embeddings and the output layer.
    They must never be written to.
    """
    window = Window(blocks, ends)
    for span in (*window.ends, *(span for spans in window.spans for span in spans)):
        span.protect()
    announce_blocks(model, blocks, window.enter)
    return window
