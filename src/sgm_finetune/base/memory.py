"""Memory of this process: used, available, released. It is GPU memory when there is a GPU, else resident memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """The peak memory of this process so far, in bytes: allocated on the GPU, or resident without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
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


@dataclass(frozen=True)
class Room:
    """The memory of this process before a model is in it, in bytes: what it uses, and what it can use in total."""

    held: int
    within_reach: int


def room() -> Room:
    """The room of this process, as it is now."""
    release_memory()
    return Room(held_memory(), memory_within_reach())


def host_memory_within_reach() -> int:
    """The host's memory that this process can use in total, in bytes, as `memory_within_reach` counts it."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    within = psutil.Process().memory_info().rss + psutil.virtual_memory().available // sharing
    for limit in (_CGROUP / "memory.max", _CGROUP / "memory" / "memory.limit_in_bytes"):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
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


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """A context in which glibc's malloc gives every block of 64 KiB or more pages of its own, and returns them at once.

    While a model loads, tensors of many sizes are freed between others that stay. In malloc's heap they would leave
    holes that nothing fills (docs/LOG.md). Later, large blocks are in the heap again, as they are after the first steps
    of a run in any case: pages of their own make a step slow.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if torch.cuda.is_available() or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 2**25)  # where malloc's own adjustment ends
        libc.mallopt(_TRIM_THRESHOLD, 2**26)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt's numbers for its parameters."""


def can_map_files() -> bool:
    """Whether this system shows which files a process has mapped, and takes advice about their pages: Linux."""
    return sys.platform == "linux" and Path("/proc/self/maps").is_file()
