"""The environment of a run: everything that must be equal for bit-identical results."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sgm_finetune.base.config import Config

_PACKAGES = ("sgm-finetune", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
_ALL = (*_PACKAGES, "numpy", "safetensors", "tokenizers", "liger-kernel", "triton", "deepspeed")
_VARIABLES = ("OMP_", "MKL_", "KMP_", "GOMP_", "CUDA_", "CUBLAS_", "NCCL_", "PYTORCH_", "TORCH_", "HF_", "ACCELERATE_",
              "WORLD_SIZE", "SGM_")  # fmt: skip
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def environment() -> dict[str, str]:
    """Package versions and the device, for metrics.json and the report."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **_versions(_PACKAGES), "device": device}


def environment_file(config: Config) -> dict[str, Any]:
    """The content of environment.json: begin, versions, machine, variables that change results, command, seeds."""
    units = torch.cpu.get_capabilities()
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions(_ALL), "cuda": torch.version.cuda},
        "machine": {
            "system": platform.platform(),
            "processor": _processor() or platform.machine(),
            "units": sorted(name for name, has in units.items() if has is True),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and not any(word in name for word in _SECRET)
        },
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "seeds": {"training": config.training.seed, "data": config.data.seed, "probe": config.probe.seed},
    }


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            # torch's own text also names the toolkit that it was built for, as in 2.13.0+cu130
            found[name] = torch.__version__ if name == "torch" else version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The name of the processor; on Linux, from /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()
