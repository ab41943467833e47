"""Writes files so that each appears under its name only when it is complete; locks a folder."""

from __future__ import annotations

import errno
import hashlib
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

import xxhash
from filelock import FileLock, Timeout

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import mib


def absolute_path(path: str | Path) -> str:
    """The absolute path without `..` and `~`; links stay in it where that leads to the same place."""
    whole = os.path.expanduser(path)
    plain = os.path.abspath(whole)
    if not os.path.exists(whole) or (os.path.exists(plain) and os.path.samefile(whole, plain)):
        return plain
    return os.path.realpath(whole)


@contextmanager
def writing(path: Path, remedy: str = "") -> Iterator[None]:
    """Turns the error of a full or read-only disk into a UserError that names `path`.

    torch and safetensors raise exceptions of their own for it, which this recognises.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename and not _is_near(path, Path(error.filename)):
            raise
        raise UserError(f"Cannot write {path}: {error.strerror or error}{remedy}") from None
    except Exception as error:
        if (reason := _disk_error(error, path)) is None:
            raise
        raise UserError(f"Cannot write {path}: {reason}{remedy}") from None


def _is_near(path: Path, missing: Path) -> bool:
    """Whether it is `path` that cannot be written if `missing` does not exist: a folder above, or a file beside it."""
    return path.is_relative_to(missing) or missing.is_relative_to(path.parent)


def _disk_error(error: Exception, path: Path) -> str | None:
    """The reason why the disk refused to write, or None when `error` has another cause."""
    text = str(error)
    if found := re.search(r"([^:()]+) \(os error \d+\)", text):  # safetensors
        return found[1].strip()
    if any(words in text for words in ("PytorchStreamWriter", "file write failed", "unexpected pos", "iostream error")):
        # torch gives no reason
        return f"the disk is full ({mib(disk_free(path.parent))} free)"
    return None


class HeldFolder:
    """A folder that this process holds against others by a lock on a file in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock_file: os.stat_result | None = None

    def note(self, descriptor: int) -> None:
        """Remembers which file was locked, and writes into it who holds it."""
        self._lock_file = os.fstat(descriptor)
        if self._lock_file.st_nlink == 1:  # otherwise it is somebody's file under another name too
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    def is_held(self) -> bool:
        """Whether the folder is still the one that was locked. Nobody is kept out of a folder that was made anew."""
        if self._lock_file is None:  # a file system without locks
            return self.folder.is_dir()
        try:
            return os.path.samestat(os.lstat(self.folder / LOCK), self._lock_file)
        except OSError:
            return False

    def check(self) -> None:
        """Raises UserError unless the folder is still held."""
        if not self.is_held():
            raise UserError(
                f"{self.folder} was removed or replaced while this run used it, so the run ends here and writes "
                "nothing there; start it again"
            )


@contextmanager
def lock_folder(folder: Path) -> Iterator[HeldFolder]:
    """Holds `folder`, which it makes, against other processes. The lock ends with the process, however that ends.

    Raises UserError with the name of the holder when another process has the folder. A file system without locks
    (some network file systems) does not stop the run.
    """
    path, held = folder / LOCK, HeldFolder(folder)
    lock = FileLock(path, timeout=0.2, fallback_to_soft=False, on_acquired=held.note)  # a holder may be removing it
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = _holder(path) or "another process"
            raise UserError(f"{folder} is in use by {holder}; wait for it to end, or name another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    try:
        yield held
    finally:
        with suppress(PermissionError):  # Windows does not remove an open file
            if held.is_held():
                path.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    """The text that the holder of a lock left in its file; "" when there is none to read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
"""What file systems without locks answer to `flock`."""
LOCK = ".lock"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a scratch file to write to. It becomes `path` when the block ends, and is deleted when the block raises.

    Makes the parent folders. Follows no link: one under either name is replaced, and what it leads to stays. Raises
    UserError when the file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.unlink(missing_ok=True)
            os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # so the writer opens no link
            yield scratch
            sync(scratch)
            os.replace(scratch, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a scratch folder to write into. It replaces `path` at the end of the block; an exception deletes it.

    At every moment `path` is the earlier folder, or the new one, or absent while the earlier one is called `.NAME.old`;
    after a kill in that moment the next call gives it its name back. If `path` is a link to a folder, that
    folder is replaced, and the link stays. Raises UserError when a file cannot be written.
    """
    place = path.resolve() if path.is_symlink() else path
    scratch, old = (place.with_name(f".{place.name}.{what}") for what in ("partial", "old"))
    try:
        with writing(path):
            _restore(old, place)
            for left in (scratch, old):
                remove(left)
            scratch.mkdir(parents=True)
            yield scratch
            for written in sorted(scratch.rglob("*")):
                sync(written)
            if place.exists():
                place.rename(old)
            scratch.rename(place)
            sync(place.parent)
            remove(old)
    finally:
        with suppress(OSError):
            _restore(old, place)
            remove(scratch)


def _restore(old: Path, place: Path) -> None:
    if old.is_dir() and not old.is_symlink() and not place.exists():
        old.rename(place)


def remove(path: Path) -> None:
    """Removes a file, a folder with all that is in it, or a link, but not what the link leads to. It may be absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's names, to the disk (fsync). Raises OSError when the disk is full."""
    if path.is_dir() and os.name != "posix":  # only POSIX opens a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8. Raises UserError when the file cannot be written."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as standard JSON; a number that is not finite becomes null."""
    write_text(path, json.dumps(_replace_non_finite(value), indent=1, allow_nan=False) + "\n")


def _replace_non_finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _replace_non_finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_replace_non_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def checksum(path: Path) -> str:
    """The checksum of a file's content (xxh3, 128 bits)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def disk_free(folder: Path) -> int:
    """Free bytes on the disk that holds `folder`, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
