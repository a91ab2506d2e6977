"""What an analyzer yields: one `Row`, or a `Grid` of rows that differ only in where they were taken.

docs/contract.md, section 7, lists the columns. A place that has no number has no row: NaN in a `Grid` means absent,
and a `Row` may not be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.runs import AXES, MEASURE_FIELDS, measure_schema

if TYPE_CHECKING:
    import pyarrow


_ROWS, _TABLES = 1 << 14, 256
"""Rows, and tables of fewer, that are held before they become one block: a row is an object of half a kilobyte, a table
one of more than fifty columns."""
_PART = 1 << 16
"""Rows of a part of a table: twenty megabytes."""
WHOLE_RUN = ""
"""The `task_id` of a measure over all tasks of a run; an id in a task file is never empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of measures.parquet."""

    task_id: str
    """Or `WHOLE_RUN`."""
    analyzer: str
    """The name under which the analyzer is called."""
    name: str
    value: float
    unit: str
    n: int
    """How many values `value` is the mean or share of; 1 where it is one number."""
    low: float | None = None
    """95 % interval of an estimate; exact numbers have none."""
    high: float | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    """Where it was taken: axis (a key of `probe.runs.AXES`) → label; an absent axis does not apply."""

    def at(self, axis: str) -> Any:
        """The label at an axis, None where it does not apply."""
        return self.place.get(axis)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Many measures of one task: `values[i, j, …]` is taken at entry i of axes[0], entry j of axes[1], …

    An axis maps columns to the labels of its entries, `{"layer": [0, 1, 2]}`; several columns of one axis
    change together, `{"step": [1, 2, None], "variant": [None, None, "answer"]}`. `n` broadcasts against
    `values`.
    """

    task_id: str
    analyzer: str
    name: str
    unit: str
    values: np.ndarray
    axes: Sequence[Mapping[str, Sequence[Any]]]
    n: int | np.ndarray = 1


def at_step(step: int, items: Iterable[Row | Grid]) -> Iterator[Row | Grid]:
    """The same measures, taken at a step (a turn of an agent)."""
    for item in items:
        if isinstance(item, Row):
            yield replace(item, place={**item.place, "step": step})
        else:
            first, *rest = item.axes
            size = len(next(iter(first.values())))
            yield replace(item, axes=[{**first, "step": [step] * size}, *rest])


def to_table(items: Iterable[Row | Grid]) -> pyarrow.Table:
    """The rows as an Arrow table with the schema of measures.parquet.

    Raises ValueError for a NaN, a missing unit, or axes that do not fit their values.
    """
    import pyarrow as pa

    return pa.concat_tables([measure_schema().empty_table(), *table_parts(items)])


def table_parts(items: Iterable[Row | Grid]) -> Iterator[pyarrow.Table]:
    """The table of `to_table`, about _PART rows at a time. Raises as `to_table`."""
    import pyarrow as pa

    part: list[pyarrow.Table] = []
    small: list[pyarrow.Table] = []
    for table in _tables(items):
        small.append(table)
        if sum(map(len, small)) >= _ROWS or len(small) >= _TABLES:
            part.append(pa.concat_tables(small).combine_chunks())
            small = []
            if sum(map(len, part)) >= _PART:
                yield pa.concat_tables(part)
                part = []
    if part or small:
        yield pa.concat_tables([*part, *small])


def _tables(items: Iterable[Row | Grid]) -> Iterator[pyarrow.Table]:
    """A table for every grid, and for rows between grids, of up to _ROWS of them."""
    for _, group in groupby(items, key=type):
        rows: list[Row] = []
        for item in group:
            if isinstance(item, Grid):
                yield _grid_table(item)
            else:
                rows.append(item)
            if len(rows) == _ROWS:
                yield _measure_table(rows)
                rows = []
        if rows:
            yield _measure_table(rows)


def _measure_table(rows: list[Row]) -> pyarrow.Table:
    import pyarrow as pa

    for row in rows:
        if math.isnan(row.value) or not row.unit:
            raise ValueError(f"{row}: give a number and its unit, or leave the row out")
    for row in rows:
        if unknown := row.place.keys() - AXES.keys():
            raise ValueError(f"{row.name}: no axis {', '.join(sorted(unknown))}; known are {', '.join(AXES)}")
    columns = {name: [getattr(row, name) for row in rows] for name in MEASURE_FIELDS if name not in AXES}
    columns |= {axis: [row.at(axis) for row in rows] for axis in AXES}
    return pa.table({name: columns[name] for name in MEASURE_FIELDS}, schema=measure_schema())


def _grid_table(grid: Grid) -> pyarrow.Table:
    import pyarrow as pa

    sizes = [{len(labels) for labels in axis.values()} for axis in grid.axes]
    if not grid.unit or [{size} for size in grid.values.shape] != sizes:
        raise ValueError(f"{grid.name}: values {grid.values.shape} in {grid.unit!r} on axes of sizes {sizes}")
    schema = measure_schema()
    values = grid.values.astype(np.float64).ravel()
    kept = np.flatnonzero(~np.isnan(values))
    places = np.unravel_index(kept, grid.values.shape)
    columns: dict[str, Any] = {
        "task_id": pa.repeat(grid.task_id, len(kept)),
        "analyzer": pa.repeat(grid.analyzer, len(kept)),
        "name": pa.repeat(grid.name, len(kept)),
        "unit": pa.repeat(grid.unit, len(kept)),
        "value": pa.array(values[kept]),
        "n": pa.array(np.broadcast_to(grid.n, grid.values.shape).ravel()[kept], pa.int64()),
    }
    for axis, place in zip(grid.axes, places, strict=True):
        for name, labels in axis.items():
            columns[name] = pa.array(labels, schema.field(name).type).take(pa.array(place))
    for name in MEASURE_FIELDS:
        columns.setdefault(name, pa.nulls(len(kept), schema.field(name).type))
    return pa.table({name: columns[name] for name in MEASURE_FIELDS}, schema=schema)
