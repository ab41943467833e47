"""A model's weight matrices, read from its files one at a time, without building the model.

Matrices are the two-dimensional `.weight` tensors, torch's fused `in_proj_weight`, and every expert of a
three-dimensional stack; biases, norms and convolutions are not. `quantized.py` and `gguf.py` read quantised matrices,
`fused.py` says where fused ones are cut.
"""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line
from sgm_finetune.base.untrusted import read_json, read_torch, shard_names
from sgm_finetune.model.weights.fused import Cut, cuts
from sgm_finetune.model.weights.gguf import gguf_tensors
from sgm_finetune.model.weights.quantized import read_quantised
from sgm_finetune.model.weights.tensors import FLOATS, Parameter, StoredTensor, plain

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "U8": "uint8", "I8": "int8", "I16": "int16",
    "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64", "BOOL": "bool",
}  # fmt: skip
_UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError,
    OverflowError,
)  # fmt: skip
"""What the libraries raise for a file whose content does not fit its name."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.(?:safetensors|bin|gguf)$")
_STACK = re.compile(r"experts\.|(^|\.)block_sparse_moe\.(input|output)_linear\.weight$")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight$")


@dataclass(frozen=True)
class StoredMatrix:
    """One weight matrix in a model's files, or one part of a fused or stacked one; not yet read."""

    parameter: str
    """The model's name of the parameter, with its `.weight` (GGUF: the file's name)."""
    part: str | None
    """`q`, `k`, `v`, `gate`, `up`, an expert's number `3`, or `3.gate`; None for a whole parameter."""
    shape: tuple[int, int]
    """As stored. For GPTQ and AWQ, which pack columns: as in the model, (outputs, inputs)."""
    file: Path
    dtype: str
    """float64, float32, float16 or bfloat16; or the quantised format: nf4, int8, fp8, gptq-4bit, Q4_K ..."""
    read: Callable[[], Tensor]

    @property
    def name(self) -> str:
        """The parameter's name without `.weight`, and its part: `h.0.attn.c_attn[q]`, `lm_head`,
        `layers.0.mlp.experts.gate_up_proj[3.gate]`."""
        module = self.parameter.removesuffix(".weight")
        return module if self.part is None else f"{module}[{self.part}]"

    @property
    def is_float(self) -> bool:
        """Whether its values are plain floats."""
        return self.dtype in FLOATS

    def load(self) -> Tensor:
        """The matrix (rows, cols) on the CPU.

        Plain floats come as stored, often as a view of the mapped file: do not write to them. Quantised matrices come
        in float32, with no second copy in memory. The values may be infinite or NaN; the scan checks that later, in a
        pass that it makes anyway. Raises UserError when the file is damaged.
        """
        try:
            return self.read()
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise _damaged(self.file, error) from None


def weight_files(model: str | Path) -> list[Path]:
    """The files with a local model's weights, in reading order.

    `model` is a `.safetensors`, `.bin` or `.gguf` file or a folder. In a folder the files are those that Transformers
    reads: `model.safetensors`, else the shards that `model.safetensors.index.json` names, else every `.safetensors`
    file except adapters, else the same for `pytorch_model*.bin`; else its one `.gguf` file, or the shards of one.
    Raises UserError when there are no weights or a shard is missing.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", ".bin", ".gguf"):
            raise UserError(f"{path} is no .safetensors file; give a model folder or a .safetensors or .gguf file")
        return [path]
    if not path.is_dir():
        raise UserError(f"No model folder or .safetensors file {path}; check the path")
    for stem, suffix, pattern in (("model", ".safetensors", "*"), ("pytorch_model", ".bin", "pytorch_model*")):
        if (whole := path / f"{stem}{suffix}").is_file():
            return [whole]
        if (index := path / f"{stem}{suffix}.index.json").is_file():
            return list(dict.fromkeys(_indexed(index).values()))
        if files := [file for file in sorted(path.glob(pattern + suffix)) if not file.name.startswith("adapter_")]:
            _refuse_gaps(files)
            return files
    if files := sorted(path.glob("*.gguf")):
        if len({_SHARD.sub("", file.name) for file in files}) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"{path} holds several GGUF models ({names}); give the path of one of them")
        _refuse_gaps(files)
        return files
    raise UserError(f"{path} holds no weights; expected *.safetensors, pytorch_model*.bin or one *.gguf")


def stored_matrices(model: str | Path, *, split_fused: bool = True) -> list[StoredMatrix]:
    """Every weight matrix of a local model, in the order of its files; this checks all headers and reads nothing large.

    A fused parameter whose layout is known from the `model_type` in config.json is listed part by part, unless
    `split_fused` is off; a stack of experts is always listed one by one. Tied embeddings are listed once. Raises
    UserError for a damaged or truncated file, for a tensor that the index names and its shard lacks, for a name that
    two files share, and for an unknown quantised format (with tensor, dtype and method).
    """
    files = weight_files(model)
    config = _config(files[0].parent)
    if files[0].suffix == ".gguf":
        found = _read_headers(files, gguf_tensors)
        parameters = [parameter for parameter in found.values() if parameter is not None]
    else:
        parameters = _drop_tied_head(_parameters(_tensors(model, files), config), config)
    return [matrix for parameter in parameters for matrix in _matrices(parameter, config, split_fused)]


def stored_tensors(model: str | Path) -> dict[str, StoredTensor]:
    """Name -> tensor, not yet read, of all tensors in a local model's files, also biases and norms, in their order.

    Raises UserError as `stored_matrices` does, and for a GGUF model, whose tensors have other names.
    """
    files = weight_files(model)
    if files[0].suffix == ".gguf":
        raise UserError(f"{files[0]} is a GGUF file; give the .safetensors model that it was made from")
    return _tensors(model, files)


def num_tensors(model: str | Path) -> int:
    """The number of tensors in a local model's files; 0 where it has none that can be read."""
    try:
        return len(
            _read_headers(files := weight_files(model), gguf_tensors if files[0].suffix == ".gguf" else _headers)
        )
    except UserError:
        return 0


def embedding_rows(model: str | Path) -> int | None:
    """The number of rows of the input embedding in a local model's .safetensors files; None where they do not tell."""
    try:
        files = weight_files(model)
        tensors = _read_headers(files, _headers) if files[0].suffix == ".safetensors" else {}
    except UserError:
        return None
    found = [t for name, t in tensors.items() if _INPUT_EMBEDDING.search(name) and t.dtype in FLOATS]
    rows = {tensor.shape[0] for tensor in found if len(tensor.shape) == 2}
    return rows.pop() if len(rows) == 1 else None


def _tensors(model: str | Path, files: list[Path]) -> dict[str, StoredTensor]:
    tensors = _read_headers(files, _headers)
    if Path(model).expanduser().is_dir():
        _check_index(files, tensors)
    return tensors


def _matrices(parameter: Parameter, config: Mapping[str, Any], split_fused: bool) -> Iterator[StoredMatrix]:
    """Yields one matrix per expert and fused part; together they make up the parameter."""
    is_stack = parameter.num_experts is not None
    name, shape = parameter.name, parameter.shape
    found: tuple[Cut | None, ...] = ()
    if split_fused:
        found = cuts(name, shape, config, expert=is_stack, transposed=parameter.transposed)
    for expert in range(parameter.num_experts) if parameter.num_experts is not None else (None,):
        for cut in found or (None,):
            labels = ([str(expert)] if expert is not None else []) + ([cut.name] if cut is not None else [])
            yield StoredMatrix(
                parameter=name,
                part=".".join(labels) or None,
                shape=shape if cut is None else cut.shape(shape),
                file=parameter.file,
                dtype=parameter.dtype,
                read=partial(parameter.read, expert, cut),
            )


def _parameters(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> list[Parameter]:
    """The weight matrices among the tensors, in their order, without those that share memory with an earlier one."""
    quantised = read_quantised(tensors, config)
    found, shared = [], set()
    for name, tensor in tensors.items():
        if name in quantised:
            if _is_matrix(quantised[name].name, 2 if quantised[name].num_experts is None else 3):
                found.append(quantised[name])
        elif tensor.is_float and _is_matrix(name, len(tensor.shape)):
            if tensor.memory is None or tensor.memory not in shared:
                found.append(plain(tensor))
            shared.add(tensor.memory)
    return found


def _is_matrix(name: str, num_dimensions: int) -> bool:
    if num_dimensions == 3:
        return bool(_STACK.search(name))
    return num_dimensions == 2 and (name.endswith(".weight") or name.rpartition(".")[2] == "in_proj_weight")


def _drop_tied_head(parameters: list[Parameter], config: Mapping[str, Any]) -> list[Parameter]:
    """The parameters without an output head of the input embedding's shape, if config.json ties the two."""
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if not config.get("tie_word_embeddings", inner):
        return parameters
    embedding = next((p for p in parameters if _INPUT_EMBEDDING.search(p.name)), None)
    if embedding is None:
        return parameters
    return [p for p in parameters if not (_leaf(p) == "lm_head" and p.shape == embedding.shape)]


def _leaf(parameter: Parameter) -> str:
    return parameter.name.removesuffix(".weight").rpartition(".")[2]


def _config(folder: Path) -> Mapping[str, Any]:
    """The folder's config.json; {} without one."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return config if isinstance(config, dict) else {}


def _read_headers(files: list[Path], read: Callable[[Path], Iterable[tuple[str, Any]]]) -> dict[str, Any]:
    """Name -> what `read` yields for the files, in their order.

    Raises UserError when two files share a name, and when a file is damaged.
    """
    found: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for file in files:
        try:
            for name, value in read(file):
                if name in found:
                    raise UserError(
                        f"{name} is in {places[name].name} and in {file.name}; keep the files of one model only"
                    )
                found[name], places[name] = value, file
        except _UNREADABLE as error:
            raise _damaged(file, error) from None
    return found


def _check_index(files: list[Path], tensors: Mapping[str, StoredTensor]) -> None:
    """Raises UserError when the index of shards names a tensor that its shard lacks."""
    index = files[0].parent / ("model.safetensors.index.json" if files[0].suffix == ".safetensors" else "")
    if len(files) > 1 and index.is_file():
        for name, file in _indexed(index).items():
            if name not in tensors or tensors[name].file != file:
                raise UserError(f"{index.name} places {name} in {file.name}, which lacks it; download the model again")


def _indexed(index: Path) -> dict[str, Path]:
    """Tensor name -> shard. Raises UserError when a shard is missing."""
    files = {name: index.parent / shard for name, shard in shard_names(index).items()}
    for file in dict.fromkeys(files.values()):
        if not file.is_file():
            raise UserError(f"{index.name} names {file.name}, which is missing from {index.parent}; download it again")
    if not files:
        raise UserError(f"{index} names no weights; download the model again")
    return files


def _refuse_gaps(files: list[Path]) -> None:
    """Raises UserError when names such as model-00002-of-00003.safetensors imply files that are missing."""
    names = {file.name for file in files}
    for file in files:
        if match := _SHARD.search(file.name):
            number, total = match.groups()
            for expected in range(1, int(total) + 1):
                other = f"{file.name[: match.start(1)]}{expected:0{len(number)}d}{file.name[match.end(1) :]}"
                if other not in names:
                    raise UserError(f"{other} is missing from {file.parent}; download it again")


def _headers(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yields (name, tensor) for every tensor in a file."""
    if file.suffix == ".bin":
        yield from _checkpoint_tensors(file)
        return
    mapped = _Mapped(file)
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 -- not a mapping
            header = tensors.get_slice(name)
            code = str(header.get_dtype())
            shape, dtype = tuple(header.get_shape()), _DTYPES.get(code, code)
            yield name, StoredTensor(name, file, shape, dtype, partial(mapped.read, name))


class _Mapped:
    """A .safetensors file that stays mapped until KEPT bytes of it were read.

    Pages that were read stay in memory as long as the file is mapped. To map it again takes as long as its header: with
    100,000 small tensors, a tenth of a second.
    """

    def __init__(self, file: Path):
        self._file = file
        self._open: Any = None
        self._left = 0
        self._lock = threading.Lock()  # the scan reads in several threads

    def read(self, name: str, index: int | None) -> Tensor:
        """One tensor, or one index of its first dimension."""
        with self._lock:
            if self._open is None:
                self._open, self._left = safe_open(self._file, framework="pt"), KEPT
            tensor = self._open.get_tensor(name) if index is None else self._open.get_slice(name)[index]
            self._left -= tensor.nbytes
            if self._left <= 0:
                self._open = None
            return tensor


KEPT = 2**24


def _checkpoint_tensors(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yields (name, tensor) for a torch checkpoint, mapped into memory (a file in an old format is read whole)."""
    state = read_torch(file, mmap=True)
    if not isinstance(state, dict):
        raise UserError(f"{file} holds a {type(state).__name__}, not a model's named tensors")
    for name, tensor in state.items():
        if isinstance(tensor, Tensor):
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else None
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield name, StoredTensor(name, file, tuple(tensor.shape), dtype, partial(_index, tensor.detach()), memory)


def _index(tensor: Tensor, index: int | None) -> Tensor:
    return tensor if index is None else tensor[index]


def _damaged(file: Path, error: Exception) -> UserError:
    """The error for a file that cannot be read, with the library's reason on one line."""
    reason = first_line(error)
    return UserError(f"{file} is damaged or cut short ({reason}); copy or download it again")
