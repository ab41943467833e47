"""The findings of `sgm doctor` that need PyTorch: processor, GPUs, memory, 4 and 8 bits."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import psutil
import torch

from sgm_finetune.base.device import has_gpu, multiplies_bfloat16
from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.base.text import first_line, gib
from sgm_finetune.commands.doctor_finding import Finding, Verdict


def examine_machine() -> Iterator[Finding]:
    """Each finding as soon as it is known."""
    yield _processor()
    yield from _gpus()
    yield _memory()
    yield _quantisation("nf4")
    yield _quantisation("int8")


_UNITS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "neon",
    "asimd",
    "bf16",
    "sve",
    "i8mm",
)
"""Processor features that speed up matrix products, as torch names them."""


def _processor() -> Finding:
    known = torch.cpu.get_capabilities()
    units = [name for name in _UNITS if known.get(name) is True]
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or os.cpu_count()
    text = f"{cores} cores, {threads} threads; {', '.join(units) or 'no known vector units'}"
    if multiplies_bfloat16():
        return Finding("processor", "works", text)
    return Finding(
        "processor", "slow", f"{text}; no instructions for bfloat16",
        "bfloat16 models train faster with model.dtype=float32, which takes more memory",
    )  # fmt: skip


def _gpus() -> Iterator[Finding]:
    if not has_gpu():
        driver = shutil.which("nvidia-smi")
        if driver is not None and torch.version.cuda is None:
            yield Finding(
                "GPU", "missing", "there is a driver, but this torch is built for CPUs",
                f"pip install torch=={torch.__version__.partition('+')[0]} from the index for your CUDA (pytorch.org)",
            )  # fmt: skip
        elif torch.backends.mps.is_available():
            yield Finding("GPU", "missing", "the GPU of a Mac has no float64; everything runs on the processor")
        else:
            yield Finding("GPU", "missing", "torch finds no GPU; everything runs on the processor")
        return
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(8, 8, device=f"cuda:{index}").matmul(torch.ones(8, 8, device=f"cuda:{index}")).sum().item()
        except RuntimeError as error:
            yield Finding("GPU", "broken", f"{index}: {first_line(error)}", "exclude it with CUDA_VISIBLE_DEVICES")
            continue
        major, minor = torch.cuda.get_device_capability(index)
        text = (
            f"{index}: {torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free, compute {major}.{minor}"
        )
        if major < 8:
            yield Finding("GPU", "slow", f"{text}; no bfloat16", "set model.dtype=float16 or model.dtype=float32")
        else:
            yield Finding("GPU", "works", text)


def _memory() -> Finding:
    within = memory_within_reach()
    where = "GPU memory" if has_gpu() else "resident memory"
    verdict: Verdict = "works" if within > 2 * 2**30 else "slow"
    remedy = "" if verdict == "works" else "set memory.budget, and SGM chooses batch sizes, rank and layers to fit"
    return Finding(
        "memory", verdict, f"{gib(within)} of {where} available; sgm estimate predicts what a run needs", remedy
    )


def _quantisation(quantization: Literal["nf4", "int8"]) -> Finding:
    """Runs a quantised 64 x 64 layer forward and backward, and compares its output with the unquantised layer."""
    area = {"nf4": "4 bits (NF4)", "int8": "8 bits"}[quantization]
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding(area, "missing", "bitsandbytes is not installed", "pip install bitsandbytes")
    device = "cuda" if has_gpu() else "cpu"
    try:
        error = _layer_error(quantization, device)
    except Exception as problem:  # a library for another machine raises any type
        return Finding(area, "missing", f"bitsandbytes fails: {first_line(problem)}", "use model.quantization=none")
    if not error < 0.2:
        return Finding(
            area, "missing", f"a layer's output has a relative error of {error:.2f}", "use model.quantization=none"
        )
    slow = "; slow on a processor" if device == "cpu" else ""
    return Finding(
        area,
        "slow" if slow else "works",
        f"bitsandbytes runs and trains through a layer, relative error {error:.3f}{slow}",
    )


def _layer_error(quantization: str, device: str) -> float:
    """‖y' − y‖/‖y‖ for the output y' of a quantised layer; infinity when its backward pass gives no finite gradient."""
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    dtype = torch.float16 if quantization == "int8" and device == "cuda" else torch.bfloat16
    if quantization == "nf4":
        layer: Any = Linear4bit(64, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")  # type: ignore[call-arg]
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)  # type: ignore[call-arg]
    layer = layer.to(device)
    given = x.to(device, dtype).requires_grad_(True)
    y = layer(given)
    y.float().sum().backward()
    if given.grad is None or not bool(torch.isfinite(given.grad).all()):
        return float("inf")
    expected = x @ weight.T
    return float((y.detach().float().cpu() - expected).norm() / expected.norm())
