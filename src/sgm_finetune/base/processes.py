"""The processes of a run, and values that all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from sgm_finetune.base.errors import PeerLost

JOIN_LIMIT = timedelta(minutes=10)
"""How long processes wait for one another when a run begins. Later they wait for a day: one may scan for hours."""


def processes() -> PartialState:
    """The processes of this run: one, or those that torchrun or accelerate started.

    The first call waits for all of them. Raises PeerLost if one does not come within JOIN_LIMIT.
    """
    store = None if torch.distributed.is_initialized() else _join()  # alive until the processes have another one
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=24))
    del store
    return state


def _join() -> Any:
    """Waits until all processes have written their number into the launcher's store; None for a single process."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number == 1:
        return None
    missing = "one"
    try:
        store, rank, _ = next(rendezvous("env://", timeout=JOIN_LIMIT))
        joined = PrefixStore("sgm/joined", store)
        joined.set(str(rank), "")
        names = [str(other) for other in range(number)]
        try:
            joined.wait(names, JOIN_LIMIT)
        except torch.distributed.DistStoreError:
            missing = ", ".join(name for name in names if not joined.check([name]))
            raise
    except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError):
        raise PeerLost(
            f"of the {number} processes of this run, {missing} did not come within {JOIN_LIMIT.total_seconds():.0f} s; "
            "see what ended it, and start the run again"
        ) from None
    return store


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


def average_over_processes(tensor: Tensor) -> None:
    """Replaces `tensor` by its mean over all processes, in its own dtype; every process must call it."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor.div_(torch.distributed.get_world_size())


def on_main(measure: Callable[[], Any]) -> Any:
    """Calls `measure` on the first process and returns its result on every process; every process must call it."""
    result = [measure() if processes().is_main_process else None]
    if processes().num_processes > 1:
        broadcast_object_list(result)
    return result[0]
