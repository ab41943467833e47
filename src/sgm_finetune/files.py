"""Files that appear under their names only when complete. A leaf."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sgm_finetune.errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch path to write to; it becomes `path` when the block ends well and disappears when it does not.

    Folders on the way are made. Raises UserError where the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder to write into; it takes the place of `path` when the block ends well and disappears when it does
    not. Raises UserError where something cannot be written."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def disk_free(folder: Path) -> int:
    """Bytes free on the disk that `folder` is on, or will be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
