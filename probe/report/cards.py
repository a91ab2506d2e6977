"""The cards of a run with tools, each from the measures over all tasks; a card without measures is None."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probe.report import attribution, certainty, choices, foresight, inside, patching, steering, why
from probe.report.rows import MeasureRows, Row, drawn

if TYPE_CHECKING:
    from probe.runs import Run

_ACTIONS = (
    *("p_action_accuracy", "p_action_accuracy_direct", "p_action_agreement"),
    *("p_action_gap", "intention_information", "intention_empty", "intention_degenerate"),
)
SHOWN = drawn(
    "tool", "tool", "certainty", "choices", "why", "attribution", "patching", "steering", "heads", "layers"
)
"""Measures that have their place in a card, or in the figures of a task."""


def cards(run: Run, rows: list[Row]) -> dict[str, Any]:
    """Cards by name; `missing` names those that only experiments with the model can fill."""
    measures = MeasureRows(rows)
    out: dict[str, Any] = {
        "certainty": certainty.card(measures),
        "foresight": foresight.card(rows),
        "scorers": choices.scorers(measures),
        "confusion": choices.confusion(measures),
        "orders": choices.orders(measures),
        "why": why.overview(rows),
        "actions": actions(measures),
        "attribution": attribution.attribution(measures),
        "patching": patching.patching(measures),
        "steering": steering.card(measures),
        "heads": inside.heads(measures),
        "layers": inside.layers(run, measures),
    }
    return out | {"missing": _missing(out)}


def actions(measures: MeasureRows) -> list[dict[str, Any]] | None:
    """P(action | state) beside the direct choice: a row a kind of intentions."""
    kinds = measures.labels("p_action_accuracy", "intentions")
    rows = [
        {"kind": kind} | {name: measures.estimate(name, intentions=kind) for name in _ACTIONS}
        for kind in kinds
    ]
    return rows or None


def _missing(cards: dict[str, Any]) -> list[str]:
    """Titles of what is absent although its tasks were measured."""
    if cards["certainty"] is None:
        return []
    absent = {
        "Why this tool?": cards["why"] is None,
        "P(action | state)": cards["actions"] is None,
        "other orders": cards["orders"] is not None and not cards["orders"]["has_orders"],
        "ablation of heads": cards["heads"] is not None and not cards["heads"]["ablation"],
    }
    names = [name for name, is_absent in absent.items() if is_absent]
    lacking = cards["scorers"]["missing"] if cards["scorers"] else []
    return names + ([f"scorers {', '.join(lacking)}"] if lacking else [])
