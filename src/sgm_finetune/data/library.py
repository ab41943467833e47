"""Reads data with the library `datasets`: folders, the hub, and streams."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from sgm_finetune.base.config import DataConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.hub import explain_hub_error
from sgm_finetune.base.text import one_line
from sgm_finetune.data.arrow import class_names, table_of
from sgm_finetune.data.data_folder import check_folder
from sgm_finetune.data.embedded import EMBEDDED
from sgm_finetune.data.sources import HUB_SPLITS, Source, Split, check_hub_name
from sgm_finetune.data.tables import Table, find_separator, tells_separator, type_of
from sgm_finetune.data.text_file import packing_of


def open_named(name: str) -> Source:
    """The data set in the folder `name`, or the hub data set of that name. Raises UserError when it cannot be read."""
    path = Path(name)
    loaded = load_folder(path) if path.is_dir() else load_hub(name)
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    tables: dict[Split, Table] = {
        split: table_of(f"{name} ({alias})", loaded[alias]) for split, alias in _aliases(name, loaded).items()
    }
    for table in tables.values():
        if not table.columns or not len(next(iter(table.columns.values()))):
            raise UserError(f"data.name={name}: {table.name} has no rows")
    return Source(name, tables)


def _aliases(name: str, loaded: Any) -> dict[Split, str]:
    """The name that a data set gives to each of its splits. Raises UserError when it has no training split."""
    found: dict[Split, str] = {}
    for split, aliases in HUB_SPLITS.items():
        if alias := next((alias for alias in aliases if alias in loaded), None):
            found[split] = alias
    if "train" not in found:
        raise UserError(f"data.name={name} has no split `train` (has: {', '.join(map(str, loaded))})")
    return found


_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", {"sep": ","}),
    "tsv": ("csv", {"sep": "\t"}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
}
"""Streaming readers of `datasets` and their options, by file type."""
SHUFFLE_BUFFER = 10_000
"""Rows of a stream in memory, from which the next row is chosen at random."""


def open_stream(config: DataConfig, files: Mapping[Split, str]) -> Source:
    """Reads `data.num_*` rows of each split. Splits that the source lacks come from the training stream."""
    streams: dict[Split, datasets.IterableDataset] = (
        {split: _stream_file(Path(name), f"data.{split}", config) for split, name in files.items()}
        if config.name is None
        else _stream_name(config.name)
    )
    counts: dict[Split, int] = {split: getattr(config, f"num_{split}") for split in HUB_SPLITS}
    absent: dict[Split, int] = {split: count for split, count in counts.items() if split not in streams}
    tables: dict[Split, Table] = {}
    for split, stream in streams.items():
        wanted = counts[split] + (sum(absent.values()) if split == "train" else 0)
        name = f"{config.name or getattr(config, split)}, streamed"
        with _explained(name):
            taken = list(stream.shuffle(seed=config.seed, buffer_size=SHUFFLE_BUFFER).take(wanted + wanted // 20))
        if not taken:
            raise UserError(f"{name}: no rows")
        columns = dict.fromkeys(column for row in taken for column in row)
        rows = {column: [row.get(column) for row in taken] for column in columns}
        tables[split] = Table(name, rows, class_names(stream.features), fills_nulls=True)
    return Source(f"{config.name or Path(str(config.train)).name}, streamed", tables, absent)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Raises UserError where a reader or the network raises anything."""
    try:
        yield
    except Exception as error:
        reason = one_line(_root_cause(error))
        raise UserError(f"{name}: {reason}; correct it, or set data.streaming=false") from error


def _stream_file(path: Path, key: str, config: DataConfig) -> datasets.IterableDataset:
    kind = type_of(path, key, config.file_type)
    if kind not in _BUILDERS:
        raise UserError(f"{key}={path} cannot be streamed; set data.file_type to one of {' '.join(_BUILDERS)}")
    if not path.stat().st_size:
        raise UserError(f"{key}={path} has no rows")
    builder, options = _BUILDERS[kind]
    if builder == "csv":
        options = {"sep": find_separator(path, options["sep"]), "skiprows": int(tells_separator(path))}
    if packing_of(path) == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise UserError(
            f"{key}={path}: streaming .zst needs zstandard (pip install zstandard); set data.streaming=false"
        )
    with _explained(f"{key}={path}"):
        return datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)


def _stream_name(name: str) -> dict[Split, datasets.IterableDataset]:
    if name in EMBEDDED:
        raise UserError(
            f"data.streaming=true does not work with the embedded data.name={name}; set data.streaming=false"
        )
    repository, _, subset = name.partition(":")
    if Path(repository).is_dir():
        check_folder(Path(repository))
    try:
        loaded = datasets.load_dataset(repository, subset or None, streaming=True)
    except Exception as error:  # as in load_hub
        raise UserError(f"data.name={name} cannot be streamed: {_explain(error, repository)}") from error
    return {split: loaded[alias] for split, alias in _aliases(name, loaded).items()}


def load_folder(path: Path) -> datasets.DatasetDict | datasets.Dataset:
    """The data set in a folder: one from `save_to_disk`, or data files in the layout of the hub."""
    check_folder(path)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path), keep_in_memory=True)
        with tempfile.TemporaryDirectory() as cache, _no_progress_bars():
            return datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # the library raises dozens of types, its builders any other
        raise UserError(
            f"data.name={path}: this folder cannot be loaded as a data set: {one_line(_root_cause(error))}; "
            "give data.train=FILE instead"
        ) from error


def load_hub(name: str) -> datasets.DatasetDict:
    """The hub data set `owner/name`, or the subset `owner/name:subset` of it."""
    check_hub_name(name)
    repository, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(repository, subset or None)
    except Exception as error:  # as in load_folder, or the network
        raise UserError(
            f"data.name={name} is not one of {', '.join(EMBEDDED)} and cannot be loaded from the hub: "
            f"{_explain(error, repository)}, or give data.train=FILE"
        ) from error


def _explain(error: Exception, repository: str) -> str:
    """Why a hub data set could not be loaded, and the remedy: its files are wrong, or their download failed."""
    root = _root_cause(error)
    is_of_files = isinstance(root, DatasetsError) or not isinstance(root, OSError)
    if isinstance(error, DatasetsError) and not isinstance(error, DatasetNotFoundError) and is_of_files:
        return f"{one_line(root)}; look at its files on the hub"
    return explain_hub_error(error, "data set", repository)


def _root_cause(error: BaseException) -> Exception:
    """The error inside `An error occurred while generating the dataset`, which `datasets` wraps around it."""
    while isinstance(error, DatasetsError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error  # type: ignore[return-value]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    were_on = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()
