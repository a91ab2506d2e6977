"""Measures that no card draws in a picture of its own: a generic picture each, of the kind that its definition names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from probe.analyzers import all_measures
from probe.analyzers.registry import REGISTRY, Figure, Measure
from probe.report.rows import Row, estimate
from probe.runs import AXES

MOST = 600
"""Rows of a measure that the page holds; a picture of more says how many are left out."""


def undrawn() -> dict[tuple[str, str], Measure]:
    """(analyzer, name) → definition of what is drawn by a generic picture."""
    try:
        definitions: Iterable[Measure] = all_measures()
    except Exception:  # an analyzer of another package that cannot be loaded does not cost the report
        definitions = REGISTRY.values()
    return {d.key: d for d in definitions if isinstance(d.figure, Figure) and d.card is None}


def more(rows: list[Row], definitions: dict[tuple[str, str], Measure]) -> list[dict[str, Any]]:
    """Defined measures among these rows, by analyzer: {analyzer, measures: [{name, unit, means, …, rows}]}.

    A row is {at, value, low, high, n}, `at` from axis to label in the order of the definition.
    """
    by_measure: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if (row["analyzer"], row["name"]) in definitions:
            by_measure[row["analyzer"], row["name"]].append(row)
    by_analyzer: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, defined in definitions.items():
        if key in by_measure:
            by_analyzer[defined.analyzer].append(_measure(defined, by_measure[key]))
    return [{"analyzer": name, "measures": measures} for name, measures in by_analyzer.items()]


def plain(row: Row) -> dict[str, Any]:
    """A row of a measure that has no picture, with its place in words."""
    where = ", ".join(f"{axis} {row[axis]}" for axis in AXES if row[axis] is not None)
    kept = ("analyzer", "name", "value", "unit", "low", "high", "n")
    return {name: row[name] for name in kept} | {"where": where}


def _measure(defined: Measure, rows: list[Row]) -> dict[str, Any]:
    assert isinstance(defined.figure, Figure)
    return {
        **{name: getattr(defined, name) for name in ("name", "unit", "means", "source", "interval")},
        **{name: getattr(defined.figure, name) for name in ("kind", "x", "by")},
        "left_out": max(0, len(rows) - MOST),
        "rows": [
            {
                "at": {axis: row[axis] for axis in defined.columns if row[axis] is not None},
                **(estimate(row) or {}),
            }
            for row in rows[:MOST]
        ],
    }
