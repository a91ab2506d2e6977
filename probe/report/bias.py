"""Prompting as a bias: a line a variant, curves over layers, and the tokens that each vector raises and lowers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from probe.prompts.labels import BASE
from probe.report.rows import Estimate, MeasureRows, Row, short

COLUMNS = (
    ("accuracy", "accuracy", "share of tasks"),
    ("kl", "KL(variant‖base)", "nats"),
    ("log_odds_shift", "log-odds shift", "of the target, nats"),
    ("bias_r2_family", "R², own family", "one vector each"),
    ("bias_r2", "R², all tasks", "one vector"),
    ("bias_r2_shuffled", "R², other family", "control"),
)
"""Measure → title and unit of its column."""
OVERVIEW = ("js", "tv", "entropy_change")
"""With the columns above, what the overview by variant shows."""
BY_LAYER = (
    *("patch_recovery", "patch_recovery_random", "patch_recovery_shuffled", "patch_removal", "lens_kl"),
    *("manifold_alignment", "manifold_alignment_random", "manifold_alignment_other"),
)
_ENDS = ("promoted", "demoted")
SHOWN = frozenset((*(column[0] for column in COLUMNS), *OVERVIEW, *BY_LAYER, "bias_promoted", "bias_demoted"))
_MAKES = {
    "bias_r2": (
        "whether one vector explains the shift, and its tokens (needs a group of 3 tasks or more)",
        "probe analyze RUN prompting --no-model",
    ),
    "patch_recovery": ("how much of the shift the activation pattern recovers", "probe analyze RUN patch"),
    "lens_kl": ("the shift by depth", "probe analyze RUN lens"),
    "manifold_alignment": (
        "the task manifold (needs captured hidden states, a variant with examples, 4 tasks or more a family)",
        "probe analyze RUN prompting --no-model",
    ),
}
"""What is told of an absent measure: what it would show, and the command that makes it."""


def card(rows: list[Row]) -> dict[str, Any] | None:
    """`table`: cells of text; `curves`: by variant and measure, [layer, value, low, high]; `vectors`: by variant,
    a family each; `missing`: [what, command]. None where no shift was measured."""
    found = MeasureRows(rows, "prompting")
    variants = [variant for variant in found.variants("kl") if variant is not None]
    if not variants:
        return None
    curves = {variant: _curves(found, variant) for variant in variants}
    named = [BASE, *variants] if found.one("accuracy", BASE) else variants
    strongest = max(variants, key=lambda variant: _size(found.one("kl", variant)))
    return {
        "columns": [[title, unit] for _, title, unit in COLUMNS],
        "table": [_line(found, variant, curves.get(variant, {})) for variant in named],
        "recovers": any("patch_recovery" in of for of in curves.values()),
        "first": strongest,
        "curves": curves,
        "bare": _curves(found, BASE).get("manifold_alignment"),
        "n": {name: max(row["n"] for row in found.all(name)) for name in BY_LAYER if found.all(name)},
        "vectors": {variant: _vectors(found, variant) for variant in variants},
        "missing": [list(said) for name, said in _MAKES.items() if not found.all(name)],
    }


def _size(found: Estimate | None) -> float:
    return found["value"] if found and isinstance(found["value"], float) else 0.0


def _curves(found: MeasureRows, variant: str) -> dict[str, list[list[float | None]]]:
    curves = {}
    for name in BY_LAYER:
        own = [row for row in found.all(name) if row["variant"] == variant and row["span"] is None]
        if own:
            numbers = ([row["layer"], *(short(row[key]) for key in ("value", "low", "high"))] for row in own)
            curves[name] = sorted(numbers, key=lambda point: point[0])
    return curves


def _vectors(found: MeasureRows, variant: str) -> list[dict[str, Any]]:
    """Families in order, last all tasks as one: {family, n, r2, promoted, demoted: [token, nats]}."""
    named: dict[str | None, dict[str, Any]] = defaultdict(lambda: {end: [] for end in _ENDS})
    for end in _ENDS:
        own = [row for row in found.all(f"bias_{end}") if row["variant"] == variant]
        for row in sorted(own, key=lambda row: row["step"]):
            named[row["span"]][end].append([row["tool"], short(row["value"], 3)])
            named[row["span"]]["n"] = row["n"]
    families = sorted(named, key=lambda family: (family is None, str(family)))
    return [
        {"family": family, "r2": found.one("bias_r2", variant, family)} | named[family] for family in families
    ]


# -- the table, which is drawn without a script --------------------------------------------------------------------


def _line(found: MeasureRows, variant: str, curves: dict[str, Any]) -> dict[str, Any]:
    estimates = {name: found.one(name, variant) for name, _, _ in COLUMNS}
    n = max(one["n"] for one in estimates.values() if one)
    cells = [_cell(name, one, n) for name, one in estimates.items()]
    best = max(curves.get("patch_recovery", []), key=lambda point: point[1], default=None)
    recovered = None
    if best:
        layer, value, low, high = best
        recovered = [f"{_number(value)} at layer {layer}", _between(low, high, _number)]
    return {"variant": variant, "n": n, "cells": cells, "recovered": recovered}


def _cell(name: str, found: Estimate | None, n: int) -> list[str] | None:
    """[value, interval and, where it is not the line's, n]."""
    if found is None:
        return None
    show = {"accuracy": _percent, "log_odds_shift": _signed}.get(name, _number)
    others = f"n {found['n']}" if found["n"] != n else ""
    return [
        show(found["value"]),
        " · ".join(filter(None, (_between(found["low"], found["high"], show), others))),
    ]


def _between(low: float | None, high: float | None, show: Any) -> str:
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−").replace("inf", "∞")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−").replace("inf", "∞")


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"
