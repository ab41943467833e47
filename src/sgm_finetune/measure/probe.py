"""The probe: both sides of every matrix's gradient, from a few batches and hooks (docs/method.md section 2).

It works on a frozen, also a 4-bit, base; it forms no weight gradient but that of one stack of experts at a time; and it
leaves the model as it found it.
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

from sgm_finetune.base.errors import UserError
from sgm_finetune.method.subspace import Sketch, sketch_batch, sketch_stack, test_matrix
from sgm_finetune.model.four_bit import ready_for_backward
from sgm_finetune.model.matrices import Matrix, adaptable
from sgm_finetune.model.names import stored_to_model_names


@dataclass(frozen=True)
class Probe:
    """What the gradients of two disjoint halves of the batches look like, and what it cost to know."""

    halves: Mapping[str, tuple[Sketch, Sketch]]
    """Module name -> sketches of the gradient's sum over the even and over the odd batches; float32, on the CPU.

    A stack of experts is sketched as the one matrix that its experts make: one below another on the input side, side by
    side on the output side."""
    shapes: Mapping[str, tuple[int, int]]
    """Module name -> (d_out, d_in), of one expert."""
    num_experts: Mapping[str, int]
    """Name of a stack of experts -> their number."""
    activations: Mapping[str, str]
    """Module name -> the first module, itself included, that read the same activations."""
    unused: tuple[str, ...]
    """Modules that the loss does not depend on, in these batches: not measured."""
    model_name: Callable[[str], str]
    """From the name of a parameter in the model's files to its name in the model."""
    loss: float
    """Mean loss of the batches."""
    num_batches: int
    num_tokens: int
    seconds: float
    sketch_bytes: int
    """Memory of the sketches and test matrices."""
    activation_bytes: int
    """Most bytes of layer inputs held at once, between a forward and its backward pass."""


class _Reads:
    """Which activations each layer reads; each activation has a number that counts from 0 in every batch."""

    def __init__(self) -> None:
        self.of: dict[str, list[tuple[int, int]]] = {}
        """Name of a layer -> (batch, number) of every activation that it reads, in order."""
        self._num_batches = 0
        self._numbers: dict[tuple, int] = {}

    def begin_batch(self) -> None:
        self._num_batches += 1
        self._numbers.clear()

    def note(self, name: str, x: Tensor) -> None:
        """Notes that the layer `name` reads `x`, which the caller holds until the batch ends: the memory of a freed
        tensor can be another's."""
        number = self._numbers.setdefault(_identity(x), len(self._numbers))
        self.of.setdefault(name, []).append((self._num_batches, number))


def _identity(x: Tensor) -> tuple:
    """What distinguishes `x` from all other tensors that are held."""
    # a tensor of device "meta" has no address; its storage object stands for it
    address = (x.untyped_storage()._cdata, x.storage_offset()) if x.is_meta else x.data_ptr()
    return address, x._version, x.shape, x.stride()


class _Recorder:
    """Collects one half's sketches; alive between entering and leaving the hooks."""

    def __init__(self, matrices: Mapping[str, Matrix], size: int, seed: int):
        self.matrices, self.size, self.seed = matrices, size, seed
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.omegas: dict[tuple[int, torch.device], Tensor] = {}
        self.rooms: dict[torch.device, Mapping[str, tuple[Tensor, Tensor]]] = {}
        self.held_bytes = self.peak_bytes = 0
        self.reads = _Reads()

    def omega(self, dim: int, device: torch.device) -> Tensor:
        if (dim, device) not in self.omegas:
            self.omegas[dim, device] = test_matrix(dim, self.size, self.seed).to(device)
        return self.omegas[dim, device]

    def forward_hook(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """Notes what the layer reads, and waits for the gradient of what it gives. Nothing below the first layers
        needs one, so that it begins at them: what reads the embeddings, or a table of positions."""
        del module
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        begins = not output.requires_grad
        if begins:
            output = output.detach().requires_grad_().clone()
        x = args[0].detach()
        self.reads.note(name, x)  # the hook below holds it until the backward pass
        self.held_bytes += x.numel() * x.element_size()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        output.register_hook(partial(self.add, name, x))
        return output if begins else None

    def add(self, name: str, x: Tensor, delta: Tensor) -> None:
        self.held_bytes -= x.numel() * x.element_size()
        rows, cols = self.matrices[name].shape
        x, delta = x.reshape(-1, cols).float(), delta.detach().reshape(-1, rows).float()
        self._sum(name, sketch_batch(x, delta, self.omega(rows, x.device), self.omega(cols, x.device)))

    def add_experts(self, name: str, parameter: Tensor) -> None:
        """The whole stack's gradient, taken as soon as it is complete, and dropped."""
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
            rooms = self._room(parts[0].device)[name]
            self.sums[name] = (rooms[0].copy_(parts[0]), rooms[1].copy_(parts[1]))

    def _room(self, device: torch.device) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Where the sums of all matrices lie: in one piece. Each by itself they would lie between the activations of
        the first batch, and keep the allocator from giving that memory to larger ones later (docs/LOG.md)."""
        if device not in self.rooms:
            sizes = [side for matrix in self.matrices.values() for side in (matrix.shape[1], matrix.shape[0])]
            parts = torch.empty(self.size * sum(sizes), device=device).split([self.size * side for side in sizes])
            sides = [part.view(self.size, side) for part, side in zip(parts, sizes, strict=True)]
            self.rooms[device] = dict(zip(self.matrices, zip(sides[::2], sides[1::2], strict=True), strict=True))
        return self.rooms[device]

    def sketch(self, name: str) -> Sketch:
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
    """The gradient sketches of the weights `names` (None: all inside numbered layers) of `model`.

    Even batches make the first half, odd ones the second; the halves use independent test matrices, so that what one
    half's subspace keeps of the other is not flattered. Each batch is a dict of tensors that gives `model(**batch)` a
    loss, or `mean_loss(model, batch)` one. `pieces` divides a batch into what is computed at a time; its loss is the
    sum of theirs, each times the number beside it. Layers that the loss does not use are left out, and listed; one of
    `names` raises UserError, as do fewer than two batches and a missing or non-finite loss.
    """
    if len(batches) < 2:
        raise UserError(f"The probe needs at least two batches, one for each half; it was given {len(batches)}")
    matrices = adaptable(model, names)
    recorders = [_Recorder(matrices, sketch_size, 2 * seed + half) for half in (0, 1)]
    device = next(model.parameters()).device
    started, losses, num_tokens = time.perf_counter(), [], 0
    with _measuring(model, matrices):
        for index, batch in enumerate(batches):
            batch = {key: value.to(device) for key, value in batch.items()}
            losses.append(0.0)
            for piece, share in pieces(batch):
                recorders[index % 2].reads.begin_batch()
                with _hooked(matrices, recorders[index % 2]):
                    loss = _loss(model, piece) if mean_loss is None else mean_loss(model, piece)
                    if not bool(torch.isfinite(loss)):
                        raise UserError(f"The loss of a probe batch is {float(loss.detach())}; try model.dtype=float32")
                    if loss.requires_grad:  # not where it uses none of the layers
                        (loss * share).backward()
                losses[-1] += share * float(loss.detach())
                del loss  # its graph, and with it what the layers have read, would be there during the next one
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


@contextmanager
def following(model: nn.Module, sketch_size: int, seed: int) -> Iterator[Callable[[], int]]:
    """The probe's hooks on a model without numbers (device "meta"), for one batch: what it needs can be followed
    (`footprint.py`). Gives a function that tells the bytes of sketches and test vectors."""
    matrices = adaptable(model)
    recorder = _Recorder(matrices, sketch_size, seed)
    recorder.reads.begin_batch()

    def num_bytes() -> int:
        tensors = [*(t for pair in recorder.sums.values() for t in pair), *recorder.omegas.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    with _measuring(model, matrices), _hooked(matrices, recorder):
        yield num_bytes


def readers_of_same_activations(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """Groups of names of weights that read the same activations while `run()` calls `model`: what the probe notes in
    `Probe.activations`, on any device (also "meta"), with or without gradients.

    Every name of `adaptable(model)` is in one group; groups, and names in a group, keep its order. A stack of experts,
    and a layer that reads nothing, is a group of its own.
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
    """Name -> the first of those that read the same activations as it, in all batches (a stack of experts: itself)."""
    first: dict[tuple, str] = {}
    return {
        name: first.setdefault(tuple(tuple(read.of.get(name, [name])) for read in reads), name)  # type: ignore
        for name in names
    }


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    loss = getattr(model(**batch, **extra), "loss", None)
    if loss is None:
        raise UserError(f"The model gave no loss for a batch of {', '.join(batch)}; the batches need labels")
    return loss


@contextmanager
def _hooked(matrices: Mapping[str, Matrix], recorder: _Recorder) -> Iterator[None]:
    with ExitStack() as stack:
        for name, matrix in matrices.items():
            if matrix.num_experts is None:
                hook = matrix.module.register_forward_hook(partial(recorder.forward_hook, name))
            else:
                parameter = matrix.module.get_parameter(matrix.parameter)
                hook = parameter.register_post_accumulate_grad_hook(partial(recorder.add_experts, name))
            stack.callback(hook.remove)
        yield


@contextmanager
def _measuring(model: nn.Module, matrices: Mapping[str, Matrix]) -> Iterator[None]:
    """The model in eval mode with every parameter frozen but the stacks of experts; then as before.

    Restored also after an exception: parameters' requires_grad, each module's mode, hooks, torch's random state.
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
