"""What analyses, reports and checks of many tasks cost, in counts: tables, reads, comparisons and what is held."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from probe.analyzers.rows import Grid, Row, to_table


def _row(number: int) -> Row:
    return Row(task_id=f"t{number}", analyzer="tool", name="margin", value=number, unit="nats", n=1, low=0.0)


def _grid(number: int) -> Grid:
    values = np.array([[1.0, np.nan], [3.0, float(number)]])
    axes = [{"layer": [0, 4]}, {"tool": ["a", None], "span": [None, "no_tool"]}]
    return Grid(task_id=f"t{number}", analyzer="tool", name="log_prob", unit="nats", values=values, axes=axes)


def test_rows_of_a_thousand_tasks_become_one_table(monkeypatch):
    """A table of more than fifty columns for each grid took most of the time of an analysis."""
    made, make = [], pa.table
    monkeypatch.setattr(pa, "table", lambda *args, **more: made.append(1) or make(*args, **more))
    items = [item for number in range(1000) for item in (_row(number), _grid(number))]
    table = to_table(items)
    assert len(made) == 1
    assert len(table) == 4000
    rows = table.slice(4 * 7, 4).to_pylist()
    given = [{key: value for key, value in row.items() if value is not None} for row in rows]
    common = {"task_id": "t7", "analyzer": "tool", "unit": "nats", "n": 1}
    assert given == [
        common | {"name": "margin", "value": 7.0, "low": 0.0},
        common | {"name": "log_prob", "value": 1.0, "layer": 0, "tool": "a"},
        common | {"name": "log_prob", "value": 3.0, "layer": 4, "tool": "a"},
        common | {"name": "log_prob", "value": 7.0, "layer": 4, "span": "no_tool"},
    ]
    with pytest.raises(ValueError, match="no axis colour"):
        to_table([Row(**{**_fields(_row(0)), "place": {"colour": 1}})])


def _fields(row: Row) -> dict:
    return {name: getattr(row, name) for name in row.__slots__}
