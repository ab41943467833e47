"""Where an export goes: its format, its folder, and whether others find its base model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import absolute_path
from sgm_finetune.base.install import install_line

ExportFormat = Literal["adapter", "merged", "bnb-4bit", "compressed-tensors", "gguf", "gguf-adapter"]
ADAPTERS: tuple[ExportFormat, ...] = ("adapter", "gguf-adapter")
"""Formats that hold the update alone."""
BaseWeights = Literal["original", "trained"]
"""The weights of a base that was quantised in training: those in its files, or those that training computed with."""
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
ADAPTER_TYPES: tuple[GgufType, ...] = ("f32", "f16")
"""Types of an adapter's factors in a GGUF file."""
K_QUANTS: tuple[GgufType, ...] = ("q6_k", "q5_k_m", "q4_k_m")
"""Types that llama.cpp's own quantiser writes."""
REPORT = "export.json"
"""File with what was measured. A folder that holds it counts as an earlier export."""


def check_packages(to: ExportFormat, gguf_type: GgufType | None = None) -> None:
    """Raises UserError unless the packages that write the format are installed."""
    if to == "bnb-4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--to bnb-4bit needs bitsandbytes; pip install bitsandbytes, or take --to merged")
    if to == "compressed-tensors" and not all(map(importlib.util.find_spec, ("auto_round", "compressed_tensors"))):
        raise UserError(
            "--to compressed-tensors needs AutoRound, which writes it, and compressed-tensors, which reads it; "
            f"{install_line('compressed-tensors')}"
        )
    if to.startswith("gguf") and importlib.util.find_spec("gguf") is None:
        raise UserError(f"--to {to} needs the package gguf; {install_line('gguf')}")
    if to == "gguf-adapter" and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"--to gguf-adapter needs llama.cpp, which alone can load and check it; {install_line('llama-cpp')}, or "
            "take --to adapter"
        )
    if gguf_type in K_QUANTS and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"--gguf-type {gguf_type} needs llama.cpp, whose quantiser writes it; {install_line('llama-cpp')}, or take "
            "--gguf-type q8_0"
        )


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raises UserError unless the folder is new, or an earlier export that may be replaced, in a writable place."""
    if folder.exists():
        empty = folder.is_dir() and not any(folder.iterdir())
        if not empty and not (folder / REPORT).is_file():
            raise UserError(f"{folder} exists and is not an earlier export; name another --output")
        if not empty and not overwrite:
            raise UserError(f"{folder} exists; name another --output, or replace it with output.overwrite=true")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(
            f"{folder} cannot be written: {parent} is not a folder that you may write to; name another --output"
        )


def hub_model(name: str) -> str | None:
    """Returns the name if it is a hub id, by which others can download the model; else None."""
    path = Path(name).expanduser()
    is_path = path.is_absolute() or path.exists() or name.startswith(".")
    return name if name.count("/") == 1 and not is_path else None


def base_for_peft(name: str, folder: Path) -> str:
    """Returns the base model's name for adapter_config.json: its hub id, or else its folder on this machine."""
    return hub_model(name) or absolute_path(folder)
