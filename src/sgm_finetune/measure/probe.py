"""The probe: both sides of every matrix's gradient, from a few batches and hooks (docs/method.md section 2).

It works on a frozen, also a 4-bit, base; it forms no weight gradient; and it leaves the model as it found it.
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

from sgm_finetune.errors import UserError
from sgm_finetune.method.subspace import Sketch, sketch_batch, test_matrix
from sgm_finetune.models import linear_layers, matrix_shape, ready_for_backward


@dataclass(frozen=True)
class Probe:
    """What the gradients of two disjoint halves of the batches look like, and what it cost to know."""

    halves: Mapping[str, tuple[Sketch, Sketch]]
    """Module name -> sketches of the gradient's sum over the even and over the odd batches; float32, on the CPU."""
    shapes: Mapping[str, tuple[int, int]]
    """Module name -> (d_out, d_in)."""
    activations: Mapping[str, str]
    """Module name -> the first module, itself included, that read the same activations."""
    loss: float
    """Mean loss of the batches."""
    num_batches: int
    num_tokens: int
    seconds: float
    sketch_bytes: int
    """Memory of the sketches and test matrices."""
    activation_bytes: int
    """Most bytes of layer inputs held at once, between a forward and its backward pass."""


class _Recorder:
    """Collects one half's sketches; alive between entering and leaving the hooks."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], size: int, seed: int):
        self.shapes, self.size, self.seed = shapes, size, seed
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.omegas: dict[tuple[int, torch.device], Tensor] = {}
        self.held_bytes = self.peak_bytes = 0
        self.read: dict[str, list[tuple[int, int]]] = {}  # name -> (batch, number) of every activation that it read
        self.num_batches = 0
        self.numbers: dict[tuple[int, int, torch.Size, tuple[int, ...]], int] = {}  # what it is -> number in the batch

    def begin_batch(self) -> None:
        self.num_batches += 1
        self.numbers.clear()

    def omega(self, dim: int, device: torch.device) -> Tensor:
        if (dim, device) not in self.omegas:
            self.omegas[dim, device] = test_matrix(dim, self.size, self.seed).to(device)
        return self.omegas[dim, device]

    def forward_hook(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        x = args[0].detach()
        # its own as long as it is held, until the backward pass
        number = self.numbers.setdefault((x.data_ptr(), x._version, x.shape, x.stride()), len(self.numbers))
        self.read.setdefault(name, []).append((self.num_batches, number))
        self.held_bytes += x.numel() * x.element_size()
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        output.register_hook(partial(self.add, name, x))

    def add(self, name: str, x: Tensor, delta: Tensor) -> None:
        self.held_bytes -= x.numel() * x.element_size()
        rows, cols = self.shapes[name]
        x, delta = x.reshape(-1, cols).float(), delta.detach().reshape(-1, rows).float()
        parts = sketch_batch(x, delta, self.omega(rows, x.device), self.omega(cols, x.device))
        before = self.sums.get(name)
        self.sums[name] = parts if before is None else (before[0].add_(parts[0]), before[1].add_(parts[1]))

    def sketch(self, name: str) -> Sketch:
        sides = self.sums.get(name)
        if sides is None:
            raise UserError(f"`{name}` received no gradient in the probe; leave it out, or check that the loss uses it")
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
) -> Probe:
    """The gradient sketches of the linear layers `names` (None: all inside numbered layers) of `model`.

    Even batches make the first half, odd ones the second; the halves use independent test matrices, so that what one
    half's subspace keeps of the other is not flattered. Each batch is a dict of tensors that gives `model(**batch)` a
    loss. Raises UserError for fewer than two batches, a missing or non-finite loss, a layer that the loss does not use.
    """
    if len(batches) < 2:
        raise UserError(f"The probe needs at least two batches, one for each half; it was given {len(batches)}")
    layers = linear_layers(model, names)
    shapes = {name: matrix_shape(layer) for name, layer in layers.items()}
    recorders = [_Recorder(shapes, sketch_size, 2 * seed + half) for half in (0, 1)]
    device = next(model.parameters()).device
    started, losses, num_tokens = time.perf_counter(), [], 0
    with _measuring(model):
        for index, batch in enumerate(batches):
            batch = {key: value.to(device) for key, value in batch.items()}
            recorders[index % 2].begin_batch()
            with _hooked(layers, recorders[index % 2]):
                loss = _loss(model, batch)
                loss.backward()
            losses.append(float(loss.detach()))
            num_tokens += (
                int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
            )
            progress(index + 1, len(batches))
        first, second = recorders
        halves = {name: (first.sketch(name), second.sketch(name)) for name in layers}
    tensors = [t for recorder in recorders for pair in recorder.sums.values() for t in pair]
    tensors += [omega for recorder in recorders for omega in recorder.omegas.values()]
    return Probe(
        halves=halves,
        shapes=shapes,
        activations=_first_readers(layers, [recorder.read for recorder in recorders]),
        loss=sum(losses) / len(losses),
        num_batches=len(batches),
        num_tokens=num_tokens,
        seconds=time.perf_counter() - started,
        sketch_bytes=sum(t.numel() * t.element_size() for t in tensors),
        activation_bytes=max(recorder.peak_bytes for recorder in recorders),
    )


def _first_readers(names: Iterable[str], reads: Sequence[Mapping[str, list[tuple[int, int]]]]) -> dict[str, str]:
    """Name -> the first of those that read the same activations as it, in all batches."""
    first: dict[tuple, str] = {}
    return {name: first.setdefault(tuple(tuple(read[name]) for read in reads), name) for name in names}


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    extra = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    loss = getattr(model(**batch, **extra), "loss", None)
    if loss is None:
        raise UserError(f"The model gave no loss for a batch of {', '.join(batch)}; the batches need labels")
    if not bool(torch.isfinite(loss)):
        raise UserError(f"The loss of a probe batch is {float(loss.detach())}; try model.dtype=float32")
    return loss


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], recorder: _Recorder) -> Iterator[None]:
    handles = [layer.register_forward_hook(partial(recorder.forward_hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode with every parameter frozen and gradients flowing from its embeddings; then as before.

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
            stack.callback(
                model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True)).remove  # type: ignore[operator]
            )
            yield
        finally:
            for parameter, wanted in required.items():
                parameter.requires_grad_(wanted)
            for module, training in modes.items():
                module.training = training


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
