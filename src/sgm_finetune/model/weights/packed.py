"""Weights with several small integers in one int32: GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_finetune.base.errors import UserError
from sgm_finetune.model.weights.companions import Companions
from sgm_finetune.model.weights.tensors import Parameter, Rows, StoredTensor, parameter_of_rows


def _unpack(packed: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The integers in every int32, unpacked along `dim`, as uint8.

    The lowest bits come first, unless `order` gives the position of each integer in the int32.

    >>> _unpack(torch.tensor([[0x21]], dtype=torch.int32), bits=4, dim=1).tolist()
    [[1, 2, 0, 0, 0, 0, 0, 0]]
    """
    slots = order or tuple(range(32 // bits))
    parts = [((packed >> (bits * slot)) & (2**bits - 1)).to(torch.uint8) for slot in slots]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def gptq(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """GPTQ: qweight (i/p, o), qzeros (g, o/p), scales (g, o), g_idx (i), with p integers per int32.

    w[o, i] = (q - z) scale, with z and scale of the group of i. Files in the format `gptq` hold z - 1, those in
    `gptq_v2` hold z.
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
            f"{version}; 2, 4 and 8 bits in the formats gptq and gptq_v2 can be read; use the unquantised model"
        )
    i = tensor.shape[0] * 32 // bits
    companions.need(f"{base}.qzeros", (g, o * bits // 32))
    groups = companions.find(f"{base}.g_idx", (i,))
    offset = 1 if version == "gptq" else 0

    def prepare(expert: int | None) -> Rows:
        packed, scale, zero = tensor.get(), scales.get(), zeros.get()
        group = groups.get().long() if groups else torch.arange(i) // -(-i // g)
        if int(group.min()) < 0 or int(group.max()) >= g:
            raise ValueError(f"{base}.g_idx names a group beyond the {g} that there are")
        shift = (_unpack(zero, bits, 1).short() + offset) & (2**bits - 1)

        def chunk(start: int, stop: int) -> Tensor:
            values = _unpack(packed[:, start:stop], bits, 0).float()
            values -= shift[:, start:stop].float()[group]
            return values.mul_(scale[:, start:stop].float()[group]).T

        return chunk

    return parameter_of_rows(tensor, f"gptq-{bits}bit", (o, i), prepare, name=f"{base}.weight")


_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Position of each of eight columns in its int32."""


def awq(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """AWQ in gemm order: qweight (i, o/8), qzeros (g, o/8), scales (g, o); w[o, i] = (q - z) scale."""
    if not tensor.name.endswith(".qweight") or tensor.dtype != "int32" or len(tensor.shape) != 2:
        return None
    base, (i, words) = tensor.name.removesuffix(".qweight"), tensor.shape
    scales = companions.need(f"{base}.scales")
    if len(scales.shape) != 2 or scales.shape[1] != 8 * words or companions.settings.get("version", "gemm") != "gemm":
        return None
    g, o = scales.shape
    zeros = companions.need(f"{base}.qzeros", (g, words))

    def prepare(expert: int | None) -> Rows:
        packed, scale, zero = tensor.get(), scales.get(), zeros.get()
        group = torch.arange(i) // -(-i // g)

        def chunk(start: int, stop: int) -> Tensor:
            words, inside = slice(start // 8, -(-stop // 8)), slice(start % 8, start % 8 + stop - start)
            values = _unpack(packed[:, words], 4, 1, _AWQ_ORDER)[:, inside].float()
            values -= _unpack(zero[:, words], 4, 1, _AWQ_ORDER)[:, inside].float()[group]
            return values.mul_(scale[:, start:stop].float()[group]).T

        return chunk

    return parameter_of_rows(tensor, "awq-4bit", (o, i), prepare, name=f"{base}.weight")


def compressed(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """compressed-tensors' packed integers: weight_packed (o, i/p), weight_scale (o, g), weight_shape (o, i).

    w = (q - z) scale, with z and scale of the group. z is 2^(bits-1), or weight_zero_point (o/p, g). weight_g_idx (i)
    names the group of each input.
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

    def prepare(expert: int | None) -> Rows:
        packed, scale = tensor.get(), scales.get()
        zero = _unpack(zeros.get(), bits, 0)[:o] if zeros else torch.full((o, g), 2 ** (bits - 1))
        group = groups.get().long() if groups else torch.arange(i) // -(-i // g)
        if int(group.min()) < 0 or int(group.max()) >= g:
            raise ValueError(f"{base}_g_idx names a group beyond the {g} that there are")

        def chunk(start: int, stop: int) -> Tensor:
            values = _unpack(packed[start:stop], bits, 1)[:, :i].float()
            values -= zero[start:stop].float()[:, group]
            return values.mul_(scale[start:stop].float()[:, group])

        return chunk

    return parameter_of_rows(tensor, f"int{bits}", (o, i), prepare, name=base)
