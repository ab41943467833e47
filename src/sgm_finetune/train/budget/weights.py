"""What the weights of the base take: in memory at one time, as pages of files, on the disk, while they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from sgm_finetune.base.config import Config
from sgm_finetune.base.device import has_gpu
from sgm_finetune.base.processes import processes
from sgm_finetune.data.prepared import PreparedData
from sgm_finetune.model.architecture import read_model_config
from sgm_finetune.model.matrices import Matrix
from sgm_finetune.model.names import layer_of
from sgm_finetune.model.residence.host import NUM_BUFFERS
from sgm_finetune.model.residence.sizes import sizes_elsewhere
from sgm_finetune.model.stand_ins import stored_bytes
from sgm_finetune.train.fast.head_loss import SLICE

_AROUND = 2**21
"""Bytes that Linux maps at most around a byte of a mapped file that is read (docs/LOG.md)."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the base's weights in one process."""

    held: int
    """In memory all the time. A base on disk counts with its largest block, one in the host's memory with two."""
    block: int = 0
    """Bytes of that block, which are pages of a file."""
    rows: int = 0
    """Pages of the embeddings on disk that a batch reads before its first block computes."""
    output: int = 0
    """Bytes of an output layer elsewhere that are in memory at one time while the loss is computed."""
    output_layer: int = 0
    """The whole output layer that is elsewhere, which is in memory while answers are written."""
    host: int = 0
    """In the host's memory, for a GPU."""
    blocks: int = 0
    """All blocks on disk or in the host's memory."""
    files: int = 0
    """All of the base on disk."""
    store: int = 0
    """Files that hold a base on disk in the form in which it computes, if its own files do not."""
    loading: int = 0
    """In memory beside the weights while they are loaded: files whose weights change their type."""


def count_weights(
    config: Config,
    prepared: PreparedData,
    model: PreTrainedModel,
    matrices: Mapping[str, Matrix],
    num_tokens: int,
    in_parts: bool,
) -> WeightBytes:
    """The weights of `model`, which has no numbers and no adapter, whose largest batch has `num_tokens` tokens.

    `in_parts`: the loss reads the output layer slice by slice.
    """
    whole, quantised = stored_bytes(model), config.model.quantization != "none"
    # the type of the files; the skeleton's own configuration has the type that was asked for
    changes = read_model_config(config.model, prepared.folder).dtype not in (None, model.dtype)
    place = config.model.residence
    if place in ("host", "disk"):
        sizes = sizes_elsewhere(model, place)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", 1)
        # while one slice of the output layer is used, the next one is copied to a GPU
        at_once = 2 * SLICE["cuda"] if place == "host" else SLICE["cpu"]
        output = int(sizes.output_layer * (min(1.0, at_once / vocabulary) if in_parts else 1.0))
        if place == "host":
            return WeightBytes(
                held=whole - sizes.total + NUM_BUFFERS * sizes.largest_block,
                output=output,
                output_layer=sizes.output_layer,
                host=sizes.total,
                blocks=sizes.blocks,
                loading=max(sizes.largest_block, sizes.embeddings, sizes.output_layer),
            )
        store = sizes.total if changes else sizes.blocks if quantised else 0
        one = max(sizes.largest_block, sizes.output_layer if changes else 0, sizes.embeddings if changes else 0)
        return WeightBytes(
            held=whole - sizes.total + sizes.largest_block,
            block=sizes.largest_block,
            rows=min(sizes.embeddings, num_tokens * _AROUND),
            output=output,
            output_layer=sizes.output_layer,
            blocks=sizes.blocks,
            files=sizes.total,
            store=store,
            loading=2 * one if store else 0,
        )
    files = sum(path.stat().st_size for path in prepared.folder.glob("*.safetensors"))
    loading = files if (changes or quantised) and not has_gpu() else 0
    return WeightBytes(_share(config, model, matrices, whole), loading=loading)


def num_entries(matrices: Mapping[str, Matrix]) -> int:
    return sum(rows * cols for rows, cols in (matrix.shape for matrix in matrices.values()))


def _share(config: Config, model: PreTrainedModel, matrices: Mapping[str, Matrix], whole: int) -> int:
    """All weights; where they are sharded, this process's share of the matrices and one whole block."""
    num_processes = processes().num_processes
    if not (config.training.shard and num_processes > 1):
        return whole
    num_blocks = len({layer_of(name) for name in matrices})
    inside = min(whole, num_entries(matrices) * whole // sum(p.numel() for p in model.parameters()))
    return whole - inside + inside // num_processes + inside // num_blocks
