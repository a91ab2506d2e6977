"""Measures of earlier versions: places that were written into `variant`, `span` or `tool` become columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

Rule = Callable[[Mapping[str, Any]], dict[str, Any]]
"""The row as it was written → the columns that are different now, and `name` or `unit` where the measure is another."""


def _distribution(row: Mapping[str, Any]) -> dict[str, Any]:
    """`base/p=0.9`, `entropy=1`, `few_shot/raw`, `k=40/p=0.9`, `sampled`; a part that is none of these is a variant."""
    columns: dict[str, Any] = {"variant": None}
    for part in (row["variant"] or "").split("/"):
        key, equals, value = part.partition("=")
        if equals and key in ("p", "k", "entropy"):
            axis = "wanted_entropy" if key == "entropy" else key
            columns[axis] = int(value) if key == "k" else float(value)
        elif part in ("raw", "centred"):
            columns["gauge"] = part
        elif part == "sampled":
            columns |= {} if row["name"] == "mass_kept" else {"rule": part}
        elif part:
            columns["variant"] = part
    return columns


RULES: dict[tuple[str, str], Rule] = {
    ("distribution", name): _distribution
    for name in (
        *(
            "entropy",
            "nucleus_size",
            "mass_kept",
            "temperature",
            "heat_capacity",
            "surprisal",
            "log_partition",
        ),
        *("energy_mean", "free_energy", "token_energy"),
        *("nucleus_follows_entropy", "k_too_small", "k_too_large"),
    )
}
"""(analyzer, name) → rule."""


def migrated(table: pyarrow.Table) -> pyarrow.Table:
    """A table of measures, its missing columns added as nulls, with the places of its rows in their own columns."""
    import pyarrow as pa

    columns = {name: table[name].to_pylist() for name in table.column_names}
    rules = [RULES.get(key) for key in zip(columns.get("analyzer", ()), columns.get("name", ()), strict=True)]
    if not any(rules):
        return table
    for index, rule in enumerate(rules):
        if rule:
            row = {name: values[index] for name, values in columns.items()}
            for name, value in rule(row).items():
                columns[name][index] = value
    return pa.table(columns, schema=table.schema)
