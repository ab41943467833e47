"""Files that appear under their names only when complete. A leaf."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sgm_finetune.base.errors import UserError


@contextmanager
def writing(path: Path, remedy: str = "") -> Iterator[None]:
    """Turns what the system says of a disk that is full, or not to be written, into a UserError that names `path`;
    torch and safetensors say it in exceptions of their own."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename and Path(error.filename) != path:
            raise
        raise UserError(f"Cannot write {path}: {error.strerror or error}{remedy}") from None
    except Exception as error:
        if (reason := _disk_says(error, path)) is None:
            raise
        raise UserError(f"Cannot write {path}: {reason}{remedy}") from None


def _disk_says(error: Exception, path: Path) -> str | None:
    text = str(error)
    if found := re.search(r"([^:()]+) \(os error \d+\)", text):  # safetensors
        return found[1].strip()
    if "PytorchStreamWriter" in text or "file write failed" in text or "unexpected pos" in text:  # torch says no more
        return f"the disk is full ({disk_free(path.parent) / 2**20:,.0f} MiB free)"
    return None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds `folder`, which it makes, against other processes. The lock ends with the process, however that ends.

    Raises UserError with the name of the holder when another process has the folder. A file system without locks
    (some network file systems) does not stop the run.
    """
    path = folder / LOCK
    lock = FileLock(path, timeout=0.2, fallback_to_soft=False)  # a holder may be removing the file: try again
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = _holder(path) or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait for it, or name another output.dir") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        with suppress(OSError):  # the name is for messages only
            path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(PermissionError):  # Windows does not remove an open file
            path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    """The text that the holder of a lock left in its file; "" when there is none to read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
LOCK = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A scratch path to write to; it becomes `path` when the block ends well and disappears when it does not.

    Folders on the way are made. Raises UserError where the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            sync(scratch)
            os.replace(scratch, path)
            sync(path.parent)
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
        for written in sorted(scratch.rglob("*")):
            sync(written)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(scratch, path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sync(path: Path) -> None:
    """Has what was written to a file, or the names in a folder, on the disk before it returns. OSError where the disk
    is full."""
    if path.is_dir() and os.name != "posix":  # others have no handle of a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """JSON as its standard has it: a number that is none becomes null."""
    write_text(path, json.dumps(_standard(value), indent=1, allow_nan=False) + "\n")


def _standard(value: Any) -> Any:
    match value:
        case dict():
            return {key: _standard(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_standard(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def disk_free(folder: Path) -> int:
    """Bytes free on the disk that `folder` is on, or will be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
