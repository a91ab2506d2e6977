"""What an analyzer yields: one `Row`, or a `Grid` of rows that differ only in where they were taken.

docs/contract.md, section 7, lists the columns. A place that has no number has no row: NaN in a `Grid` means absent,
and a `Row` may not be NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.runs import AXES, measure_schema

if TYPE_CHECKING:
    import pyarrow


_PART = 1 << 16
"""Rows that are gathered before they become a table: twenty megabytes of it."""
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
    columns = _Columns()
    for item in items:
        if isinstance(item, Grid):
            columns.add_grid(item)
        else:
            columns.add_row(item)
        if columns.n >= _PART:
            yield columns.table()
            columns = _Columns()
    if columns.n:
        yield columns.table()


class _Columns:
    """Rows that become a table together: an Arrow table of more than fifty columns for each grid takes twenty times as long."""

    def __init__(self) -> None:
        self.n = 0
        self._numbers: dict[str, np.ndarray] = {}
        """`value`, `low`, `high`, NaN where absent, and `n`."""
        self._codes: dict[str, np.ndarray] = {}
        """Of each other column that is in use: places in its labels, -1 where it has none."""
        self._labels: dict[str, dict[Any, int]] = {}

    def add_row(self, row: Row) -> None:
        if math.isnan(row.value) or not row.unit:
            raise ValueError(f"{row}: give a number and its unit, or leave the row out")
        _refuse_unknown(row.name, row.place)
        numbers = {"value": row.value, "low": row.low, "high": row.high}
        self._add(1, row, row.n, {name: number for name, number in numbers.items() if number is not None})
        for axis, label in row.place.items():
            self._put(axis, 1, self._code(axis, label))
        self.n += 1

    def add_grid(self, grid: Grid) -> None:
        sizes = [{len(labels) for labels in axis.values()} for axis in grid.axes]
        if not grid.unit or [{size} for size in grid.values.shape] != sizes:
            raise ValueError(
                f"{grid.name}: values {grid.values.shape} in {grid.unit!r} on axes of sizes {sizes}"
            )
        values = grid.values.astype(np.float64).ravel()
        kept = np.flatnonzero(~np.isnan(values))
        count = len(kept)
        n = grid.n if np.ndim(grid.n) == 0 else np.broadcast_to(grid.n, grid.values.shape).ravel()[kept]
        self._add(count, grid, n, {"value": values[kept]})
        for axis, place in zip(grid.axes, np.unravel_index(kept, grid.values.shape), strict=True):
            _refuse_unknown(grid.name, axis)
            for name, labels in axis.items():
                codes = np.array([self._code(name, label) for label in labels], np.int32)
                self._put(name, count, codes[place])
        self.n += count

    def _add(self, count: int, item: Row | Grid, n: Any, numbers: Mapping[str, Any]) -> None:
        for name in ("task_id", "analyzer", "name", "unit"):
            self._put(name, count, self._code(name, getattr(item, name)))
        for name, number in numbers.items():
            column = self._room(self._numbers, name, count, np.nan)
            column[self.n : self.n + count] = number
        self._room(self._numbers, "n", count, 0)[self.n : self.n + count] = n

    def _code(self, column: str, label: Any) -> int:
        if label is None:
            return -1
        labels = self._labels.setdefault(column, {})
        return labels.setdefault(label, len(labels))

    def _put(self, column: str, count: int, codes: int | np.ndarray) -> None:
        self._room(self._codes, column, count, -1)[self.n : self.n + count] = codes

    def _room(self, columns: dict[str, np.ndarray], name: str, count: int, absent: float) -> np.ndarray:
        """A column with room for so many rows more."""
        column = columns.get(name)
        if column is None or len(column) < self.n + count:
            kind = np.int64 if name == "n" else np.float64 if columns is self._numbers else np.int32
            wider = np.full(max(_PART, 2 * (self.n + count)), absent, kind)
            if column is not None:
                wider[: len(column)] = column
            columns[name] = column = wider
        return column

    def table(self) -> pyarrow.Table:
        import pyarrow as pa

        columns: list[Any] = []
        for column in measure_schema():
            if column.name in self._numbers:
                numbers = self._room(self._numbers, column.name, 0, np.nan)[: self.n]
                columns.append(pa.array(numbers, column.type, mask=np.isnan(numbers)))
            elif column.name in self._labels:
                codes = self._room(self._codes, column.name, 0, -1)[: self.n]
                labels = pa.array(list(self._labels[column.name]), column.type)
                places = pa.array(codes, pa.int32(), mask=codes < 0)
                columns.append(pa.DictionaryArray.from_arrays(places, labels).dictionary_decode())
            else:
                columns.append(pa.nulls(self.n, column.type))
        return pa.table(columns, schema=measure_schema())


def _refuse_unknown(name: str, axes: Mapping[str, Any]) -> None:
    if unknown := axes.keys() - AXES.keys():
        raise ValueError(f"{name}: no axis {', '.join(sorted(unknown))}; known are {', '.join(AXES)}")
