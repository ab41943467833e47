"""Where this process's memory goes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from sgm_finetune.base.memory import large_blocks_apart

MIB = 2**20


def anonymous_bytes() -> int:
    """The memory of this process that is no file's."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="glibc's malloc, on a CPU")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another malloc")
def test_tensors_that_are_freed_between_others_leave_no_holes():
    before = anonymous_bytes()
    with large_blocks_apart():
        tensors = [torch.ones(MIB // 4) for _ in range(120)]
        del tensors[::2]
        assert anonymous_bytes() - before < 70 * MIB
    assert len(tensors) == 60
