"""Checkpoints that are whole or do not count (docs/safety.md).

Transformers writes a checkpoint's files one after the other, and then deletes older checkpoints. Here a checkpoint
counts once a list of its files, with their sizes and hashes, stands behind them and all are on the disk; only then
older ones go. So a run that was killed at any moment finds the last checkpoint that was whole.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from sgm_finetune.base.files import sync, write_json
from sgm_finetune.base.untrusted import read_json

CONTENTS = "contents.json"
"""Written last: the checkpoint's files, their bytes and XXH3-128 hashes."""
KEPT = 2
"""Checkpoints that stay: the newest and the best, or the one before."""


class WholeCheckpoints(TrainerCallback):
    """Lists a checkpoint's files when all processes have written theirs, and lets older checkpoints go after that."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if best := state.best_model_checkpoint:  # of a run whose folder has been moved
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / Path(best).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process has its own random states
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            seal(folder)
            best = state.best_model_checkpoint
            rotate_checkpoints(str(args.output_dir), KEPT, best_model_checkpoint=best, use_mtime=False)


def seal(folder: Path) -> None:
    """Writes the list of `folder`'s files behind them, all of them on the disk before it. Raises UserError."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS):
        sync(path)
        found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3": _hash(path)}
    write_json(folder / CONTENTS, found)
    sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether all files that `seal` listed are there as they were."""
    try:
        listed = read_json(folder / CONTENTS)
        return bool(listed) and all(
            (folder / name).stat().st_size == about["bytes"] and _hash(folder / name) == about["xxh3"]
            for name, about in listed.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole, or None."""
    return next((folder for folder in reversed(_checkpoints_by_step(checkpoints)) if is_whole(folder)), None)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The one that `checkpoint` says was best so far, beside it, or None. Its run may have been moved since."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    best = state.best_model_checkpoint
    return checkpoint.parent / Path(best).name if best else None


def discard_after(checkpoint: Path) -> None:
    """Removes what was begun after `checkpoint` and never became whole."""
    numbered = _checkpoints_by_step(checkpoint.parent)
    for folder in numbered[numbered.index(checkpoint) + 1 :]:
        shutil.rmtree(folder)


def _checkpoints_by_step(checkpoints: Path) -> list[Path]:
    """The checkpoints by their step; clocks play no part."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]  # not of hashlib
