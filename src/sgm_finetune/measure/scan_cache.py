"""Singular values that were computed once, kept in the cache folder under the content of their matrix.

An interrupted scan continues where it stopped, another estimator or a picture of a scanned model costs no second
decomposition, and a matrix that changed is another matrix.
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
"""Of what is computed: raise it when the same matrix would get other singular values."""


def content_key(matrix: Tensor, purpose: str = "") -> str:
    """32 hexadecimal digits of the matrix's bytes, shape and dtype, and of what is done with it before its scan."""
    digest = xxhash.xxh3_128(f"{_VERSION} {tuple(matrix.shape)} {matrix.dtype} {purpose}".encode())
    digest.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recall(key: str) -> SingularValues | None:
    """The spectrum remembered under `key`; None where there is none, or none that can be read."""
    try:
        with safe_open(_file(key), framework="pt") as stored:
            rows, cols = stored.get_tensor("alive").tolist()
            return SingularValues(stored.get_tensor("values"), (rows, cols))
    except (OSError, SafetensorError, ValueError):
        return None


def remember(key: str, spectrum: SingularValues) -> None:
    """Keeps a spectrum, whole or not at all. A cache folder that cannot be written is not used."""
    with contextlib.suppress(UserError, SafetensorError), whole_file(_file(key)) as scratch:
        save_file({"values": spectrum.values.contiguous(), "alive": torch.tensor(spectrum.alive)}, scratch)


def _file(key: str) -> Path:
    return cache_dir() / "spectra" / key[:2] / f"{key}.safetensors"
