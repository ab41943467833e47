"""What a run reads because its base is elsewhere: from a disk, where it does not stay in memory, or from the host's
memory, for a GPU. And how fast that is."""

from __future__ import annotations

import math
import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.model.residence.host_memory import HostMemory
from sgm_finetune.train.budget.speed import least_seconds
from sgm_finetune.train.budget.weights import WeightBytes
from sgm_finetune.train.fast.head_loss import NUM_LOGITS, SLICE

ASSUMED_RATE = 5e8
"""Bytes a second where the disk cannot be measured: what a solid-state disk on SATA reads."""
_PIECE, _MOST = 2**22, 2**27
"""Bytes of a read, and of all reads that measure a disk."""


@dataclass(frozen=True)
class Reads:
    """Bytes that a pass over the base reads or copies, and bytes a second that it does."""

    forward: int = 0
    step: int = 0
    """Forward and backward of one micro-batch."""
    rate: float = 0.0

    def seconds(self, num_bytes: int) -> float:
        return num_bytes / self.rate if num_bytes else 0.0


def count_reads(folder: Path, weights: WeightBytes, run_bytes: int, num_tokens: int) -> Reads:
    """What passes over a base elsewhere read, of which a micro-batch has `num_tokens` tokens.

    The blocks are read forward and backward, and the output layer once for the tokens whose loss is computed together.
    From a disk nothing is read if the system's cache can keep all of the files beside the `run_bytes` of the run
    itself. Otherwise everything is: a pass that begins at the first block again finds what the end of the last pass
    left, which is not what it needs. `folder` holds the model's own files, whose disk is measured.
    """
    if not weights.blocks:
        return Reads()
    if not weights.host and weights.files <= memory_within_reach() - run_bytes:
        return Reads()
    device = "cuda" if weights.host else "cpu"
    together = NUM_LOGITS[device] // SLICE[device]
    passes = math.ceil(num_tokens / together) if weights.output < weights.output_layer else 2
    forward = weights.blocks + weights.output_layer
    step = 2 * weights.blocks + passes * weights.output_layer
    return Reads(forward, step, copy_rate() if weights.host else read_rate(folder))


@cache
def copy_rate() -> float:
    """Bytes a second that the GPU copies from pinned memory of the host."""
    source = HostMemory(_MOST, pinned=True)  # its bytes are pinned as long as it exists
    target = torch.empty(_MOST, dtype=torch.uint8, device="cuda")
    return _MOST / least_seconds(lambda: target.copy_(source.bytes, non_blocking=True))


@cache
def read_rate(folder: Path) -> float:
    """Bytes a second at which the disk reads the model's largest file, past the system's cache; `ASSUMED_RATE` where
    that is impossible, or the file is too small to tell."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    if files and hasattr(os, "O_DIRECT") and files[-1].stat().st_size >= 4 * _PIECE:
        with suppress(OSError):
            return _measured_rate(files[-1])
    return ASSUMED_RATE


def _measured_rate(path: Path) -> float:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, _PIECE) as buffer:  # its address is a multiple of a page, as such reads require
            started, num_read = time.perf_counter(), 0
            while num_read < _MOST and (found := os.preadv(descriptor, [buffer], num_read)):
                num_read += found
            return num_read / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
