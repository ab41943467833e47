"""Stochastic rounding to bfloat16 (docs/method.md section 9.2)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_BELOW = 2**16
"""Numbers that the 16 bits of a float32 express which bfloat16 lacks."""


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the float32 `values` in bfloat16, each rounded to one of its two neighbours by chance (eq. 22).

    The chance of the farther neighbour from zero is the distance from the nearer one, so the expected value is the
    value. A value that bfloat16 has stays as it is. `values` are finite; those within one unit of the largest finite
    number may become infinite.

    >>> halfway = torch.full((10_000,), 1 + 2**-8)  # between 1 and 1 + 2^-7
    >>> rounded = stochastic_round(halfway, torch.Generator().manual_seed(0)).float()
    >>> sorted(set(rounded.tolist())), round(float(rounded.mean()), 3)
    ([1.0, 1.0078125], 1.004)
    """
    assert values.dtype == torch.float32
    bits = torch.randint(_BELOW, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits.add_(values.contiguous().view(torch.int32)).bitwise_and_(-_BELOW)  # carries into the bits that stay
    return bits.view(torch.float32).to(torch.bfloat16)


def rounding_seed(seed: int, step: int, name: str) -> int:
    """Returns the seed for rounding the parameter `name` after optimizer step `step` of a run with `seed`: a resumed
    run draws what the uninterrupted one does.

    >>> rounding_seed(0, 1, "a") == rounding_seed(0, 1, "a"), rounding_seed(0, 1, "a") == rounding_seed(0, 2, "a")
    (True, False)
    """
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
