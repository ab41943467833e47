"""The cache of singular values: files in the cache folder, under the content of their matrix.

With it an interrupted scan resumes where it stopped, and another estimator or a picture of a scanned model needs no
second decomposition. A matrix that changes has another key.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import whole_file
from sgm_finetune.method.singular_values import SingularValues
from sgm_finetune.model.folder import cache_dir

_VERSION = 2
"""Raise it when the same matrix would get other singular values."""


def content_key(matrix: Tensor, purpose: str = "") -> str:
    """The cache's key: 32 hexadecimal digits of the matrix's bytes, shape and dtype and of the scan's `purpose`."""
    digest = xxhash.xxh3_128(f"{_VERSION} {tuple(matrix.shape)} {matrix.dtype} {purpose}".encode())
    digest.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recall(key: str) -> SingularValues | None:
    """The cached spectrum; None when the cache has none under `key`, or cannot read it."""
    try:
        with safe_open(_file(key), framework="pt") as stored:
            rows, cols = stored.get_tensor("alive").tolist()
            return SingularValues(stored.get_tensor("values"), (rows, cols))
    except (OSError, SafetensorError, ValueError):
        return None


def remember(key: str, spectrum: SingularValues) -> None:
    """Writes a spectrum into the cache, whole or not at all. Does nothing when the cache folder cannot be written."""
    with contextlib.suppress(UserError, SafetensorError), whole_file(_file(key)) as scratch:
        save_file({"values": spectrum.values.contiguous(), "alive": torch.tensor(spectrum.alive)}, scratch)


def _file(key: str) -> Path:
    return cache_dir() / "spectra" / key[:2] / f"{key}.safetensors"
