"""The output distributions of a run: against τ, their nuclei, their energies and their heat capacity.

Curves are means over the first captured decision of a few tasks; dots are every decision whose measures the page
holds.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from probe.analyzers import distribution as measured
from probe.analyzers.registry import REGISTRY, Measure
from probe.report.rows import Row, estimate, short

_DEFINED = [defined for defined in REGISTRY.values() if defined.analyzer == "distribution"]
SHOWN = frozenset(defined.name for defined in _DEFINED if defined.card)
OF_A_TASK = frozenset(defined.name for defined in _DEFINED if defined.card or isinstance(defined.figure, str))
"""Measures of a single task: what the card shows, and what is one of many numbers of a decision."""
DOTS = 200
P = 0.9
_CURVES = {
    "entropy": (measured.ENTROPY_AT_TEMPERATURE, "temperature"),
    "top1": (measured.TOP1_AT_TEMPERATURE, "temperature"),
    "heat_capacity": (measured.HEAT_CAPACITY_AT_TEMPERATURE, "temperature"),
    "nucleus": (measured.TOP_K_MASS, "k"),
}


def card(whole: list[Row], by_task: dict[str, list[Row]]) -> dict[str, Any] | None:
    """`curves`: by name, [x, mean, low, high]; `energies`: densities by bin; `dots`: [entropy, size, task, step].

    None where nothing was measured: no logits were captured, or the run is not analyzed.
    """
    curves = {name: _curve(_rows(whole, defined), axis) for name, (defined, axis) in _CURVES.items()}
    if not any(curves.values()):  # repetition of the text is measured without logits
        return None
    first = _rows(whole, measured.TOP_K_MASS)
    peak = _rows(whole, measured.HEAT_CAPACITY_PEAK)
    energies = {
        "all": _densities(_rows(whole, measured.ENERGY_DENSITY)),
        "weighted": _densities(_rows(whole, measured.LIKELY_ENERGY_DENSITY)),
    }
    follows = [row for row in _rows(whole, measured.NUCLEUS_FOLLOWS_ENTROPY) if row["p"] == P]
    return {
        "n": first[0]["n"] if first else 0,
        "d_vocab": first[-1]["k"] if first else 0,
        "p": str(P),
        "follows": estimate(follows[0]) if follows else None,
        "fixed": _fixed(whole),
        **_dots(by_task),
        "curves": curves if first else {},
        "energies": energies if first else None,
        "peak": [short(peak[0][name]) for name in ("value", "low", "high")] if peak else None,
    }


def _rows(rows: list[Row], defined: Measure) -> list[Row]:
    return [row for row in rows if (row["analyzer"], row["name"]) == defined.key]


def _curve(rows: list[Row], axis: str) -> list[list[float | None]]:
    return [[short(row[name]) for name in (axis, "value", "low", "high")] for row in rows]


def _densities(rows: list[Row]) -> list[list[float | None]]:
    return [[short(row["energy"]), short(row["value"])] for row in rows]


def _fixed(whole: list[Row]) -> list[dict[str, Any]]:
    small, large = (
        {row["k"]: estimate(row) for row in _rows(whole, defined) if row["p"] == P}
        for defined in (measured.K_TOO_SMALL, measured.K_TOO_LARGE)
    )
    return [{"k": k, "too_small": small_share, "too_large": large.get(k)} for k, small_share in small.items()]


def _dots(by_task: dict[str, list[Row]]) -> dict[str, Any]:
    """Entropy and nucleus size of decisions, the first `DOTS` of them; `decisions` counts all."""
    decisions: dict[tuple[str, str | None, int], dict[str, float]] = defaultdict(dict)
    for task_id, rows in by_task.items():
        for row in rows:
            key = task_id, row["variant"], row["step"]
            if (row["analyzer"], row["name"]) == measured.NUCLEUS_SIZE.key and row["p"] == P:
                decisions[key]["size"] = row["value"]
            elif (row["analyzer"], row["name"]) == measured.ENTROPY.key and row["rule"] is None:
                decisions[key]["entropy"] = row["value"]
    dots = [
        [short(pair["entropy"]), pair["size"], " ".join(filter(None, (task, variant))), step]
        for (task, variant, step), pair in decisions.items()
        if len(pair) == 2
    ]
    return {"dots": dots[:DOTS], "decisions": len(dots)}
