"""vLLM's own loader reads an adapter's folder.

`pip download --no-deps vllm==0.33.0`, then `SGM_VLLM_WHEEL=vllm-0.33.0-….whl pytest tests/test_vllm.py -m network`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from sgm_finetune.base.config_file import load_config
from sgm_finetune.commands.finetune import finetune

WHEEL = os.environ.get("SGM_VLLM_WHEEL", "")
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.network
@pytest.mark.skipif(not WHEEL, reason="SGM_VLLM_WHEEL names no wheel of vLLM")
@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_vllms_loader_reads_every_factor_and_its_scale(task, llama_folder, reviews, tmp_path):
    settings = [
        f"model.name={llama_folder}", f"model.task={task}", f"data.train={reviews}", "data.max_length=32",
        "model.dtype=float32", "adapter.rank=4", "training.max_steps=2", "probe.num_batches=2",
        f"output.dir={tmp_path}",
    ]  # fmt: skip
    finetune(load_config(None, settings), Console(file=io.StringIO()))
    folder = tmp_path / "adapter"
    arguments = [sys.executable, str(Path(__file__).with_name("vllm_loader.py")), WHEEL, str(folder), "16", *KINDS]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    described = json.loads((folder / "adapter_config.json").read_text())
    factors = load_file(folder / "adapter_model.safetensors")
    assert {f"base_model.model.{name}.lora_{side}.weight" for name in read for side in "AB"} == {
        name for name in factors if "lora_" in name
    }
    for name, layer in read.items():
        assert layer["scale"] == described["lora_alpha"] / described["r"]
        for side in "AB":
            own = factors[f"base_model.model.{name}.lora_{side}.weight"]
            assert layer[side] == [list(own.shape), pytest.approx(float(own.double().sum()))]
