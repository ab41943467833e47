"""Rounds a merged model to 4 bits with AutoRound, in a process of its own, since AutoRound changes Transformers.

Runs as a program with four arguments: the model's folder, the file of calibration data, the folder to write, and as
JSON the number of inputs that share a scale, the steps a block, and whether the model's own code may run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sgm_finetune.base.device import device_for, has_gpu
from sgm_finetune.base.errors import UserError
from sgm_finetune.train.losses import Progress

ROWS = "input_ids"
"""Name of the tensor in the file of calibration data: (sequences, length) token ids."""
GPU_STEPS, CPU_STEPS = 200, 20
"""Steps that improve the rounding of each block. 200 is AutoRound's default; a CPU would need hours for it."""
_BLOCKS = re.compile(r"Quantizing [^|]*\|[^|]*\| (\d+)/(\d+) \[")
"""What AutoRound's progress bar shows after each block."""


def num_steps() -> int:
    """The number of steps a block on this machine."""
    return GPU_STEPS if has_gpu() else CPU_STEPS


def quantise_auto_round(merged: Path, rows: Path, target: Path, group: int, trusts: bool, progress: Progress) -> Path:
    """Returns the folder in `target` into which AutoRound wrote the model in `merged`. Raises UserError with its reason
    where it cannot."""
    arguments = [str(merged), str(rows), str(target), json.dumps([group, num_steps(), trusts])]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    environment["HF_HUB_OFFLINE"] = "1"
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True,
        errors="replace",
    )  # fmt: skip
    last = ""
    assert process.stderr is not None
    with process:
        try:
            for line in process.stderr:  # universal newlines: a bar's returns end lines too
                if found := _BLOCKS.search(line):
                    progress(int(found[1]), int(found[2]))
                last = line.strip() or last
        except BaseException:
            process.kill()
            raise
    written = [config.parent for config in target.rglob("config.json")]
    if process.returncode or len(written) != 1:
        why = re.sub(r"\x1b\[[0-9;]*m", "", last) if process.returncode else "it left no model"
        raise UserError(f"AutoRound cannot quantise this model: {why}; nothing was kept. Take --to bnb-4bit")
    return written[0]


def end_with_parent() -> None:
    """Ends this process when its standard input is closed: the command that began it is gone, however it ended."""

    def wait() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(merged: str, rows: str, target: str, settings: str) -> None:
    from auto_round import AutoRound, SignRoundConfig  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    group, steps, trusts = json.loads(settings)
    ids = load_file(rows)[ROWS]
    model: Any = AutoModelForCausalLM.from_pretrained(merged, dtype="auto", trust_remote_code=trusts)
    tokenizer: Any = AutoTokenizer.from_pretrained(merged, trust_remote_code=trusts)
    rounding = AutoRound(
        model,
        tokenizer,
        scheme="W4A16",
        alg_configs=SignRoundConfig(iters=steps, group_size=group),
        dataset=[{"input_ids": row[None], "attention_mask": row.new_ones(1, len(row))} for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=min(8, len(ids)),
        device_map=str(device_for()),
        enable_torch_compile=False,
        trust_remote_code=trusts,
    )
    rounding.quantize_and_save(target, format="llm_compressor")


if __name__ == "__main__":
    end_with_parent()
    main(*sys.argv[1:])
