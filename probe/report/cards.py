"""The cards of a run with tools, each from the measures over all tasks; a card without measures is None."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probe.report import certainty, choices, inside, why
from probe.report.rows import MeasureRows, Row, drawn

if TYPE_CHECKING:
    from probe.runs import Run

_ACTIONS = (
    *("p_action_accuracy", "p_action_accuracy_direct", "p_action_agreement"),
    *("p_action_gap", "intention_information"),
)
SHOWN = drawn("tool", "tool", "certainty", "choices", "why", "heads", "layers")
"""Measures that have their place in a card, or in the figures of a task."""


def cards(run: Run, rows: list[Row]) -> dict[str, Any]:
    """By name; `missing` names what only experiments with the model can fill."""
    found = MeasureRows(rows)
    out: dict[str, Any] = {
        "certainty": certainty.card(found),
        "scorers": choices.scorers(found),
        "confusion": choices.confusion(found),
        "orders": choices.orders(found),
        "why": why.overview(rows),
        "actions": actions(found),
        "heads": inside.heads(found),
        "layers": inside.layers(run, found),
    }
    return out | {"missing": _missing(out)}


def actions(found: MeasureRows) -> list[dict[str, Any]] | None:
    """P(action | state) beside the direct choice: a row a kind of intentions."""
    kinds = found.labels("p_action_accuracy", "intentions")
    rows = [{"kind": kind} | {name: found.one(name, intentions=kind) for name in _ACTIONS} for kind in kinds]
    return rows or None


def _missing(found: dict[str, Any]) -> list[str]:
    """Titles of what is absent although its tasks were measured."""
    if found["certainty"] is None:
        return []
    absent = {
        "Why this tool?": found["why"] is None,
        "P(action | state)": found["actions"] is None,
        "other orders": found["orders"] is not None and not found["orders"]["has_orders"],
        "ablation of heads": found["heads"] is not None and not found["heads"]["ablation"],
    }
    names = [name for name, is_absent in absent.items() if is_absent]
    lacking = found["scorers"]["missing"] if found["scorers"] else []
    return names + ([f"scorers {', '.join(lacking)}"] if lacking else [])
