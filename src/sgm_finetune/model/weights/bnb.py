"""bitsandbytes' 4-bit and 8-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sgm_finetune.base.untrusted import parse_json
from sgm_finetune.model.weights.companions import Companions, num_bytes
from sgm_finetune.model.weights.fused import Cut
from sgm_finetune.model.weights.tensors import Parameter, Rows, StoredTensor, assemble, parameter_of_rows


def bnb_4bit(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """nf4 and fp4: two values per byte, and a scale (`absmax`) per block of values in row-major order.

    The scales may be quantised themselves (`nested_*`). The packed bytes may have any dtype.
    """
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
    if num_bytes(tensor) != -(-rows * cols // 2):
        raise companions.misfit(
            f"it holds {num_bytes(tensor)} bytes, {rows} x {cols} values need {-(-rows * cols // 2)}"
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
            """The rows, cut out of the dequantised blocks that contain them."""
            first, last = start * cols // block, -(-stop * cols // block)
            begin, end = first * block, min(last * block, rows * cols)
            state = QuantState(scales[first:last], (end - begin,), whole.code, block, kind, torch.float32)
            values = dequantize_4bit(packed[begin // 2 : -(-end // 2)].unsqueeze(1), state)
            return values.flatten()[start * cols - begin : stop * cols - begin].view(stop - start, cols)

        return assemble((rows, cols), chunk, cut)

    return Parameter(name, tensor.file, kind, (rows, cols), None, read)


def bnb_int8(tensor: StoredTensor, companions: Companions) -> Parameter | None:
    """int8 values times SCB/127, with one SCB per row (o)."""
    scale_name = f"{tensor.name.removesuffix('.weight')}.SCB"
    if tensor.dtype != "int8" or len(tensor.shape) != 2 or scale_name not in companions.tensors:
        return None
    o, i = tensor.shape
    scb = companions.need(scale_name, (o,), (o, 1))
    layout = companions.find(f"{tensor.name.removesuffix('.weight')}.weight_format")
    if layout is not None and bool(layout.get().any()):
        raise companions.misfit("its rows are in an order for one kind of GPU (weight_format)")

    def prepare(expert: int | None) -> Rows:
        values, scale = tensor.get(), scb.get().float().view(o, 1) / 127
        return lambda start, stop: values[start:stop].float() * scale[start:stop]

    return parameter_of_rows(tensor, "int8", (o, i), prepare)
