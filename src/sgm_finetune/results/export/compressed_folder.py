"""Writes a merged decoder in 4 bits for vLLM, rounded on the run's training data: compressed-tensors, by AutoRound."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_json
from sgm_finetune.base.untrusted import require_json_object
from sgm_finetune.data.questions import spread
from sgm_finetune.model.matrices import adaptable
from sgm_finetune.model.weights.stored import stored_tensors
from sgm_finetune.results.export.ask_auto_round import ROWS, quantise_auto_round
from sgm_finetune.results.export.merge import MergedTensor
from sgm_finetune.results.export.shards import merged_config, write_config_files
from sgm_finetune.results.load import Result
from sgm_finetune.train.losses import Progress

TASKS = ("causal-lm", "preference")
"""Tasks whose models AutoRound can load."""
_GROUPS = (128, 64, 32)
"""Numbers of inputs that may share a scale, which vLLM's kernels have; the first that divides all inputs is taken."""
_LONGEST_ROW = 2048
"""Most tokens of a sequence of calibration data."""


def check_model(result: Result) -> None:
    """Raises UserError where AutoRound or vLLM support no such model."""
    if result.config.model.task not in TASKS:
        raise UserError(
            f"--to compressed-tensors is for models that generate text after a prompt, and this run has "
            f"model.task={result.config.model.task}; take --to bnb-4bit"
        )


def group_size(skeleton: PreTrainedModel) -> int:
    """The number of inputs that share a scale. Raises UserError where the matrices cannot be quantised."""
    matrices = adaptable(skeleton)
    other = next((name for name, matrix in matrices.items() if type(matrix.module) is not nn.Linear), None)
    if other is not None:
        raise UserError(
            f"--to compressed-tensors quantises linear layers, and `{other}` of {type(skeleton).__name__} is none; "
            "take --to bnb-4bit or --to merged"
        )
    inputs = {matrix.shape[1]: name for name, matrix in matrices.items()}
    found = next((group for group in _GROUPS if not any(number % group for number in inputs)), None)
    if found is None:
        number, name = next((number, name) for number, name in inputs.items() if number % _GROUPS[-1])
        raise UserError(
            f"--to compressed-tensors needs matrices whose inputs are a multiple of {_GROUPS[-1]}, and `{name}` has "
            f"{number}; take --to bnb-4bit"
        )
    return found


def calibration_rows(encoded: Dataset, number: int, max_length: int) -> Tensor:
    """Returns (sequences, length) token ids: at most `number` examples, evenly spread over a data set and joined end to
    end, so that no padding is among them."""
    chosen = encoded.select(spread(range(len(encoded)), number))
    ids = torch.tensor(list(chain.from_iterable(chosen[ROWS])))
    length = min(len(ids), max_length, _LONGEST_ROW)
    return ids[: len(ids) // length * length].view(-1, length)


def num_bytes(tensors: Sequence[MergedTensor], skeleton: PreTrainedModel, group: int) -> int:
    """The approximate size of the folder while it is written: the merged model beside the quantised one."""
    layers = {f"{name}.weight" for name in adaptable(skeleton)}
    whole = sum(tensor.num_bytes for tensor in tensors)
    inside = [tensor for tensor in tensors if tensor.model_name in layers]
    numbers = sum(tensor.num_bytes // tensor.dtype.itemsize for tensor in inside)
    return 2 * whole - sum(tensor.num_bytes for tensor in inside) + round(numbers * (0.5 + 2 / group))


def keep_types(folder: Path, merged: Path) -> None:
    """Puts the tensors that were not rounded into the files in `folder` as they are in `merged`. AutoRound writes them
    in the type that it computes in, which is float32 on some CPUs."""
    stored = stored_tensors(merged)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {name: stored[name].get().contiguous() for name in tensors if name in stored}
        save_file(tensors | kept, file, {"format": "pt"})


def quantise_compressed(
    result: Result, merged: Path, skeleton: PreTrainedModel, rows: Tensor, group: int, folder: Path, progress: Progress
) -> None:
    """Writes the model in the folder `merged` into `folder` in 4 bits, and deletes `merged`. Raises UserError where
    AutoRound fails."""
    work = folder / "work"
    work.mkdir()
    save_file({ROWS: rows}, work / "calibration.safetensors")
    trusts = result.config.model.trust_remote_code
    written = quantise_auto_round(merged, work / "calibration.safetensors", work / "model", group, trusts, progress)
    settings = require_json_object(written / "config.json")["quantization_config"]
    for file in written.glob("*.safetensors*"):
        file.rename(folder / file.name)
    keep_types(folder, merged)
    shutil.rmtree(work)
    shutil.rmtree(merged)
    write_config_files(result, skeleton, folder)
    write_json(folder / "config.json", {**merged_config(result, skeleton), "quantization_config": settings})
