"""pictures.json: the measurements that the report draws and plan.json does not hold.

The file is small. It holds one histogram for each of at most 8 kinds (of the matrix with the median SNR, as in
`sgm scan --plot`), and the similarities of at most 16 kinds, where readers of the same activations count as one kind.
At its end, a run adds how much the layers of at most 8 pools use each direction.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.files import write_text
from sgm_finetune.base.text import first_mistake
from sgm_finetune.method.plan import Similarity
from sgm_finetune.results.report.histogram import Histogram

if TYPE_CHECKING:
    from torch import Tensor

MAX_KINDS = 8
MAX_LAYERS = 128
"""Tables with more members are left out."""
MAX_DIRECTIONS = 64
"""Of a pool with more directions, the strongest are kept."""


@dataclass(frozen=True)
class SimilarityTable:
    """One `Similarity`: the n·(n-1)/2 values below the diagonal of n members, row by row, to three digits."""

    kind: str
    side: Literal["input", "output"] | None
    members: tuple[str, ...]
    values: tuple[float, ...]

    def matrix(self) -> list[list[float]]:
        """Returns the symmetric n x n matrix with 1 on the diagonal."""
        size = len(self.members)
        table = [[1.0] * size for _ in range(size)]
        below = iter(self.values)
        for row in range(size):
            for column in range(row):
                table[row][column] = table[column][row] = next(below)
        return table


_Strength = Annotated[float, Field(ge=0, le=1)]
_Members = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_LAYERS)]
_OfDirections = Annotated[tuple[_Strength, ...], Field(min_length=1, max_length=MAX_DIRECTIONS)]


@dataclass(frozen=True)
class PoolTable:
    """How much the members of a pool use its directions, when training is over."""

    pool: str
    """The group's name in the plan."""
    members: _Members
    layers_per_direction: Annotated[float, Field(ge=0, le=MAX_LAYERS)]
    """The number of members that use a direction, the mean over all directions (a participation ratio)."""
    num_left_out: Annotated[int, Field(ge=0)]
    """Number of directions beyond the strongest `MAX_DIRECTIONS`."""
    strengths: tuple[_OfDirections, ...]
    """Members x directions, the directions by falling sum over the members, to two digits; 1 is the pool's largest."""


@dataclass(frozen=True)
class Pictures:
    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}

    histograms: tuple[Histogram, ...] = ()
    similarities: tuple[SimilarityTable, ...] = ()
    pools: Annotated[tuple[PoolTable, ...], Field(max_length=MAX_KINDS)] = ()
    format: Literal["sgm-pictures/1"] = "sgm-pictures/1"


_PICTURES = pydantic.TypeAdapter(Pictures)


def similarity_tables(similarities: tuple[Similarity, ...]) -> tuple[SimilarityTable, ...]:
    """Returns the tables of a plan that was just made. A plan from a file has no similarities."""
    kinds = list(dict.fromkeys(one.kind for one in similarities))[: 2 * MAX_KINDS]
    return tuple(
        SimilarityTable(one.kind, one.side, one.members, _below_diagonal(one.values))
        for one in similarities
        if one.kind in kinds and len(one.members) <= MAX_LAYERS
    )


def _below_diagonal(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 3) + 0.0 for row, line in enumerate(values.tolist()) for value in line[:row])


def save_pictures(pictures: Pictures, path: Path) -> None:
    """Writes one line for each picture, so that a person can read the file."""
    lines = [f'"format": {json.dumps(pictures.format)}']
    for name in ("histograms", "similarities", "pools"):
        rows = ",\n  ".join(json.dumps(asdict(one), ensure_ascii=False) for one in getattr(pictures, name))
        lines.append(f'"{name}": [\n  {rows}\n ]' if rows else f'"{name}": []')
    write_text(path, "{" + ",\n ".join(lines) + "}\n")


def parse_pictures(document: object, where: str) -> Pictures:
    """Returns the content of pictures.json. Raises UserError for a document that `save_pictures` would not write."""
    try:
        pictures = _PICTURES.validate_python(document)
    except pydantic.ValidationError as error:
        raise UserError(f"{where} holds no pictures: {first_mistake(error)}; remove the file") from None
    for table in pictures.similarities:
        size = len(table.members)
        if len(table.values) != size * (size - 1) // 2:
            raise UserError(
                f"{where} holds no pictures: `{table.kind}` has {size} members and {len(table.values)} values; remove "
                "the file"
            )
    for table in pictures.pools:
        lengths = {len(row) for row in table.strengths}
        if len(table.strengths) != len(table.members) or len(lengths) != 1:
            raise UserError(
                f"{where} holds no pictures: `{table.pool}` has not one row of equal length for each of its "
                f"{len(table.members)} members; remove the file"
            )
    return pictures
