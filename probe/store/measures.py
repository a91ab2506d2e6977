"""The table of measures: what one row holds, and how it is read and written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from probe.store.files import Fault, read_file

if TYPE_CHECKING:
    import pyarrow

MEASURE_FIELDS = {
    "task_id": "string",
    "analyzer": "string",
    "name": "string",
    "value": "float64",
    "unit": "string",
    "low": "float64?",
    "high": "float64?",
    "n": "int64",
    "layer": "int32?",
    "head": "int32?",
    "step": "int32?",
    "span": "string?",
    "tool": "string?",
    "variant": "string?",
}
"""Columns in order and their types; `?` marks those that are null where they do not apply."""


def measure_schema() -> pyarrow.Schema:
    """The Arrow schema of measures.parquet."""
    import pyarrow as pa

    kinds = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64(), "int32": pa.int32()}
    return pa.schema(
        [pa.field(name, kinds[kind.rstrip("?")], kind.endswith("?")) for name, kind in MEASURE_FIELDS.items()]
    )


def encode_measures(table: pyarrow.Table) -> bytes:
    """Parquet bytes of a table with the columns of MEASURE_FIELDS, in any order.

    Raises ValueError when a column is missing or unknown, does not convert, or is null where it may not be.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sorted(table.column_names) != sorted(MEASURE_FIELDS):
        differ = set(table.column_names) ^ set(MEASURE_FIELDS)
        raise ValueError(f"measures need exactly the columns {list(MEASURE_FIELDS)}; check {sorted(differ)}")
    table = table.select(list(MEASURE_FIELDS))
    for name, kind in MEASURE_FIELDS.items():
        if not kind.endswith("?") and table[name].null_count:
            raise ValueError(f"measures: {table[name].null_count} rows have no {name}")
    try:
        table = table.cast(measure_schema())
    except pa.ArrowInvalid as error:
        raise ValueError(f"measures: {error}") from error
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_measures(path: Path) -> pyarrow.Table:
    """The table in a measures.parquet. Raises a Fault when the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_file(path)
    try:
        return pq.read_table(io.BytesIO(data)).cast(measure_schema())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise Fault(path, "altered", f"not a table of measures: {error}"[:200]) from error
