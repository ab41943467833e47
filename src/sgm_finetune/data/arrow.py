"""Tables and rows as data sets of the library `datasets`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import one_line
from sgm_finetune.data.tables import Table


def table_of(name: str, dataset: datasets.Dataset) -> Table:
    """The table of a `datasets.Dataset`. It reads a column when the column is used."""
    columns = {column: dataset[column] for column in dataset.column_names}
    return Table(name, columns, class_names(dataset.features), fills_nulls=True)


def column_parts(dataset: datasets.Dataset, column: str) -> Iterator[Any]:
    """The Arrow arrays of a column, a thousand rows each. None of its numbers becomes a Python object."""
    tables: Any = dataset.select_columns(column).with_format("arrow").iter(1000)
    for table in tables:
        yield table[column].combine_chunks()


def class_names(features: Mapping[str, Any] | None) -> dict[str, Sequence[str]]:
    """The class names of each column that holds class labels or lists of class labels."""
    found = {}
    for column, feature in (features or {}).items():
        if isinstance(feature, datasets.List):
            feature = feature.feature
        if isinstance(feature, datasets.ClassLabel):
            found[column] = feature.names
    return found


def read_parquet(path: Path) -> Table:
    """The table in a Parquet file. Raises UserError for a file of another kind."""
    try:
        arrow = pq.read_table(path)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file: {one_line(error)}") from None
    for index, column in enumerate(arrow.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories, which `datasets` does not support
            decoded = arrow.column(index).cast(column.type.value_type)
            arrow = arrow.set_column(index, column.name, decoded)
    return table_of(path.name, datasets.Dataset(InMemoryTable(arrow)))


_FEATURES = {
    "messages": datasets.List(datasets.Json()),  # messages have different keys; a struct would fill them in
    "tools": datasets.Json(),
    "tokens": datasets.List(datasets.Value("string")),
    "tags": datasets.List(datasets.Value("int64")),
}


def dataset_of(rows: dict[str, list]) -> datasets.Dataset:
    """The rows as a data set with fixed types."""
    features = datasets.Features({role: _FEATURES.get(role) or _feature(role, values) for role, values in rows.items()})
    if "messages" in rows:
        return datasets.Dataset.from_dict(rows, features=features)
    return datasets.Dataset(InMemoryTable(pa.Table.from_pydict(rows, features.arrow_schema)))  # from_dict is slow


def with_column(dataset: datasets.Dataset, name: str, values: list) -> datasets.Dataset:
    """The data set with other values in one column, of the same type."""
    changed = dataset.remove_columns(name).add_column(name, values, feature=dataset.features[name])  # type: ignore[call-arg]
    return changed.select_columns(dataset.column_names)


def _feature(role: str, values: list) -> datasets.Value | datasets.List:
    if role == "rejected" and values and isinstance(values[0], list):
        return _FEATURES["messages"]  # type: ignore[return-value]
    if role != "label":
        return datasets.Value("string")
    match values[0]:
        case int():
            return datasets.Value("int64")
        case float():
            return datasets.Value("float32")
    return datasets.List(datasets.Value("float32"))
