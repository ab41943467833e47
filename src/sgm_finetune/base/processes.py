"""The processes of a run, and values that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list


def processes() -> PartialState:
    """The processes of this run: one, or those that torchrun or accelerate started."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on any process; every process must call it."""
    return sum_over_processes(float(flag))[0] > 0


def sum_over_processes(*values: float) -> list[float]:
    """Each value summed over all processes, in float64; every process must call it."""
    if not torch.distributed.is_initialized():
        return list(values)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, device=device, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def on_main(measure: Callable[[], Any]) -> Any:
    """Calls `measure` on the first process and returns its result on every process; every process must call it."""
    result = [measure() if processes().is_main_process else None]
    if processes().num_processes > 1:
        broadcast_object_list(result)
    return result[0]
