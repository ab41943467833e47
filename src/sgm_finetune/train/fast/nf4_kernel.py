"""Dequantises bitsandbytes' 4-bit weights in one GPU kernel; with nested scales bitsandbytes takes three.

Import it only where Triton is installed. An entry of a weight is code[its four bits] times the scale of its block. A
nested scale is code₂[its byte] times a scale of its own, plus an offset (QLoRA, arXiv 2305.14314, section 3). All of it
is computed in float32, so the result has the same bits as bitsandbytes'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

_BYTES = 2048
"""Number of packed bytes that one program unpacks."""


@triton.jit
def _unpack(packed, code, scales, scale_code, scale_scales, offset, out, num_bytes, NESTED: tl.constexpr,
            BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < num_bytes
    byte = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at * 2 // BLOCK
    if NESTED:
        of_scale = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scale_code + of_scale, mask=inside, other=0.0)
        scale = scale * tl.load(scale_scales + block // SCALE_BLOCK, mask=inside, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    first = tl.load(code + (byte >> 4)) * scale
    second = tl.load(code + (byte & 15)) * scale
    places = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    values = tl.interleave(first, second).to(out.dtype.element_ty)
    tl.store(out + places, values, mask=places < 2 * num_bytes)


def dequantize(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, (d_out, d_in), from bitsandbytes' packed NF4 or FP4 weight and its `quant_state`."""
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    num_bytes = packed.numel()
    nested = state.nested
    inner = state.state2 if nested else state
    _unpack[(triton.cdiv(num_bytes, _BYTES),)](  # type: ignore[index]
        packed, state.code, state.absmax, inner.code, inner.absmax, state.offset if nested else inner.absmax, out,
        num_bytes, NESTED=nested, BLOCK=state.blocksize, SCALE_BLOCK=inner.blocksize, BYTES=_BYTES,
        enable_fp_fusion=False,  # bitsandbytes rounds a scale before it adds the offset
    )  # fmt: skip
    return out
