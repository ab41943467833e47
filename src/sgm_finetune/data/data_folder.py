"""Checks a data folder before the library `datasets` reads it: no request, no file elsewhere, nothing that unpacks
without bounds."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import mib, one_line
from sgm_finetune.base.untrusted import MAX_YAML, parse_yaml
from sgm_finetune.data.text_file import ALWAYS_UNPACKED, MAX_UNPACKED_FACTOR, check_unpacked, packing_of

_CARDS = ("README.md", ".huggingface.yaml")
"""Where the library `datasets` looks for the places of the data files."""
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\s|$)", re.DOTALL)


def check_folder(path: Path) -> None:
    """Raises UserError when the card of a data folder places data outside the folder, as at an address on the web, and
    when a packed file in it unpacks to far more than its size."""
    for card in (path / name for name in _CARDS):
        if card.is_file():
            for place in _places(_card_values(card)):
                if "://" in place or place.startswith(("/", "~")) or ".." in re.split(r"[/\\]", place):
                    raise UserError(
                        f"{card} places data outside its folder ({place[:100]}), and SGM reads only files in "
                        f"data.name={path}; give data.train=FILE instead, or the name on the hub"
                    )
    for file in sorted(path.rglob("*")):
        if file.is_file():
            try:
                _check_packed(file)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{file} cannot be read: {one_line(error)}; copy it again, or remove it") from None


def _card_values(card: Path) -> Any:
    """The values at the head of a card, between two lines of dashes."""
    try:
        with card.open("rb") as held:
            text = held.read(8 * MAX_YAML).decode("utf-8-sig", errors="replace")
        if card.suffix == ".md":
            found = _FRONT_MATTER.match(text)
            text = found[1] if found else ""
        return parse_yaml(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{card} cannot be read: {one_line(error)}; give data.train=FILE instead") from None


def _places(values: Any, is_place: bool = False) -> Iterator[str]:
    """The texts below each `data_files` and `data_dir`, also those of `split` and `path`."""
    if isinstance(values, str) and is_place:
        yield values
    parts = values.items() if isinstance(values, dict) else [("", one) for one in values or ()]
    for key, inner in parts if isinstance(values, dict | list) else ():
        yield from _places(inner, is_place or key in ("data_files", "data_dir"))


def _check_packed(file: Path) -> None:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            limit = max(ALWAYS_UNPACKED, MAX_UNPACKED_FACTOR * file.stat().st_size)
            if sum(member.file_size for member in archive.infolist()) > limit:
                raise UserError(f"{file} unpacks to more than {mib(limit)}, far more than its size")
    elif packing_of(file) is not None:
        check_unpacked(file)
