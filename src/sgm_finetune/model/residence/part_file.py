"""One file of a store: the tensors of a block as the processor's kernels read them, mapped and never copied.

It is a safetensors file. Each tensor begins at a multiple of 64 bytes, as an allocated one does: the sums of some
kernels depend on it in their last digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import whole_file

_ALIGNMENT = 64
_FILLER = "~filler."
"""How the names of the tensors begin that only move the next one to a multiple of `_ALIGNMENT` bytes."""
_LARGEST_HEADER = 2**26
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_part(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Writes the tensors, whole or not at all, with the store's `key` and a checksum of their bytes.

    Raises UserError when the file cannot be written.
    """
    header: dict[str, Any] = {}
    pieces: list[Tensor] = []
    at = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: bool(_num_bytes(item[1]) % _ALIGNMENT)):
        if gap := -at % _ALIGNMENT:
            header[f"{_FILLER}{at}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [at, at + gap]}
            pieces.append(torch.zeros(gap, dtype=torch.uint8))
            at += gap
        end = at + _num_bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        pieces.append(tensor.detach().contiguous().reshape(-1).view(torch.uint8))
        at = end
    checksum = xxhash.xxh3_128()
    for piece in pieces:
        checksum.update(piece.numpy().data)
    header["__metadata__"] = {"format": "pt", "store": key, "checksum": checksum.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with whole_file(path) as scratch, scratch.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            file.write(piece.numpy().data)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def map_part(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a file that `write_part` wrote for the store `key`, as views of the mapped file.

    Reads the file once to check it. Raises UserError for one that is damaged or belongs to another store, and where
    the file system cannot map files.
    """
    try:
        with path.open("rb") as file:
            header, begin = _read_header(file)
            metadata = header.pop("__metadata__")
            checksum = hashlib.file_digest(file, xxhash.xxh3_128)  # type: ignore[arg-type]  # of all behind the header
            size = file.tell()
        own, whole = metadata["store"] == key, metadata["checksum"] == checksum.hexdigest()
        places = {name: _place(entry, begin, size) for name, entry in header.items() if not name.startswith(_FILLER)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {path.parent}, and SGM writes it again") from None
    if not own or not whole:
        what = "is damaged: its checksum is another" if own else "belongs to another model"
        raise UserError(f"{path} {what}; delete {path.parent}, and SGM writes it again")
    try:
        storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    except RuntimeError:
        raise UserError(
            f"{path} is on a file system that cannot map files into memory; choose another place with SGM_CACHE, or "
            "model.residence=device"
        ) from None
    return {name: _view(storage, *place) for name, place in places.items()}


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin. Raises ValueError for a file of another kind."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _LARGEST_HEADER:
        raise ValueError("it is no safetensors file")
    return json.loads(file.read(length)), 8 + length


def _place(entry: dict[str, Any], begin: int, size: int) -> tuple[torch.dtype, list[int], int]:
    """The type, shape and first byte of a tensor. Raises ValueError if it does not lie within the file."""
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    fits = last - first == math.prod(shape) * dtype.itemsize and 0 <= first <= last <= size - begin
    if not fits or (begin + first) % dtype.itemsize:
        raise ValueError("a tensor lies outside of it")
    return dtype, shape, begin + first


def _view(storage: torch.UntypedStorage, dtype: torch.dtype, shape: list[int], first: int) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, first // dtype.itemsize, shape)  # type: ignore[call-overload]
