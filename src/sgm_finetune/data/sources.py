"""Opens the source of the data: an embedded data set, files, a folder or the hub."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.data.embedded import EMBEDDED
from sgm_finetune.data.mixture import in_entry
from sgm_finetune.data.tables import Table, read_file, type_of

Split = Literal["train", "validation", "test"]

HUB_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names of each split in hub data sets and folders, in the order in which SGM looks for them."""


@dataclass(frozen=True)
class Source:
    """An open source: always `train`, and `validation` and `test` when the source has them."""

    name: str
    tables: dict[Split, Table]
    sizes: dict[Split, int] = field(default_factory=dict)
    """Rows of the splits that still come from the training data. For others, `data.*_fraction` decides."""


def is_on_hub(config: DataConfig) -> bool:
    """Whether the name of the data can only be that of a hub data set."""
    return config.name is not None and config.name not in EMBEDDED and not Path(config.name).exists()


def numbered(config: DataConfig) -> list[tuple[int | None, DataConfig]]:
    """The configuration of each source, with its entry's number in the mixture; None for an only source."""
    return [(number if config.mixture is not None else None, one) for number, one in enumerate(config.sources, start=1)]


def open_sources(config: DataConfig) -> list[Source]:
    """The tables of all sources. Raises UserError as `open_source`, with the entry of the mixture."""
    for number, one in numbered(config):  # before any is read
        with in_entry(number):
            check_settings(one)
    opened = []
    for number, one in numbered(config):
        with in_entry(number):
            opened.append(open_source(one))
    return opened


def open_source(config: DataConfig) -> Source:
    """The tables of `data.name`, or of `data.train`, `data.validation` and `data.test`.

    Raises UserError for missing, unreadable or contradictory settings.
    """
    files = check_settings(config)
    if config.streaming:
        from sgm_finetune.data.library import open_stream  # here: the library takes seconds to load

        return open_stream(config, files)
    if config.name is None:
        return open_files(config, files)
    if config.name in EMBEDDED:
        named = Source(config.name, {"train": EMBEDDED[config.name]()})
    else:
        from sgm_finetune.data.library import open_named

        named = open_named(config.name)
    return replace(named, tables={**named.tables, **_read_files(config, files)})


def check_settings(config: DataConfig) -> dict[Split, str]:
    """The file of each split, {} with `data.name`. Raises UserError for contradictory settings and missing files."""
    files: dict[Split, str] = {split: name for split in HUB_SPLITS if (name := getattr(config, split)) is not None}
    if config.name is None and "train" not in files:
        if files:
            raise UserError(f"data.{next(iter(files))} needs data.train too")
        raise UserError(f"No data: give data.train=FILE or data.name, for example data.name={next(iter(EMBEDDED))}")
    if config.name is not None and Path(config.name).is_file():
        raise UserError(f"data.name={config.name} is a file; give it as data.train={config.name}")
    if config.name is not None and not Path(config.name).is_dir():
        check_hub_name(config.name)
    for split, name in files.items():
        type_of(Path(name), f"data.{split}", config.file_type)
    return files


def check_hub_name(name: str) -> None:
    """Raises UserError for the misspelt name of an embedded data set, before the hub is asked for it."""
    near = difflib.get_close_matches(name.replace("_", "-").lower(), EMBEDDED, n=1, cutoff=0.8)
    if near and "/" not in name and name not in EMBEDDED:
        raise UserError(f"Unknown data.name={name}; did you mean `{near[0]}`? (a hub data set is owner/name)")


def open_files(config: DataConfig, files: Mapping[Split, str], num_rows: int | None = None) -> Source:
    """The tables of the files, or their first rows. Raises UserError for a file that cannot be read."""
    return Source(Path(files["train"]).name, _read_files(config, files, num_rows))


def _read_files(config: DataConfig, files: Mapping[Split, str], num_rows: int | None = None) -> dict[Split, Table]:
    return {split: read_file(Path(name), f"data.{split}", config.file_type, num_rows) for split, name in files.items()}


def peek(config: DataConfig, num_rows: int = 100) -> Table:
    """The first rows of the training data; all rows when the source cannot be read in part."""
    files = check_settings(config)
    source = open_files(config, {"train": files["train"]}, num_rows) if "train" in files else open_source(config)
    return source.tables["train"]
