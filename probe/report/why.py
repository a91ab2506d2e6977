"""What the report shows of interventions: what changes a choice, beside what only correlates with it."""

from __future__ import annotations

from typing import Any

from probe.analyzers.tool.causal import ROLES
from probe.analyzers.tool.correlates import CAUSES
from probe.report.found import estimate as _estimate

SHOWN = frozenset(
    (
        *("knockout", "knockout_random", "knockout_minus_random"),
        *("knockout_decision", "knockout_decision_random", "knockout_decision_minus_random"),
        *("swap", "swap_share", "scramble", "remove", "remove_tv", "word"),
        *("p_action_given_state", "p_action_gap", "intention_information", "intention_distinct"),
        *("intention_entropy", "intention_mass"),
    )
)
"""Measures of one task that have their place in its figures."""
_EFFECTS = (
    *("knockout", "knockout_random", "knockout_decision", "knockout_decision_random"),
    *("remove_tv", "scramble"),
)
_WORDS = 3
_LABELS = {
    "attention": "attention mass",
    "attention_rate": "attention per token",
    "attention_restricted": "attention among tools",
    "attention_no_sink": "attention without the sink",
    "value_norm": "norm of what is read",
    "description_tokens": "tokens of the description",
    "shown_position": "place in the list",
    "log_prob": "log P itself",
}


def overview(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run's card, from the measures over all tasks; None where no description was masked or exchanged.

    `causes`: by cause, its effect and its control by role and the correlations with it; `windows`: effect by
    layers; `swap`: slope and shares. Every estimate is {value, low, high, n}.
    """
    found = {(row["name"], row["variant"]): row for row in rows if row["analyzer"] == "tool"}
    causes = [_cause(cause, found) for cause in CAUSES]
    swap = {
        "slope": _estimate(found.get(("swap_slope", None))),
        "reversed": _estimate(found.get(("swap_follow_description", None))),
        "first_two": _estimate(found.get(("swap_follow_description", "first two"))),
    }
    out = {
        "causes": [cause for cause in causes if cause["effects"] or cause["correlates"]],
        "swap": swap if swap["slope"] or swap["reversed"] else None,
        "windows": _windows(rows),
    }
    return out if any(out.values()) else None


def _cause(cause: str, found: dict[tuple[str, str | None], dict[str, Any]]) -> dict[str, Any]:
    effects = [
        {
            "role": role,
            "effect": _estimate(found[cause, role]),
            "control": _estimate(found.get((f"{cause}_random", role))),
            "net": _estimate(found.get((f"{cause}_minus_random", role))),
        }
        for role in ROLES
        if (cause, role) in found
    ]
    correlates = [
        {
            "label": label,
            "pooled": _estimate(found.get(("causal_spearman", f"{name}~{cause}"))),
            "within": _estimate(found.get(("causal_spearman_within", f"{name}~{cause}"))),
        }
        for name, label in _LABELS.items()
    ]
    there = [row for row in correlates if row["pooled"] or row["within"]]
    return {"name": cause, "effects": effects, "correlates": there}


def _windows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Effect of masking the chosen tool's description in some layers alone, from the first layers on."""
    found = [
        row
        for row in rows
        if row["name"] == "knockout_window" and (row["variant"] or "").startswith(f"{ROLES[0]}:")
    ]
    found.sort(key=lambda row: (row["layer"], row["variant"]))
    return [{"layers": row["variant"].partition(":")[2], "effect": _estimate(row)} for row in found]


def of_task(tools: list[str | None], chosen_tool: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One task's interventions: `entries`, aligned with `tools`, and `intentions`, its numbers by kind.

    `swap` is the change in the log-odds of a tool against the most probable one when the two exchange their
    descriptions; `words` are the largest effects of one masked word, [text, nats].
    """
    if not any(row["name"] in SHOWN for row in rows):
        return None
    at = {(row["name"], row["tool"], row["variant"]): row for row in rows if row["span"] in (None, "no_tool")}
    kinds = [k for k in ("drawn", "enumerated") if ("intention_distinct", None, k) in at]
    names = (
        "intention_distinct",
        "intention_information",
        "intention_entropy",
        "intention_mass",
        "p_action_gap",
    )
    intentions = [
        {"kind": kind} | {name: _estimate(at.get((name, None, kind))) for name in names} for kind in kinds
    ]
    entries = [
        {
            "attention_rate": _value(at.get(("attention_rate", tool, None))),
            **{name: _estimate(at.get((name, tool, None))) for name in _EFFECTS},
            "swap": _swap(tool, chosen_tool, at),
            "p_action": [_estimate(at.get(("p_action_given_state", tool, kind))) for kind in kinds],
            "words": _words(tool, rows),
        }
        for tool in tools
    ]
    return {"entries": entries, "intentions": intentions}


def _value(row: dict[str, Any] | None) -> float | None:
    return None if row is None else row["value"]


def _swap(tool: str | None, chosen_tool: str, at: dict[Any, dict[str, Any]]) -> float | None:
    own, reverse = at.get(("swap", tool, chosen_tool)), at.get(("swap", chosen_tool, tool))
    if own is not None:
        return own["value"]
    return None if reverse is None else -reverse["value"]


def _words(tool: str | None, rows: list[dict[str, Any]]) -> list[list[Any]]:
    own = [row for row in rows if row["name"] == "word" and row["tool"] == tool]
    own.sort(key=lambda row: -abs(row["value"]))
    return [[row["span"].partition(":")[2], row["value"]] for row in own[:_WORDS]]
