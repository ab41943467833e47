"""Quantised checkpoints: which tensors of the files are one weight matrix, and the float32 values they stand for.

A format is recognised by the companions of a tensor (`x.weight.absmax`, `x.scales` ...), checked against their shapes
before anything large is read. Each has one function `_<format>(...) -> Parameter`, whose inner `open` prepares the
companions and returns `rows(start, stop)`, the matrix's rows in float32; `assembled` asks for a few rows at a time, so
that no second copy of a matrix is ever in memory. `o` outputs, `i` inputs, `g` groups of inputs that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import parse_json
from sgm_finetune.model.weights.fused import Cut

FLOATS = ("float64", "float32", "float16", "bfloat16")
CHUNK = 2**22
"""Elements that are dequantised at a time."""

Rows = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file, not yet read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """Torch's name of it."""
    read: Callable[[int | None], Tensor]
    """The tensor, or one index of its first dimension."""
    memory: Any = None
    """Equal for tensors that are one in memory (torch checkpoints only)."""

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def get(self) -> Tensor:
        return self.read(None)


@dataclass(frozen=True)
class Parameter:
    """A weight matrix of the model, or a stack of one per expert."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, int]
    num_experts: int | None
    read: Callable[[int | None, Cut | None], Tensor]
    """(expert, part) -> matrix on the CPU."""
    transposed: bool = False
    """The file is known to hold the transpose of the model's matrix."""


def assembled(shape: tuple[int, int], rows: Rows, cut: Cut | None) -> Tensor:
    """The matrix, or one part of it, in float32, from a few rows at a time."""
    result = torch.empty(shape if cut is None else cut.shape(shape))
    step, done = max(1, CHUNK // max(shape[1], 1)), 0
    for begin, end in [(0, shape[0])] if cut is None else cut.row_ranges(shape[0]):
        for start in range(begin, end, step):
            chunk = rows(start, min(start + step, end))
            result[done : done + len(chunk)] = chunk if cut is None or cut.axis == 0 else cut.of(chunk)
            done += len(chunk)
    return result


def read_quantised(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Parameter]:
    """Name of the tensor that holds the packed values -> parameter, for every quantised matrix of a model.

    `tensors` are all that the files hold, `config` is config.json. Raises UserError for companions that are missing or
    do not fit, and for whatever is stored in a quantised format that is not known here.
    """
    settings = quantisation(config)
    found: dict[str, Parameter] = {}
    claimed: set[str] = set()
    for name, tensor in tensors.items():
        for recognise in _FORMATS:
            companions = _Companions(tensor, tensors, settings)
            if (parameter := recognise(tensor, companions)) is not None:
                found[name] = parameter
                claimed |= {name, *companions.used}
                break
    for name, tensor in tensors.items():
        if name not in claimed and _is_packed(tensor, bool(settings)):
            method = settings.get("quant_method") or "none named in config.json"
            raise UserError(
                f"{name} in {tensor.file} is stored as {tensor.dtype} (quantization method: {method}), a format that "
                "cannot be read here; take the unquantised model"
            )
    return found


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of config.json, which multimodal models keep inside `text_config`; {} without one."""
    for described in (config, config.get("text_config")):
        if isinstance(described, Mapping):
            for key in ("quantization_config", "compression_config"):
                if isinstance(described.get(key), Mapping):
                    return described[key]
    return {}


def _is_packed(tensor: StoredTensor, quantised_model: bool) -> bool:
    """Values that only a quantised format's reader understands; index buffers and masks are not."""
    if tensor.is_float or len(tensor.shape) < 2 or tensor.dtype in ("int64", "bool", "complex64"):
        return False
    if quantised_model and not tensor.name.endswith((".bias", "mask")):
        return True
    return tensor.name.endswith((".weight", ".qweight", ".weight_packed", "_blocks"))


class _Companions:
    """Looks up what belongs to one packed tensor, checks its shape, and keeps the names that were used."""

    def __init__(self, tensor: StoredTensor, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]):
        self.tensor, self.tensors, self.settings = tensor, tensors, settings
        self.used: set[str] = set()

    def find(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor | None:
        found = self.tensors.get(name)
        if found is not None:
            self.used.add(name)
            if shapes and found.shape not in shapes:
                raise self.misfit(f"{name} has shape {list(found.shape)}, expected {list(shapes[0])}")
        return found

    def need(self, name: str, *shapes: tuple[int, ...]) -> StoredTensor:
        found = self.find(name, *shapes)
        if found is None:
            raise self.misfit(f"{name} is missing")
        return found

    def misfit(self, what: str) -> UserError:
        return UserError(
            f"{self.tensor.name} in {self.tensor.file} cannot be dequantised: {what}; copy or download it again"
        )


# bitsandbytes


def _bnb_4bit(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """nf4, fp4: two values per byte, a scale (`absmax`) per block of values in reading order; the scales may be
    quantised once more (`nested_*`). The packed bytes may be stored under any dtype."""
    name = tensor.name
    for kind in ("nf4", "fp4"):
        if packed_state := companions.find(f"{name}.quant_state.bitsandbytes__{kind}"):
            break
    else:
        return None
    try:
        state = parse_json(bytes(packed_state.get().tolist()).decode())
        (rows, cols), block = state["shape"], int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise companions.misfit(f"its quant_state is unreadable ({error})") from None
    num_blocks = -(-rows * cols // block)
    stats = {
        "absmax": companions.need(f"{name}.absmax", (num_blocks,)),
        "quant_map": companions.need(f"{name}.quant_map"),
    }
    for key in ("nested_absmax", "nested_quant_map"):
        if "nested_offset" in state:
            stats[key] = companions.need(f"{name}.{key}")
    if _num_bytes(tensor) != -(-rows * cols // 2):
        raise companions.misfit(
            f"it holds {_num_bytes(tensor)} bytes, {rows} x {cols} values need {-(-rows * cols // 2)}"
        )

    def read(expert: int | None, cut: Cut | None) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        whole = QuantState.from_dict(
            {key: stat.get() for key, stat in stats.items()} | {packed_state.name: packed_state.get().clone()},
            device=torch.device("cpu"),
        )
        scales = whole.absmax
        if whole.state2 is not None and whole.offset is not None:
            scales = dequantize_blockwise(whole.absmax, whole.state2) + whole.offset
        scales = scales.float()
        packed = tensor.get().view(torch.uint8).flatten()

        def chunk(start: int, stop: int) -> Tensor:
            """Whole blocks around the rows, then what is asked for of them."""
            first, last = start * cols // block, -(-stop * cols // block)
            begin, end = first * block, min(last * block, rows * cols)
            state = QuantState(scales[first:last], (end - begin,), whole.code, block, kind, torch.float32)
            values = dequantize_4bit(packed[begin // 2 : -(-end // 2)].unsqueeze(1), state)
            return values.flatten()[start * cols - begin : stop * cols - begin].view(stop - start, cols)

        return assembled((rows, cols), chunk, cut)

    return Parameter(name, tensor.file, kind, (rows, cols), None, read)


def _bnb_int8(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """int8 times SCB/127 of its row (o)."""
    scale_name = f"{tensor.name.removesuffix('.weight')}.SCB"
    if tensor.dtype != "int8" or len(tensor.shape) != 2 or scale_name not in companions.tensors:
        return None
    o, i = tensor.shape
    scb = companions.need(scale_name, (o,), (o, 1))
    layout = companions.find(f"{tensor.name.removesuffix('.weight')}.weight_format")
    if layout is not None and bool(layout.get().any()):
        raise companions.misfit("its rows are reordered for one kind of GPU (weight_format)")

    def open_(expert: int | None) -> Rows:
        values, scale = tensor.get(), scb.get().float().view(o, 1) / 127
        return lambda start, stop: values[start:stop].float() * scale[start:stop]

    return _in_chunks(tensor, "int8", (o, i), open_)


# One scale, or a grid of scales, beside 8-bit values


def _scaled(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """fp8 (`weight_scale`, `weight_scale_inv`; both multiply) and compressed-tensors' int8: values times scales, one
    for all, per row, per column, or per block of rows and columns. Also of expert stacks (experts, rows, cols).

    The scales are (rows of blocks, columns of blocks), E8M0 ones powers of two stored as their exponents.
    """
    is_fp8 = tensor.dtype in ("float8_e4m3fn", "float8_e5m2")
    if len(tensor.shape) not in (2, 3) or not (is_fp8 or tensor.dtype == "int8"):
        return None
    stored = companions.find(f"{tensor.name}_scale_inv") or companions.find(f"{tensor.name}_scale")
    if stored is None:
        if is_fp8 and companions.settings:
            raise companions.misfit(f"{tensor.name}_scale is missing")
        if not is_fp8:
            return None
    rows, cols = tensor.shape[-2:]
    num_experts = tensor.shape[0] if len(tensor.shape) == 3 else None
    grid = _grid(stored.shape if stored else (), (rows, cols), num_experts, companions)
    zero = companions.find(f"{tensor.name}_zero_point", stored.shape) if stored else None

    def open_(expert: int | None) -> Rows:
        values = tensor.read(expert)
        scale = _exponents(stored.get()) if stored else torch.ones(1)
        shift = zero.get().float() if zero else torch.zeros_like(scale)
        if expert is not None and scale.numel() > 1:
            scale, shift = scale[expert], shift[expert]
        scale, shift = scale.view(grid.shape), shift.view(grid.shape)
        columns = torch.arange(cols) // grid.block[1]

        def chunk(start: int, stop: int) -> Tensor:
            line = torch.arange(start, stop) // grid.block[0]
            wide = values[start:stop].float()
            if zero is not None:
                wide -= shift[line][:, columns] if grid.shape[1] > 1 else shift[line]
            return wide.mul_(scale[line][:, columns] if grid.shape[1] > 1 else scale[line])

        return chunk

    return _in_chunks(tensor, "fp8" if is_fp8 else "int8", (rows, cols), open_, num_experts)


@dataclass(frozen=True)
class _Grid:
    shape: tuple[int, int]
    block: tuple[int, int]


def _grid(scale: tuple[int, ...], shape: tuple[int, int], num_experts: int | None, companions: _Companions) -> _Grid:
    """How many scales a matrix has along its rows and columns, and how many rows and columns each is for."""
    counts = scale
    if num_experts is not None and scale and scale[0] == num_experts:
        counts = scale[1:]
    if all(size == 1 for size in counts):
        return _Grid((1, 1), shape)
    counts = counts if len(counts) == 2 else (*counts, 1)
    block = [
        _block(count, size, wanted) for count, size, wanted in zip(counts, shape, _block_size(companions), strict=False)
    ]
    if len(counts) != 2 or 0 in block or (num_experts is not None and scale[0] != num_experts):
        raise companions.misfit(f"scales of shape {list(scale)} do not fit a matrix of {shape[0]} x {shape[1]}")
    return _Grid((counts[0], counts[1]), (block[0], block[1]))


def _block(count: int, size: int, wanted: int) -> int:
    """How many of `size` rows share one of `count` scales; `wanted` where it fits (the last block may be smaller)."""
    if count > 1 and wanted and -(-size // wanted) == count:
        return wanted
    return size // count if count and size % count == 0 else 0


def _block_size(companions: _Companions) -> tuple[int, int]:
    """Rows and columns of a block of fp8 values: as config.json says, else 128 x 128; (0, 0) of integers."""
    groups = companions.settings.get("config_groups")
    structures = [
        (group.get("weights") or {}).get("block_structure")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping)
    ]
    for size in (companions.settings.get("weight_block_size"), *structures):
        if isinstance(size, list) and len(size) == 2:
            return int(size[0]), int(size[1])
    return (0, 0) if companions.tensor.dtype == "int8" else (128, 128)


def _exponents(scale: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents: 2^(byte - 127)."""
    return torch.ldexp(torch.ones(scale.shape), scale.int() - 127) if scale.dtype == torch.uint8 else scale.float()


def _in_chunks(
    tensor: StoredTensor,
    dtype: str,
    shape: tuple[int, int],
    open_: Callable[[int | None], Rows],
    num_experts: int | None = None,
    name: str | None = None,
    transposed: bool = False,
) -> Parameter:
    def read(expert: int | None, cut: Cut | None) -> Tensor:
        return assembled(shape, open_(expert), cut)

    return Parameter(name or tensor.name, tensor.file, dtype, shape, num_experts, read, transposed)


# Several small integers in one int32


def _unpack(packed: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The integers of every int32 along `dim`, lowest bits first (or `order`: place of each in the word), as uint8.

    >>> _unpack(torch.tensor([[0x21]], dtype=torch.int32), bits=4, dim=1).tolist()
    [[1, 2, 0, 0, 0, 0, 0, 0]]
    """
    slots = order or tuple(range(32 // bits))
    parts = [((packed >> (bits * slot)) & (2**bits - 1)).to(torch.uint8) for slot in slots]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def _gptq(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """GPTQ: qweight (i/p, o), qzeros (g, o/p), scales (g, o), g_idx (i), p integers per int32.

    w[o, i] = (q - z) scale, with z and scale of the group of i. Files of the usual version hold z - 1.
    """
    if not tensor.name.endswith(".qweight") or tensor.dtype != "int32" or len(tensor.shape) != 2:
        return None
    base = tensor.name.removesuffix(".qweight")
    scales, zeros = companions.need(f"{base}.scales"), companions.need(f"{base}.qzeros")
    if len(scales.shape) != 2 or len(zeros.shape) != 2 or scales.shape[1] != tensor.shape[1]:
        return None
    g, o = scales.shape
    bits = 32 * zeros.shape[1] // o if o else 0
    version = companions.settings.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8) or companions.settings.get("bits", bits) != bits or version not in ("gptq", "gptq_v2"):
        raise UserError(
            f"{tensor.name} in {tensor.file} is GPTQ of {companions.settings.get('bits', bits)} bits in the format "
            f"{version}; 2, 4 and 8 bits in the formats gptq and gptq_v2 can be read; take the unquantised model"
        )
    i = tensor.shape[0] * 32 // bits
    companions.need(f"{base}.qzeros", (g, o * bits // 32))
    groups = companions.find(f"{base}.g_idx", (i,))
    offset = 1 if version == "gptq" else 0

    def open_(expert: int | None) -> Rows:
        packed, scale, zero = tensor.get(), scales.get(), zeros.get()
        group = groups.get().long() if groups else torch.arange(i) // -(-i // g)
        if int(group.min()) < 0 or int(group.max()) >= g:
            raise ValueError(f"{base}.g_idx names a group beyond {g}")
        shift = (_unpack(zero, bits, 1).short() + offset) & (2**bits - 1)

        def chunk(start: int, stop: int) -> Tensor:
            values = _unpack(packed[:, start:stop], bits, 0).float()
            values -= shift[:, start:stop].float()[group]
            return values.mul_(scale[:, start:stop].float()[group]).T

        return chunk

    return _in_chunks(tensor, f"gptq-{bits}bit", (o, i), open_, name=f"{base}.weight")


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in the int32 of the eight columns that it holds."""


def _awq(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """AWQ in gemm order: qweight (i, o/8), qzeros (g, o/8), scales (g, o); w[o, i] = (q - z) scale."""
    if not tensor.name.endswith(".qweight") or tensor.dtype != "int32" or len(tensor.shape) != 2:
        return None
    base, (i, words) = tensor.name.removesuffix(".qweight"), tensor.shape
    scales = companions.need(f"{base}.scales")
    if len(scales.shape) != 2 or scales.shape[1] != 8 * words or companions.settings.get("version", "gemm") != "gemm":
        return None
    g, o = scales.shape
    zeros = companions.need(f"{base}.qzeros", (g, words))

    def open_(expert: int | None) -> Rows:
        packed, scale, zero = tensor.get(), scales.get(), zeros.get()
        group = torch.arange(i) // -(-i // g)

        def chunk(start: int, stop: int) -> Tensor:
            words, inside = slice(start // 8, -(-stop // 8)), slice(start % 8, start % 8 + stop - start)
            values = _unpack(packed[:, words], 4, 1, _AWQ_ORDER)[:, inside].float()
            values -= _unpack(zero[:, words], 4, 1, _AWQ_ORDER)[:, inside].float()[group]
            return values.mul_(scale[:, start:stop].float()[group]).T

        return chunk

    return _in_chunks(tensor, "awq-4bit", (o, i), open_, name=f"{base}.weight")


def _compressed(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """compressed-tensors' packed integers: weight_packed (o, i/p), weight_scale (o, g), weight_shape (o, i).

    w = (q - 2^(bits-1)) scale of the group; with weight_zero_point (o/p, g) that is what is subtracted, and
    weight_g_idx (i) names the group of each input.
    """
    if not tensor.name.endswith(".weight_packed") or tensor.dtype != "int32" or len(tensor.shape) != 2:
        return None
    base = tensor.name.removesuffix("_packed")
    o, i = (int(size) for size in companions.need(f"{base}_shape", (2,)).get())
    bits = next((bits for bits in (4, 8) if tensor.shape == (o, -(-i * bits // 32))), 0)
    scales = companions.need(f"{base}_scale")
    if not bits or len(scales.shape) != 2 or scales.shape[0] != o or not scales.shape[1]:
        raise companions.misfit(f"{o} x {i} values of 4 or 8 bits do not fit its shape {list(tensor.shape)}")
    g = scales.shape[1]
    zeros = companions.find(f"{base}_zero_point", (-(-o * bits // 32), g))
    groups = companions.find(f"{base}_g_idx", (i,))

    def open_(expert: int | None) -> Rows:
        packed, scale = tensor.get(), scales.get()
        zero = _unpack(zeros.get(), bits, 0)[:o] if zeros else torch.full((o, g), 2 ** (bits - 1))
        group = groups.get().long() if groups else torch.arange(i) // -(-i // g)
        if int(group.min()) < 0 or int(group.max()) >= g:
            raise ValueError(f"{base}_g_idx names a group beyond {g}")

        def chunk(start: int, stop: int) -> Tensor:
            values = _unpack(packed[start:stop], bits, 1)[:, :i].float()
            values -= zero[start:stop].float()[:, group]
            return values.mul_(scale[start:stop].float()[:, group])

        return chunk

    return _in_chunks(tensor, f"int{bits}", (o, i), open_, name=base)


# Four-bit floats


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _mxfp4(tensor: StoredTensor, companions: _Companions) -> Parameter | None:
    """gpt-oss' experts: blocks (experts, o, g, 16), two E2M1 floats per byte, low bits first, times 2^(scale - 127),
    scales (experts, o, g). Listed as stored, (o, i): the model holds the transpose."""
    if not tensor.name.endswith("_blocks") or tensor.dtype != "uint8" or len(tensor.shape) != 4:
        return None
    base = tensor.name.removesuffix("_blocks")
    num_experts, o, g, width = tensor.shape
    scales = companions.need(f"{base}_scales", (num_experts, o, g))

    def open_(expert: int | None) -> Rows:
        blocks, exponents, table = tensor.read(expert), scales.read(expert), torch.tensor(_FP4)

        def chunk(start: int, stop: int) -> Tensor:
            packed = blocks[start:stop]
            values = table[torch.stack((packed & 15, packed >> 4), -1).int()]
            return values.flatten(2).mul_(_exponents(exponents[start:stop]).unsqueeze(-1)).flatten(1)

        return chunk

    return _in_chunks(tensor, "mxfp4", (o, 2 * g * width), open_, num_experts, base, transposed=True)


_FORMATS = (_bnb_4bit, _bnb_int8, _scaled, _gptq, _awq, _compressed, _mxfp4)


def _num_bytes(tensor: StoredTensor) -> int:
    return torch.Size(tensor.shape).numel() * getattr(torch, tensor.dtype).itemsize


# Plain floats


def plain(tensor: StoredTensor) -> Parameter:
    """A float matrix (rows, cols), or a stack of them (experts, rows, cols), read as stored."""

    def read(expert: int | None, cut: Cut | None) -> Tensor:
        matrix = tensor.read(expert)
        return matrix if cut is None else cut.of(matrix)

    rows, cols = tensor.shape[-2:]
    num_experts = tensor.shape[0] if len(tensor.shape) == 3 else None
    return Parameter(tensor.name, tensor.file, tensor.dtype, (rows, cols), num_experts, read)
