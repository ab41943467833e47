"""The probe: sketches of both sides of every matrix's gradient, from a few batches (docs/method.md section 2).

It works with hooks on a frozen base, also a 4-bit one. It forms no weight gradients, except that of one stack of
experts at a time, and it leaves the model as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sgm_finetune.base.device import check_has_float64
from sgm_finetune.base.errors import UserError
from sgm_finetune.method.subspace import Sketch, sketch_batch, sketch_stack, test_matrix
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.matrices import Matrix, adaptable
from sgm_finetune.model.names import stored_to_model_names
from sgm_finetune.model.residence.host import differentiable


@dataclass(frozen=True)
class Probe:
    """Sketches of the gradients over two disjoint halves of the batches, and what they cost."""

    halves: Mapping[str, tuple[Sketch, Sketch]]
    """Module name -> sketches of the gradient, summed over the even batches and over the odd ones; float32, CPU.

    A stack of experts is sketched as one matrix: its experts below each other for the input side, side by side for the
    output side."""
    shapes: Mapping[str, tuple[int, int]]
    """Module name -> (d_out, d_in); for a stack, of one expert."""
    num_experts: Mapping[str, int]
    """Name of a stack of experts -> their number."""
    activations: Mapping[str, str]
    """Module name -> the first module, possibly itself, that read the same activations."""
    unused: tuple[str, ...]
    """Modules without a sketch, because the loss of these batches does not depend on them."""
    model_name: Callable[[str], str]
    """A function from a parameter's name in the model's files to its name in the model."""
    loss: float
    """Mean loss of the batches."""
    num_batches: int
    num_tokens: int
    seconds: float
    sketch_bytes: int
    """Bytes of the sketches and test matrices."""
    activation_bytes: int
    """Most bytes of layer inputs held at a time, between a forward pass and its backward pass."""


class _Reads:
    """Which activations each layer reads; the activations of a batch are numbered from 0."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[int, int]]] = {}
        """Name of a layer -> (batch, number) of every activation that it reads, in order."""
        self._num_batches = 0
        self._numbers: dict[tuple, int] = {}

    def begin_batch(self) -> None:
        self._num_batches += 1
        self._numbers.clear()

    def note(self, name: str, x: Tensor) -> None:
        """Records that the layer `name` reads `x`.

        The caller must hold `x` until the batch ends: another tensor could get the memory of a freed one.
        """
        number = self._numbers.setdefault(_identity(x), len(self._numbers))
        self.of.setdefault(name, []).append((self._num_batches, number))


def _identity(x: Tensor) -> tuple:
    """A key that differs between any two tensors that exist at the same time."""
    # a tensor on device "meta" has no address, but its storage object has one
    address = (x.untyped_storage()._cdata, x.storage_offset()) if x.is_meta else x.data_ptr()
    return address, x._version, x.shape, x.stride()


class _Recorder:
    """Collects the sketches of one half of the batches; its methods are hooks on the model."""

    def __init__(self, matrices: Mapping[str, Matrix], size: int, seed: int):
        self.matrices, self.size, self.seed = matrices, size, seed
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.omegas: dict[tuple[int, torch.device], Tensor] = {}
        self.buffers: dict[torch.device, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self.held_bytes = self.peak_bytes = 0
        self.reads = _Reads()

    def omega(self, dim: int, device: torch.device) -> Tensor:
        """The test matrix Ω (dim x sketch size) on that device."""
        if (dim, device) not in self.omegas:
            self.omegas[dim, device] = test_matrix(dim, self.size, self.seed).to(device)
        return self.omegas[dim, device]

    def forward_hook(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Records what the layer reads, and hooks the gradient of its output.

        The first layers (which read the embeddings, or a table of positions) have an output without gradient, since
        nothing below them needs one. There the hook returns an output that requires a gradient.
        """
        del module
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        is_first = not output.requires_grad
        if is_first:
            output = output.detach().requires_grad_().clone()
        x = args[0].detach()
        self.reads.note(name, x)  # the hook on `output` holds it until the backward pass
        self.held_bytes += x.numel() * x.element_size()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        output.register_hook(partial(self.add, name, x))
        return output if is_first else None

    def add(self, name: str, x: Tensor, delta: Tensor) -> None:
        """Adds the sketch of a layer's gradient δᵀx: `x` is its input, `delta` the gradient of its output."""
        self.held_bytes -= x.numel() * x.element_size()
        rows, cols = self.matrices[name].shape
        x, delta = x.reshape(-1, cols).float(), delta.detach().reshape(-1, rows).float()
        self._sum(name, sketch_batch(x, delta, self.omega(rows, x.device), self.omega(cols, x.device)))

    def add_experts(self, name: str, parameter: Tensor) -> None:
        """Adds the sketch of a stack's gradient as soon as that is complete, and drops the gradient."""
        matrix, gradient = self.matrices[name], parameter.grad
        parameter.grad = None
        assert gradient is not None
        assert matrix.num_experts is not None
        if matrix.transposed:
            gradient = gradient.mT
        rows, cols = matrix.shape
        below = self.omega(matrix.num_experts * rows, gradient.device).view(matrix.num_experts, rows, -1)
        beside = self.omega(matrix.num_experts * cols, gradient.device).view(matrix.num_experts, cols, -1)
        self._sum(name, sketch_stack(gradient, below, beside))

    def _sum(self, name: str, parts: tuple[Tensor, Tensor]) -> None:
        if name in self.sums:
            for before, part in zip(self.sums[name], parts, strict=True):
                before.add_(part)
        else:
            input_side, output_side = self._buffers(parts[0].device)[name]
            self.sums[name] = (input_side.copy_(parts[0]), output_side.copy_(parts[1]))

    def _buffers(self, device: torch.device) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Memory for the sums of all matrices, allocated in one piece.

        Allocated one by one, the sums would lie between the activations of the first batch, and the allocator could not
        reuse that memory for larger tensors later (docs/LOG.md).
        """
        if device not in self.buffers:
            sizes = [side for matrix in self.matrices.values() for side in (matrix.shape[1], matrix.shape[0])]
            parts = torch.empty(self.size * sum(sizes), device=device).split([self.size * side for side in sizes])
            sides = [part.view(self.size, side) for part, side in zip(parts, sizes, strict=True)]
            self.buffers[device] = dict(zip(self.matrices, zip(sides[::2], sides[1::2], strict=True), strict=True))
        return self.buffers[device]

    def sketch(self, name: str) -> Sketch:
        """The finished sketch of a matrix. Raises UserError when it is not finite."""
        sides = self.sums[name]
        if not all(bool(torch.isfinite(side).all()) for side in sides):
            raise UserError(f"The gradient of `{name}` is not finite; try model.dtype=float32")
        return Sketch(sides[0].cpu(), sides[1].cpu(), self.seed)


def probe(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    names: Collection[str] | None = None,
    sketch_size: int = 48,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    mean_loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
    pieces: Callable[[Mapping[str, Tensor]], Iterable[tuple[Mapping[str, Tensor], float]]] = lambda batch: [(batch, 1)],
) -> Probe:
    """Gradient sketches of the weights `names` (None: all inside numbered layers) of `model`.

    Even batches are the first half, odd ones the second. The halves use independent test matrices; a shared one would
    flatter how much of one half's gradient the other half's subspace keeps. Each batch is a dict of tensors for which
    `model(**batch)` has a loss, or `mean_loss(model, batch)` returns one. `pieces(batch)` divides a batch into (piece,
    weight) pairs that are computed one at a time; the batch's loss is the weighted sum of theirs. `progress(done,
    total)` is called after each batch.

    Layers that the loss does not use have no sketch, and `Probe.unused` lists them. Raises UserError when one of
    `names` is such a layer, for fewer than two batches, and for a missing or non-finite loss.
    """
    if len(batches) < 2:
        raise UserError(f"The probe needs at least two batches, one for each half; it got {len(batches)}")
    matrices = adaptable(model, names)
    recorders = [_Recorder(matrices, sketch_size, 2 * seed + half) for half in (0, 1)]
    device = next(model.parameters()).device
    check_has_float64(device)
    started, losses, num_tokens = time.perf_counter(), [], 0
    with _frozen(model, matrices):
        for index, batch in enumerate(batches):
            batch = {key: value.to(device) for key, value in batch.items()}
            losses.append(_measure_batch(model, pieces(batch), recorders[index % 2], mean_loss or _loss))
            num_tokens += (
                int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            )
            progress(index + 1, len(batches))
    first, second = recorders
    used = [name for name in matrices if name in first.sums and name in second.sums]
    unused = tuple(name for name in matrices if name not in used)
    if unused and (names is not None or not used):
        raise UserError(
            f"`{unused[0]}` received no gradient in the probe; leave it out, or check that the loss uses it"
        )
    halves = {name: (first.sketch(name), second.sketch(name)) for name in used}
    tensors = [t for recorder in recorders for pair in recorder.sums.values() for t in pair]
    tensors += [omega for recorder in recorders for omega in recorder.omegas.values()]
    return Probe(
        halves=halves,
        shapes={name: matrices[name].shape for name in used},
        num_experts={name: number for name in used if (number := matrices[name].num_experts) is not None},
        activations=_first_readers(used, [recorder.reads for recorder in recorders]),
        unused=unused,
        model_name=stored_to_model_names(model),
        loss=sum(losses) / len(losses),
        num_batches=len(batches),
        num_tokens=num_tokens,
        seconds=time.perf_counter() - started,
        sketch_bytes=sum(t.numel() * t.element_size() for t in tensors),
        activation_bytes=max(recorder.peak_bytes for recorder in recorders),
    )


def _measure_batch(
    model: nn.Module,
    pieces: Iterable[tuple[Mapping[str, Tensor], float]],
    recorder: _Recorder,
    mean_loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
) -> float:
    """The batch's loss; `recorder` collects the sketches of its gradients."""
    total = 0.0
    for piece, weight in pieces:
        recorder.reads.begin_batch()
        with _hooks(recorder), differentiable(model):
            loss = mean_loss(model, piece)
            if not bool(torch.isfinite(loss)):
                raise UserError(f"The loss of a probe batch is {float(loss.detach())}; try model.dtype=float32")
            if loss.requires_grad:  # a loss that uses none of the layers does not
                (loss * weight).backward()
        total += weight * float(loss.detach())
        del loss  # else its graph and the inputs of the layers stay in memory during the next piece
    return total


@contextmanager
def following(
    model: nn.Module, sketch_size: int, seed: int
) -> Iterator[Callable[[Callable[[Iterable[str]], Iterable[str]]], int]]:
    """The probe's hooks for one batch, on a model on device "meta", so that `train/budget/footprint.py` can follow it.

    Gives a function that returns the bytes of the sketches and test matrices. Its argument maps the names of the
    weights that got a sketch to those that would get one, if only part of the model was computed.
    """
    matrices = adaptable(model)
    recorder = _Recorder(matrices, sketch_size, seed)
    recorder.reads.begin_batch()

    def num_bytes(expand: Callable[[Iterable[str]], Iterable[str]]) -> int:
        sketches = sum(4 * sketch_size * sum(matrices[name].shape) for name in expand(recorder.sums))
        return sketches + sum(t.numel() * t.element_size() for t in recorder.omegas.values())

    with _frozen(model, matrices), _hooks(recorder):
        yield num_bytes


def readers_of_same_activations(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Groups of weights that read the same activations while `run()` calls `model`, as the probe would find them.

    It works on any device (also "meta"), with or without gradients. Each name in `adaptable(model)` is in one group;
    groups, and the names in a group, have the order of `adaptable(model)`. A stack of experts is alone in its group,
    and so is a layer that reads nothing.
    """
    matrices, reads, held = adaptable(model), _Reads(), []
    reads.begin_batch()

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        held.append(args[0])
        reads.note(name, args[0])

    with ExitStack() as stack:
        for name, matrix in matrices.items():
            if matrix.num_experts is None:
                stack.callback(matrix.module.register_forward_pre_hook(partial(note, name)).remove)
        run()
    groups: dict[str, list[str]] = {}
    for name, first in _first_readers(matrices, [reads]).items():
        groups.setdefault(first, []).append(name)
    return list(groups.values())


def _first_readers(names: Iterable[str], reads: Sequence[_Reads]) -> dict[str, str]:
    """Name -> the first name that read the same activations in every batch; for a stack of experts, itself."""
    first: dict[tuple, str] = {}
    return {
        name: first.setdefault(tuple(tuple(read.of.get(name, [name])) for read in reads), name)  # type: ignore
        for name in names
    }


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    loss = getattr(model(**batch, **extra), "loss", None)
    if loss is None:
        raise UserError(f"The model returned no loss for a batch of {', '.join(batch)}; add labels to the batches")
    return loss


@contextmanager
def _hooks(recorder: _Recorder) -> Iterator[None]:
    """Makes the model call `recorder` for each of its matrices inside the context."""
    with ExitStack() as stack:
        for name, matrix in recorder.matrices.items():
            if matrix.num_experts is None:
                hook = matrix.module.register_forward_hook(partial(recorder.forward_hook, name))
            else:
                parameter = matrix.module.get_parameter(matrix.parameter)
                hook = parameter.register_post_accumulate_grad_hook(partial(recorder.add_experts, name))
            stack.callback(hook.remove)
        yield


@contextmanager
def _frozen(model: nn.Module, matrices: Mapping[str, Matrix]) -> Iterator[None]:
    """Puts the model into eval mode and freezes every parameter except the stacks of experts, inside the context.

    Then it restores the parameters' `requires_grad`, each module's mode and torch's random state, also after an
    exception.
    """
    modes = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=_cuda_devices(model)))
        stack.enter_context(torch.enable_grad())
        try:
            ready_for_backward(model)
            model.eval()
            for parameter in required:
                parameter.requires_grad_(False)
            for matrix in matrices.values():
                if matrix.num_experts is not None:
                    matrix.module.get_parameter(matrix.parameter).requires_grad_(True)
            yield
        finally:
            for parameter, wanted in required.items():
                parameter.requires_grad_(wanted)
            for module, training in modes.items():
                module.training = training


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
