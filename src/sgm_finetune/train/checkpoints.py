"""Checkpoints count only when they are whole (docs/safety.md).

Transformers writes the files of a checkpoint one after another and then deletes older checkpoints. Here a checkpoint
counts once all its files are on the disk, followed by a list of them with their sizes and hashes. Only then are older
checkpoints deleted. So a run that is killed at any moment still has its last whole checkpoint.
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
"""The list of a checkpoint's files, their sizes in bytes and their XXH3-128 hashes. Written last."""
KEPT = 2
"""Number of checkpoints that stay: the newest, and the best or the one before."""


class WholeCheckpoints(TrainerCallback):
    """Lists a checkpoint's files when all processes have written theirs, then deletes older checkpoints."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if best := state.best_model_checkpoint:  # the run's folder may have been moved
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / Path(best).name)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes its own random states
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            seal(folder)
            best = state.best_model_checkpoint
            rotate_checkpoints(str(args.output_dir), KEPT, best_model_checkpoint=best, use_mtime=False)


def seal(folder: Path) -> None:
    """Makes sure that all files of `folder` are on the disk, then writes their list. Raises UserError when it
    cannot."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS):
        sync(path)
        found[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "xxh3": _hash(path)}
    write_json(folder / CONTENTS, found)
    sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether all files that `seal` listed are still there, unchanged."""
    try:
        listed = read_json(folder / CONTENTS)
        return bool(listed) and all(
            (folder / name).stat().st_size == about["bytes"] and _hash(folder / name) == about["xxh3"]
            for name, about in listed.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def last_whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next((folder for folder in reversed(_checkpoints_by_step(checkpoints)) if is_whole(folder)), None)


def best_checkpoint(checkpoint: Path) -> Path | None:
    """The best checkpoint so far according to `checkpoint`, or None. It is looked for beside `checkpoint`, since the
    run's folder may have been moved."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    best = state.best_model_checkpoint
    return checkpoint.parent / Path(best).name if best else None


def discard_after(checkpoint: Path) -> None:
    """Deletes the checkpoints after `checkpoint`, which never became whole."""
    numbered = _checkpoints_by_step(checkpoint.parent)
    for folder in numbered[numbered.index(checkpoint) + 1 :]:
        shutil.rmtree(folder)


def _checkpoints_by_step(checkpoints: Path) -> list[Path]:
    """The checkpoints in the order of their steps, whatever their files' times."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]
