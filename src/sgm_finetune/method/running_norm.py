"""Clipping by a running norm, for gradients that exist one after another (docs/method.md section 9.1)."""

from __future__ import annotations

from torch import Tensor


def running_norm(newest: Tensor, num_now: int, is_first: bool) -> Tensor:
    """Returns an estimate of the norm of the whole gradient while only a part of it has been computed (eq. 21): ().

    `newest` (n,) holds the squared norm of each tensor's newest gradient, of this step or of the step before; `num_now`
    of them are of this step. In the first step (`is_first`) the others are 0, and count as much as those of this step
    do on average.

    >>> import torch
    >>> running_norm(torch.tensor([9.0, 16.0]), 1, False), running_norm(torch.tensor([0.0, 16.0, 0.0, 0.0]), 1, True)
    (tensor(5.), tensor(8.))
    """
    total = newest.sum()
    return (total * (len(newest) / num_now) if is_first else total).sqrt()


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Returns the factor by which a gradient of `norm` is multiplied so that its norm is at most `limit`: ().

    >>> import torch
    >>> clip_factor(torch.tensor([4.0, 0.5, 0.0]), limit=1.0)
    tensor([0.2500, 1.0000, 1.0000])
    """
    return (limit / norm).clamp(max=1.0)
