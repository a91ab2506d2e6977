"""The measures of a run as a whole, looked up by name, as the plain values that the cards hold."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from probe.analyzers.registry import REGISTRY
from probe.runs import AXES

Row = dict[str, Any]
Estimate = dict[str, Any]
"""{value, low, high, n}; low and high are None where there is no interval."""


def estimate(row: Row | None) -> Estimate | None:
    return None if row is None else {name: row[name] for name in ("value", "low", "high", "n")}


def short(value: float | None, digits: int = 4) -> float | None:
    """For figures of many numbers, which are embedded to as many digits as they show."""
    return None if value is None else float(f"{value:.{digits}g}")


def drawn(analyzer: str, *cards: str) -> frozenset[str]:
    """Names of an analyzer's measures that these cards draw."""
    return frozenset(
        defined.name
        for defined in REGISTRY.values()
        if defined.analyzer == analyzer and defined.card in cards
    )


class MeasureRows:
    """Rows of one analyzer over all tasks."""

    def __init__(self, rows: list[Row], analyzer: str = "tool"):
        self._rows: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if row["analyzer"] == analyzer:
                self._rows[row["name"]].append(row)

    def all(self, name: str) -> list[Row]:
        return self._rows.get(name, [])

    def estimate(self, name: str, **place: Any) -> Estimate | None:
        """The number with these labels, and with none on any other axis."""
        for row in self.all(name):
            if all(row.get(axis) == place.get(axis) for axis in AXES):
                return estimate(row)
        return None

    def labels(self, name: str, axis: str) -> list[Any]:
        """The labels of a measure on an axis, in the order of its rows."""
        return list(dict.fromkeys(row[axis] for row in self.all(name)))
