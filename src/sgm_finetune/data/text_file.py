"""Opens a data file as text: unpacked and decoded, within bounds. Its errors name the file and the remedy."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import mib, one_line

MAX_UNPACKED_FACTOR = 100
"""A packed file may unpack to this many times its size. Texts unpack to 3 to 30 times."""
ALWAYS_UNPACKED = 64 * 2**20
"""Bytes to which any packed file may unpack."""
CHUNK = 2**20


def _zstd(path: Path) -> Any:
    import pyarrow as pa  # here: it takes a moment to load

    return pa.input_stream(str(path), compression="zstd")


PACKINGS: dict[str, tuple[bytes, Callable[[Path], Any]]] = {
    ".gz": (rb"\x1f\x8b", gzip.open),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.open),
    ".xz": (rb"\xfd7zXZ\x00", lzma.open),
    ".zst": (rb"\x28\xb5\x2f\xfd", _zstd),
}
"""A pattern of the first bytes of each kind of packed file, and what opens it, by ending."""
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet; unpack it, or save the sheet as CSV",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"7z\xbc\xaf": "a 7-Zip archive; unpack it",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save the sheet as CSV",
    b"PAR1\x15": "a Parquet file; set data.file_type=parquet",
    b"SQLite format 3\0": "a database; write its rows as CSV or JSON lines",
}
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


def inner_suffix(path: Path) -> str:
    """The ending of a file's name in small letters, without that of its packing.

    >>> inner_suffix(Path("rows.JSONL.gz")), inner_suffix(Path("rows.csv")), inner_suffix(Path("rows.gz"))
    ('.jsonl', '.csv', '')
    """
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKINGS else suffix


def packing_of(path: Path) -> str | None:
    """The ending of the packing that a file has, whatever its name; None for a file that is not packed.

    Raises UserError when the name says that the file is packed and its first bytes do not, and OSError.
    """
    with path.open("rb") as file:
        begin = file.read(16)
    found = next((ending for ending, (magic, _) in PACKINGS.items() if re.match(magic, begin)), None)
    if found is None and path.suffix.lower() in PACKINGS and begin:
        raise UserError(f"{path} is not packed as its name says; name it {path.stem} if it holds plain text")
    return found


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file in UTF-8, with or without a byte order mark, unpacked if it is packed.

    `newline` is that of `open`. Nothing is held but a buffer. Raises UserError in one line for a file that is damaged,
    cut short, of another kind, in another encoding, or unpacks to far more than its size; and OSError.
    """
    with _open_bytes(path) as binary:
        _refuse_other_kinds(path, binary.peek(512)[:512])
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline=newline)
        try:
            yield text
        except UnicodeDecodeError:
            _refuse_encoding(path)
        finally:
            text.detach()


def read_text(path: Path) -> str:
    """The whole text of a file. Raises as `open_text`."""
    with open_text(path) as file:
        return file.read()


def check_unpacked(path: Path) -> None:
    """Unpacks a packed file and keeps nothing. Raises UserError for a damaged one, and as `open_text` for its size."""
    with _open_bytes(path) as file:
        while file.read(CHUNK):
            pass


@contextmanager
def _open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    packing = packing_of(path)
    if packing is None:
        with path.open("rb", buffering=0) as raw:
            yield io.BufferedReader(raw, CHUNK)
        return
    with _reported(path):
        opened = PACKINGS[packing][1](path)
    with opened as file:
        limit = max(ALWAYS_UNPACKED, MAX_UNPACKED_FACTOR * path.stat().st_size)
        yield io.BufferedReader(_Unpacked(path, file, limit), CHUNK)


class _Unpacked(io.RawIOBase):
    """The bytes of a packed file. Reading raises UserError for a damaged one, and for more than `limit` bytes."""

    def __init__(self, path: Path, file: Any, limit: int):
        super().__init__()
        self.path, self.file, self.room, self.limit = path, file, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reported(self.path):
            found = self.file.read(len(buffer))
        self.room -= len(found)
        if self.room < 0:
            raise UserError(
                f"{self.path} unpacks to more than {mib(self.limit)}, far more than its size; unpack it yourself if "
                "you trust it, and name the unpacked file"
            )
        buffer[: len(found)] = found
        return len(found)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Raises UserError where a packed file cannot be unpacked."""
    try:
        yield
    except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise UserError(
            f"{path} cannot be unpacked ({one_line(error)}); it is damaged or cut short, so copy or pack it again"
        ) from None


def _refuse_other_kinds(path: Path, begin: bytes) -> None:
    """Raises UserError when the first bytes are those of a file that is no text in UTF-8."""
    for magic, what in _OTHERS.items():
        if begin.startswith(magic):
            raise UserError(f"{path} is {what}")
    if begin[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it")
    wide = next((name for mark, name in _WIDE.items() if begin.startswith(mark)), None)
    if wide is None and len(begin) > 3 and (not any(begin[1:64:2]) or not any(begin[0:64:2])):
        wide = "UTF-16"
    if wide is not None:
        raise UserError(f"{path} is {wide}, not UTF-8; save it as UTF-8 (iconv -f {wide} -t UTF-8)")


def _refuse_encoding(path: Path) -> NoReturn:
    """Raises UserError with the place of the first byte that is not UTF-8."""
    decoder, read, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with _open_bytes(path) as file:
        while True:
            chunk = file.read(CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place, byte = read - pending + error.start, error.object[error.start]
                line += error.object[: error.start].count(b"\n")
                letter = bytes([byte]).decode("cp1252", errors="replace")
                guess = f" ({letter} in Latin-1)" if chunk and letter.isprintable() and letter != "\ufffd" else ""
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{byte:02x} at {place}, in line {line}{guess}; save it as UTF-8"
                ) from None
            read += len(chunk)
            line += chunk.count(b"\n")
            if not chunk:
                raise UserError(f"{path} changed while it was read; try again")
