"""Checkpoints count only when they are whole (docs/safety.md).

Transformers writes the files of a checkpoint one after another and then deletes older checkpoints. Here a checkpoint
counts once all its files are on the disk, followed by a list of them with their sizes and hashes. Only then are older
checkpoints deleted. So a run that is killed at any moment still has its last whole checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import checksum, remove, sync, write_json
from sgm_finetune.base.untrusted import read_json, refuse, require_json_object

CONTENTS = "contents.json"
"""The list of a checkpoint's files, their sizes in bytes and their XXH3-128 hashes. Written last."""
TRAINER_STATE = "trainer_state.json"
"""The file in which Transformers keeps the state of its Trainer."""


def seal(folder: Path) -> None:
    """Makes sure that all files of `folder` are on the disk, then writes their list. Raises UserError when it
    cannot."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS):
        sync(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "xxh3": checksum(path)}
    write_json(folder / CONTENTS, found)
    sync(folder.parent)


def is_whole(folder: Path) -> bool:
    """Whether all files that `seal` listed are still there, unchanged."""
    try:
        listed = read_json(folder / CONTENTS)
        return bool(listed) and all(
            (folder / name).stat().st_size == about["bytes"] and checksum(folder / name) == about["xxh3"]
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
    best = require_json_object(checkpoint / TRAINER_STATE).get("best_model_checkpoint")
    if not isinstance(best, str | None):
        refuse(checkpoint / TRAINER_STATE, "state of a training", ValueError("best_model_checkpoint is not a text"))
    return checkpoint.parent / Path(best).name if best else None


def check_best(checkpoint: Path) -> None:
    """Raises UserError if a run cannot be resumed from `checkpoint` because its best checkpoint is lost.

    A best checkpoint may be absent if there are later checkpoints, although harmed ones: a better one took its place,
    and the resumed run computes that again.
    """
    best = best_checkpoint(checkpoint)
    if best is None or is_whole(best):
        return
    if best.exists():
        raise UserError(f"{best}, the best checkpoint of the run to resume, is damaged; start a new run")
    if checkpoint == _checkpoints_by_step(checkpoint.parent)[-1]:
        raise UserError(f"{best}, the best checkpoint of the run to resume, is gone; start a new run")


def discard_after(checkpoint: Path) -> None:
    """Deletes the checkpoints after `checkpoint`, which never became whole."""
    numbered = _checkpoints_by_step(checkpoint.parent)
    for folder in numbered[numbered.index(checkpoint) + 1 :]:
        remove(folder)


def _checkpoints_by_step(checkpoints: Path) -> list[Path]:
    """The checkpoints in the order of their steps, whatever their files' times."""
    found = [path for path in checkpoints.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
