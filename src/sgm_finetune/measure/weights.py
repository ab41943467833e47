"""Reading a model's weight matrices from its files, one in memory at a time; no model is built.

Only two-dimensional tensors are weight matrices here: biases, norms, convolutions and fused (three-dimensional) expert
tensors are skipped.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgm_finetune.errors import UserError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.(?:safetensors|bin)$")


@dataclass(frozen=True)
class StoredMatrix:
    """One two-dimensional tensor of a weight file, not yet read."""

    name: str
    """Name of the parameter, as in the file."""
    shape: tuple[int, int]
    file: Path
    dtype: str
    """As stored: float64, float32, float16 or bfloat16; anything else is a quantised format and cannot be read."""
    read: Callable[[], Tensor]

    @property
    def is_float(self) -> bool:
        return self.dtype in ("float64", "float32", "float16", "bfloat16")

    def load(self) -> Tensor:
        """The matrix, as stored, on the CPU. Raises UserError where it is quantised or not finite."""
        if not self.is_float:
            raise UserError(
                f"{self.name} in {self.file} is stored as {self.dtype}; a quantised matrix has no spectrum of its own, "
                "take the unquantised model"
            )
        try:
            matrix = self.read()
        except (SafetensorError, OSError) as error:
            raise _damaged(self.file, error) from None
        num_wrong = int(matrix.numel() - torch.isfinite(matrix).sum())
        if num_wrong:
            raise UserError(
                f"{self.name} in {self.file} has {num_wrong} of {matrix.numel()} values that are infinite or not a "
                "number; the weights are damaged, take another checkpoint"
            )
        return matrix


def weight_files(model: str | Path) -> list[Path]:
    """The files that hold a local model's weights, in reading order.

    `model` is a `.safetensors` file or a folder. A folder is read as Transformers reads it: `model.safetensors`, else
    the shards named by `model.safetensors.index.json`, else every `.safetensors` file (adapters aside), else the same
    for `pytorch_model*.bin`. Raises UserError where there is none or a shard is missing.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin"):
            raise UserError(f"{path} is no .safetensors file; give a model folder or a .safetensors file")
        return [path]
    if not path.is_dir():
        raise UserError(f"No model folder or .safetensors file {path}")
    for stem, suffix, pattern in (("model", ".safetensors", "*"), ("pytorch_model", ".bin", "pytorch_model*")):
        if (whole := path / f"{stem}{suffix}").is_file():
            return [whole]
        if (index := path / f"{stem}{suffix}.index.json").is_file():
            return list(dict.fromkeys(_indexed(index).values()))
        if files := [file for file in sorted(path.glob(pattern + suffix)) if not file.name.startswith("adapter_")]:
            _refuse_gaps(files)
            return files
    raise UserError(f"{path} holds no weights; expected *.safetensors or pytorch_model*.bin")


def stored_matrices(model: str | Path) -> list[StoredMatrix]:
    """Every matrix of a local model, unread, in the order of its files; all headers are checked before this returns.

    Raises UserError for a damaged or truncated file, for a tensor that the index promises and its shard lacks, and for
    a name that two files share.
    """
    files = weight_files(model)
    found: dict[str, StoredMatrix] = {}
    seen: dict[str, Path] = {}
    for file in files:
        for name, matrix in _headers(file):
            if name in seen:
                raise UserError(f"{name} is in {seen[name].name} and in {file.name}; keep the files of one model only")
            seen[name] = file
            if matrix is not None:
                found[name] = matrix
    index = files[0].parent / ("model.safetensors.index.json" if files[0].suffix == ".safetensors" else "")
    if Path(model).expanduser().is_dir() and len(files) > 1 and index.is_file():
        for name, file in _indexed(index).items():
            if seen.get(name) != file:
                raise UserError(f"{index.name} places {name} in {file.name}, which lacks it; download the model again")
    return list(found.values())


def _indexed(index: Path) -> dict[str, Path]:
    """Tensor name -> shard, every shard present."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / shard for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, error) from None
    for file in dict.fromkeys(files.values()):
        if not file.is_file():
            raise UserError(f"{index.name} names {file.name}, which is missing from {index.parent}; download it again")
    if not files:
        raise UserError(f"{index} names no weights; download the model again")
    return files


def _refuse_gaps(files: list[Path]) -> None:
    """UserError where names such as model-00002-of-00003.safetensors announce files that are not there."""
    names = {file.name for file in files}
    for file in files:
        if match := _SHARD.search(file.name):
            number, total = match.groups()
            for expected in range(1, int(total) + 1):
                other = f"{file.name[: match.start(1)]}{expected:0{len(number)}d}{file.name[match.end(1) :]}"
                if other not in names:
                    raise UserError(f"{other} is missing from {file.parent}; download it again")


def _headers(file: Path) -> Iterator[tuple[str, StoredMatrix | None]]:
    """(name, matrix) of every tensor in a file; None where it is not two-dimensional."""
    try:
        if file.suffix == ".bin":
            yield from _pickled(file)
            return
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 -- not a mapping
                header = tensors.get_slice(name)
                shape, code = tuple(header.get_shape()), header.get_dtype()
                dtype = str(_FLOATS.get(code, code)).removeprefix("torch.")
                if len(shape) == 2:
                    yield name, StoredMatrix(name, shape, file, dtype, partial(_read, file, name))
                else:
                    yield name, None
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(file, error) from None


def _read(file: Path, name: str) -> Tensor:
    """One tensor; the file is mapped only meanwhile, so that what was read does not stay in memory."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _pickled(file: Path) -> Iterator[tuple[str, StoredMatrix | None]]:
    """As `_headers` of a torch checkpoint: its tensors are mapped and read when touched (old formats: read whole)."""
    with open(file, "rb") as opened:
        is_zip = opened.read(2) == b"PK"
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(state, dict):
        raise UserError(f"{file} holds a {type(state).__name__}, not a model's named tensors")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.ndim == 2:
            rows, cols = tensor.shape
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield name, StoredMatrix(name, (rows, cols), file, dtype, partial(tensor.detach))
        else:
            yield str(name), None


def _damaged(file: Path, error: Exception) -> UserError:
    """The error of a file that cannot be read, with the library's reason on one line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    return UserError(f"{file} is damaged or cut short ({reason}); copy or download it again")
