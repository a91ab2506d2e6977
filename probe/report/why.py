"""What the report shows of interventions: what changes a choice, beside what only correlates with it."""

from __future__ import annotations

from typing import Any

from probe.analyzers.tool.causal import FIRST_TWO, ROLES
from probe.analyzers.tool.correlates import CAUSES
from probe.experiments.tool.intentions import DRAWN, ENUMERATED
from probe.prompts.labels import DESCRIPTION, NAME, PARAMETERS
from probe.report.rows import MeasureRows, drawn
from probe.report.rows import estimate as _estimate

SHOWN = drawn("tool", "why")
"""Measures that have their place in the figures of causes, of a task and of the run."""
_EFFECTS = (
    *("knockout", "knockout_random", "knockout_decision", "knockout_decision_random"),
    *("remove_tv", "scramble"),
)
_CAUSES = (*((CAUSES[0], part) for part in (DESCRIPTION, NAME, PARAMETERS, None)), (CAUSES[1], None))
"""Effects by the part that is masked, in the order in which they are to be read."""
_WORDS = 3
_LABELS = {
    "attention": "attention mass",
    "attention_rate": "attention per token",
    "attention_restricted": "attention among tools",
    "attention_without_sink": "attention without the sink",
    "attention_norm": "norm of what is read",
    "description_tokens": "tokens",
    "shown_position": "place in the list",
    "log_prob": "log P itself",
}


def overview(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run's card, from the measures over all tasks; None where no description was masked or exchanged.

    `causes`: by cause, its effect and its controls by role and the correlations with it; `windows`: effect by
    layers; `swap`: slope and shares. Every estimate is {value, low, high, n}.
    """
    measures = MeasureRows(rows)
    causes = [_cause(cause, part, measures) for cause, part in _CAUSES]
    swap = {
        "slope": measures.estimate("swap_slope"),
        "reversed": measures.estimate("swap_follow_description"),
        "first_two": measures.estimate("swap_follow_description", role=FIRST_TWO),
    }
    out = {
        "causes": [cause for cause in causes if cause["effects"] or cause["correlates"]],
        "swap": swap if swap["slope"] or swap["reversed"] else None,
        "windows": _windows(measures),
    }
    return out if any(out.values()) else None


def _cause(cause: str, part: str | None, measures: MeasureRows) -> dict[str, Any]:
    effects = [
        {
            "role": role,
            "effect": effect,
            "control": measures.estimate(f"{cause}_random", role=role, part=part),
            "net": measures.estimate(f"{cause}_minus_random", role=role, part=part),
            "other": measures.estimate(f"{cause}_other", role=role, part=part),
            "beyond_other": measures.estimate(f"{cause}_minus_other", role=role, part=part),
        }
        for role in ROLES
        if (effect := measures.estimate(cause, role=role, part=part))
    ]
    correlates = [
        {
            "label": label,
            "pooled": measures.estimate("causal_spearman", correlate=name, cause=cause, part=part),
            "within": measures.estimate("causal_spearman_within", correlate=name, cause=cause, part=part),
        }
        for name, label in _LABELS.items()
    ]
    present = [row for row in correlates if row["pooled"] or row["within"]]
    name = cause if part is None else f"{cause} {part}"
    return {"name": name, "effects": effects, "correlates": present}


def _windows(measures: MeasureRows) -> list[dict[str, Any]]:
    """Effect of masking the chosen tool's definition in some layers alone, from the first layers on."""
    rows = [row for row in measures.all("knockout_window") if row["role"] == ROLES[0]]
    rows.sort(key=lambda row: (row["layer"], row["layer_to"]))
    return [{"layers": [row["layer"], row["layer_to"]], "effect": _estimate(row)} for row in rows]


def of_task(tools: list[str | None], chosen_tool: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One task's interventions: `entries`, aligned with `tools`, and `intentions`, its numbers by kind.

    `swap` is the change in the log-odds of a tool against the most probable one when the two exchange their
    descriptions; `words` are the largest effects of one masked word, [text, nats].
    """
    if not any(row["name"] in SHOWN for row in rows):
        return None
    axes = ("tool", "other_tool", "intentions")
    whole = [row for row in rows if row["word"] is None and row["part"] is None]
    at = {(row["name"], *(row[axis] for axis in axes)): row for row in whole}
    masked = {(row["tool"], row["part"]): row for row in rows if row["name"] == CAUSES[0]}
    kinds = [k for k in (DRAWN, ENUMERATED) if ("p_action_gap", None, None, k) in at]
    names = (
        "intention_distinct",
        "intention_information",
        "intention_entropy",
        "intention_mass",
        "p_action_gap",
    )
    intentions = [
        {"kind": kind} | {name: _estimate(at.get((name, None, None, kind))) for name in names}
        for kind in kinds
    ]
    entries = [
        {
            "attention_rate": _value(at.get(("attention_rate", tool, None, None))),
            **{name: _estimate(at.get((name, tool, None, None))) for name in _EFFECTS},
            "parts": [_estimate(masked.get((tool, part))) for part in (DESCRIPTION, NAME)],
            "swap": _swap(tool, chosen_tool, at),
            "p_action": [_estimate(at.get(("p_action_given_state", tool, None, kind))) for kind in kinds],
            "words": _words(tool, rows),
        }
        for tool in tools
    ]
    return {"entries": entries, "intentions": intentions}


def _value(row: dict[str, Any] | None) -> float | None:
    return None if row is None else row["value"]


def _swap(tool: str | None, chosen_tool: str, at: dict[Any, dict[str, Any]]) -> float | None:
    exchange, reverse = (at.get(("swap", *pair, None)) for pair in ((tool, chosen_tool), (chosen_tool, tool)))
    if exchange is not None:
        return exchange["value"]
    return None if reverse is None else -reverse["value"]


def _words(tool: str | None, rows: list[dict[str, Any]]) -> list[list[Any]]:
    words = [row for row in rows if row["name"] == "word" and row["tool"] == tool]
    words.sort(key=lambda row: -abs(row["value"]))
    return [[row["word"], row["value"]] for row in words[:_WORDS]]
