"""Memory of this process: used, available, released. It is GPU memory when there is a GPU, else resident memory."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes: allocated on the GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def held_memory() -> int:
    """The memory that this process uses now, in bytes, counted as in `peak_memory`."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def memory_within_reach() -> int:
    """The memory that this process can use in total, in bytes: what it uses now plus what is free.

    Processes that a launcher started on one machine share its free CPU memory equally. The limit of a container counts.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return torch.cuda.memory_reserved() + free
    return host_memory_within_reach()


def host_memory_within_reach() -> int:
    """The host's memory that this process can use in total, in bytes, as `memory_within_reach` counts it."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    within = psutil.Process().memory_info().rss + psutil.virtual_memory().available // sharing
    for limit in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
            within = min(within, int(text) // sharing)
    return within


def release_memory() -> None:
    """Returns freed memory to the system, so that a phase of a run does not start at the peak of an earlier one.

    torch's GPU allocator and glibc's malloc keep freed memory for later; other C allocators are left alone.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def can_map_files() -> bool:
    """Whether this system shows which files a process has mapped, and takes advice about their pages: Linux."""
    return sys.platform == "linux" and Path("/proc/self/maps").is_file()
