"""An experiment: a step recorded once as a CUDA graph and replayed, for packed batches of one length.

A step of one sequence issues 7,000 kernels and computes for half of the time that the host takes to issue them. A graph
is one launch. What it records must not wait for the GPU, so the batches have no padding and no ignored labels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sgm_finetune.train.fast.head_loss import cross_entropy_in_parts


def packed_loss(decoder: nn.Module, head: nn.Linear, ids: Tensor) -> Tensor:
    """The mean loss of a batch whose every token is predicted; it never waits for the GPU.

    Without padding, attention needs no mask but "causal", which Transformers cannot find out while a graph is recorded.
    """
    with patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda *_, **__: None):
        hidden: Any = decoder(input_ids=ids).last_hidden_state
    rows = hidden[:, :-1].flatten(0, 1)
    return cross_entropy_in_parts(rows, head.weight, ids[:, 1:].flatten()) / len(rows)


class RecordedStep:
    """Loss and gradients of batches of one shape: recorded at the first, replayed after.

    On a CPU, which has no graphs, every call computes the same again.
    """

    def __init__(self, loss_of: Callable[[Tensor], Tensor], parameters: Iterable[nn.Parameter], ids: Tensor) -> None:
        self.loss_of, self.parameters, self.ids = loss_of, list(parameters), ids.clone()
        self.loss = torch.zeros(())
        self.gradients: list[Tensor | None] = []
        self.graph: torch.cuda.CUDAGraph | None = None
        self.bytes = 0
        """Memory of the graph, which counts as free between its replays."""
        if ids.is_cuda:
            self._record()

    def _compute(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss_of(self.ids)
        loss.backward()
        self.loss, self.gradients = loss.detach(), [parameter.grad for parameter in self.parameters]

    def _record(self) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # kernels are compiled and chosen
                self._compute()
        torch.cuda.current_stream().wait_stream(beside)
        self.gradients = []
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._compute()
        self.bytes = torch.cuda.memory_reserved() - before

    def __call__(self, ids: Tensor) -> Tensor:
        """The loss of the batch; the parameters hold its gradients. Raises ValueError for another shape."""
        if ids.shape != self.ids.shape:
            raise ValueError(f"recorded for batches of {tuple(self.ids.shape)}, not {tuple(ids.shape)}")
        self.ids.copy_(ids)
        if self.graph is None:
            self._compute()
        else:
            self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss
