"""The speed of this machine, measured in a moment, and the time that an amount of work takes at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from sgm_finetune.base.device import has_gpu

_REACHED_ON_CPU = 0.55
"""Share of these rates that a run reaches on a CPU: predicted over measured time, the median of the 120 runs in
benchmarks/results/memory.jsonl (docs/estimate.md)."""


@dataclass(frozen=True)
class Speed:
    """Rates per second: floating-point operations of a matrix product, and bytes that a copy reads and writes."""

    flops: float
    traffic: float
    reached: float = 1.0
    """Share of both rates that a whole step reaches."""

    def seconds(self, flops: int, traffic: int) -> float:
        """Seconds for `flops` operations of matrix products and `traffic` bytes read and written, one after the
        other."""
        return (flops / self.flops + traffic / self.traffic) / self.reached


@cache
def measure_speed(width: int, dtype: torch.dtype) -> Speed:
    """The speed of this machine's GPU, or of its CPU, for layers of `width` inputs in `dtype` (bfloat16 in place of an
    integer type)."""
    device = "cuda" if has_gpu() else "cpu"
    if not dtype.is_floating_point:
        dtype = torch.bfloat16
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((1024, width), (2 * width, width)))
    block = torch.ones(2**22, dtype=dtype, device=device)
    return Speed(
        flops=2 * 1024 * width * 2 * width / least_seconds(lambda: x @ w.T),
        traffic=2 * block.numel() * block.element_size() / least_seconds(lambda: block.clone()),
        reached=1.0 if has_gpu() else _REACHED_ON_CPU,
    )


def least_seconds(compute: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of `repeats` runs; one more run comes first and does not count."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        compute()
        if has_gpu():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
