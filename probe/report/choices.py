"""What the choices of a run depend on: the scorer, the order of the tools, and which tool is taken for which."""

from __future__ import annotations

from collections import Counter
from typing import Any

from probe.analyzers.tool.orders import ORDER
from probe.analyzers.tool.scorers import SCORERS
from probe.prompts.labels import NO_TOOL
from probe.report.rows import Estimate, MeasureRows, Row, estimate, short

TOOLS = 24
"""Candidates of the confusion matrix; those that are confused less often are left out of it."""
_PAIRS = 12


# -- scorers ---------------------------------------------------------------------------------------------------


def scorers(measures: MeasureRows) -> dict[str, Any] | None:
    """A row a scorer, and the names of those whose experiments were not made."""
    columns = {
        "accuracy": "accuracy_scorer",
        "accuracy_tools": "accuracy_scorer_tools",
        "position_bias": "position_bias_scorer",
        "tool_bias": "tool_bias_scorer",
        "agreement": "scorer_agreement",
        "agreement_tools": "scorer_agreement_tools",
    }
    present = {row["scorer"] for name in columns.values() for row in measures.all(name)}
    if not present:
        return None
    rows = [
        {"scorer": scorer} | {key: measures.estimate(name, scorer=scorer) for key, name in columns.items()}
        for scorer in SCORERS
        if scorer in present
    ]
    intervened = ("pmi", "contextual_calibration", "orders", "pmi_orders")
    return {"rows": rows, "missing": [scorer for scorer in intervened if scorer not in present]}


# -- confusion -------------------------------------------------------------------------------------------------


def confusion(measures: MeasureRows) -> dict[str, Any] | None:
    """`pairs` that are confused most, and the matrix: `cells` [right, chosen, hits, low, high] by index into
    `names`, `right_n` tasks with each right choice.

    A pair that no task shows together has no cell. With more than TOOLS candidates the matrix holds those that
    take part in most confusions.
    """
    rows = measures.all("confusion")
    if not rows:
        return None
    mass = {_pair(row): estimate(row) for row in measures.all("confusion_mass")}
    share = {_pair(row): row for row in rows}
    wrong = [row for row in rows if _pair(row)[0] != _pair(row)[1]]
    involved: Counter[str | None] = Counter()
    for row in wrong:
        for name in set(_pair(row)):
            involved[name] += _hits(row)
    everyone = list(dict.fromkeys(name for pair in share for name in pair))
    everyone.sort(key=lambda name: (name is None, name or ""))
    kept = set(everyone)
    if len(kept) > TOOLS:
        kept = {name for name, hits in involved.most_common(TOOLS) if hits}
    names = [name for name in everyone if name in kept]
    index = {name: place for place, name in enumerate(names)}
    right_n = {_pair(row)[0]: row["n"] for row in rows}
    return {
        "names": names,
        "right_n": [right_n.get(name, 0) for name in names],
        "left_out": len(everyone) - len(names),
        "cells": [
            [index[right], index[chosen], _hits(row), short(row["low"]), short(row["high"])]
            for (right, chosen), row in share.items()
            if right in index and chosen in index
        ],
        "pairs": [
            {"right": right, "chosen": chosen, "share": estimate(share.get((right, chosen))), "mass": p}
            for (right, chosen), p in _worst(mass, share)
        ],
        "n_wrong": sum(map(_hits, wrong)),
        "n": sum(right_n.values()),
    }


def _pair(row: Row) -> tuple[str | None, str | None]:
    """(right, chosen), no-tool as None."""
    return row["tool"], None if row["other_tool"] == NO_TOOL else row["other_tool"]


def _hits(row: Row) -> int:
    return round(row["value"] * row["n"])


def _worst(mass: dict[Any, Estimate | None], share: dict[Any, Row]) -> list[tuple[Any, Estimate | None]]:
    """Pairs by tasks confused, then by the probability that all their tasks gave to the wrong one."""

    def size(entry: tuple[Any, Estimate | None]) -> tuple[int, float]:
        pair, p = entry
        return _hits(share[pair]) if pair in share else 0, p["value"] * p["n"] if p else 0.0

    return sorted(mass.items(), key=size, reverse=True)[:_PAIRS]


# -- order -----------------------------------------------------------------------------------------------------

_BOTH = (
    *("position_bias", "position_bias_choice", "tool_bias", "tool_bias_choice"),
    *("first_slot_probability", "first_slot_rate", "baseline_first_slot"),
)
_ORDERS_ONLY = (
    *("flip_rate", "flip_rate_tools", "accuracy_orders", "accuracy_orders_tools"),
    *("accuracy_mean_order", "accuracy_mean_order_tools"),
)


def orders(measures: MeasureRows) -> dict[str, Any] | None:
    """`rows` by measure, as shown and over orders; `slots` by number of tools, the choices of each slot."""
    if not measures.all("position_bias"):
        return None
    rows: list[dict[str, Any]] = [
        {"name": name, "shown": measures.estimate(name), "orders": measures.estimate(name, experiment=ORDER)}
        for name in _BOTH
    ]
    rows += [{"name": name, "shown": None, "orders": measures.estimate(name)} for name in _ORDERS_ONLY]
    return {
        "rows": [row for row in rows if row["shown"] or row["orders"]],
        "slots": _slots(measures),
        "has_orders": ORDER in measures.labels("position_bias", "experiment"),
    }


def _slots(measures: MeasureRows) -> list[dict[str, Any]]:
    by_count: dict[int, list[dict[str, Any]]] = {}
    for row in measures.all("slot_rate"):
        count = row["n_tools"]
        slots = by_count.setdefault(count, [{"shown": None, "orders": None} for _ in range(count)])
        slots[row["slot"] - 1]["orders" if row["experiment"] == ORDER else "shown"] = estimate(row)
    return [{"n_tools": count, "slots": slots} for count, slots in sorted(by_count.items())]
