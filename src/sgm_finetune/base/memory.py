"""This machine's memory, the GPU's where there is one: what is held, what can be had, what can be given back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """Bytes: the most that this process has held: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def held_memory() -> int:
    """Bytes that this process holds now, counted as `peak_memory` does."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def memory_within_reach() -> int:
    """Bytes that this process can hold in all: what it holds, and what is free; of a CPU's memory its share, where a
    launcher started several here. A container's limit counts."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.memory_reserved() + free
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    within = held_memory() + psutil.virtual_memory().available // sharing
    for limit in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            within = min(within, int(text) // sharing)
    return within


def release_memory() -> None:
    """Gives back what has been freed, so that a phase of a run does not begin with the most that an earlier one held:
    C's allocator keeps what it may need again (glibc; others are left alone), and so does torch's for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
