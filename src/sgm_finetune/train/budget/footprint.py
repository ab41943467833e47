"""Counts the memory and the operations that a computation needs, without computing it.

Tensors of device "meta" have shapes and no numbers. The code that will run is run on them, and every new tensor of
every operation is followed until it is freed. Memory that a kernel allocates and frees within itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten


def saved_elsewhere() -> saved_tensors_hooks:
    """A context in which tensors kept for the backward pass do not count: the host holds them instead of the GPU, as
    with `training.checkpointing=offload`, where they are what the checkpointed blocks read."""
    return saved_tensors_hooks(
        lambda kept: (kept.shape, kept.dtype), lambda sent: torch.empty(sent[0], dtype=sent[1], device="meta")
    )


@dataclass(frozen=True)
class Piece:
    """What one piece of a computation needs. Its bytes count from what was alive when it began."""

    kept: int = 0
    """Bytes alive at its end."""
    peak: int = 0
    wide: int = 0
    """Bytes of `kept` that are wide (see `Footprint`)."""
    wide_at_peak: int = 0
    flops: int = 0
    traffic: int = 0


def joined(pieces: Iterable[Piece]) -> Piece:
    """The pieces of a computation, one after the other, as one piece.

    >>> joined([Piece(kept=2, peak=5), Piece(kept=-1, peak=4), Piece(peak=1)])
    Piece(kept=1, peak=6, wide=0, wide_at_peak=0, flops=0, traffic=0)
    """
    kept = peak = wide = wide_at_peak = flops = traffic = 0
    for piece in pieces:
        if kept + piece.peak > peak:
            peak, wide_at_peak = kept + piece.peak, wide + piece.wide_at_peak
        kept, wide = kept + piece.kept, wide + piece.wide
        flops, traffic = flops + piece.flops, traffic + piece.traffic
    return Piece(kept, peak, wide, wide_at_peak, flops, traffic)


class Footprint(TorchDispatchMode):
    """A context manager that follows the tensors made within it.

    `peak`: most bytes of such tensors that were alive at one time. `now`: bytes alive now. `wide_at_peak`: bytes at the
    peak of tensors whose last dimension is `width`. `flops`: floating-point operations of matrix products. `traffic`:
    bytes that all operations read and wrote. Tensors in `known` do not count. `cut` divides the computation into
    pieces; both peaks are those of the current piece.

    Tensors without numbers cannot be read: a number that the code asks for is 1 (so a mask hides nothing), and a
    boolean index selects `num_selected` rows.

    >>> with Footprint() as footprint:
    ...     a = torch.zeros(256, 256, device="meta")
    ...     b = (a @ a).sum()
    >>> footprint.peak, footprint.flops
    (524292, 33554432)
    """

    def __init__(self, known: Iterable[Tensor] = (), num_selected: int = 0, width: int = -1):
        super().__init__()
        self.now = self.peak = self.flops = self.traffic = 0
        self.num_selected, self.width = num_selected, width
        self.wide = self.wide_at_peak = 0
        self._begun = (0, 0, 0, 0)
        # a storage without numbers has no address; its object identifies it as long as it lives
        self._alive: dict[int, Any] = {s._cdata: s for s in (tensor.untyped_storage() for tensor in known)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if func is _aten.index.Tensor and args[0].is_meta and _selects(args[1]):
            mask = args[1][0]
            made = torch.empty(self.num_selected, *args[0].shape[mask.dim() :], dtype=args[0].dtype, device="meta")
        elif func is _aten.unique_consecutive.default and args[0].is_meta:  # all entries are equal
            made = tuple(torch.empty(1, dtype=args[0].dtype, device="meta") for _ in range(3))
        elif func is _aten._grouped_mm.default and args[0].is_meta:  # accepts every type, as its CPU kernel does
            made = _grouped_product(args[0], args[1], kwargs.get("offs", args[2] if len(args) > 2 else None))
        else:
            made = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        for tensor in outputs:
            self._follow(tensor)
        if not func.is_view:
            inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.traffic += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
            if (formula := flop_registry.get(func.overloadpacket)) is not None:
                self.flops += formula(*args, **kwargs, out_val=made)
        return made

    def cut(self) -> Piece:
        """Ends the current piece and returns it; the next one begins."""
        now, wide, flops, traffic = self._begun
        piece = Piece(
            self.now - now, self.peak - now, self.wide - wide, self.wide_at_peak - wide,
            self.flops - flops, self.traffic - traffic,
        )  # fmt: skip
        self._begun = (self.now, self.wide, self.flops, self.traffic)
        self.peak, self.wide_at_peak = self.now, self.wide
        return piece

    def _note(self) -> None:
        if self.now > self.peak:
            self.peak, self.wide_at_peak = self.now, self.wide

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        wide = size if tensor.dim() and tensor.shape[-1] == self.width else 0

        def freed(_: Any) -> None:
            self.now -= size
            self.wide -= wide
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.wide += wide
        self._note()


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """The output of a grouped product, without numbers. `ends` are the row indices at which the groups end. A 3-D `b`
    holds one matrix a group; a 2-D `b` gives one product a group."""
    if b.dim() == 3:
        return torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device="meta")
    return torch.empty(1 if ends is None else len(ends), a.shape[0], b.shape[1], dtype=a.dtype, device="meta")


def _selects(indices: Any) -> bool:
    """Whether an index is one boolean mask."""
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool
