"""Prompting as a bias: a line a variant, curves over layers, and the tokens that each vector raises and lowers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from probe.analyzers.prompting import bias, manifold, recovery, shift
from probe.analyzers.registry import Measure
from probe.prompts.labels import BASE
from probe.report.rows import Estimate, MeasureRows, Row, drawn, short

COLUMNS: tuple[tuple[Measure, str | None, str, str], ...] = (
    (shift.ACCURACY, None, "accuracy", "share of tasks"),
    (shift.KL, None, "KL(variant‖base)", "nats"),
    (shift.LOG_ODDS_SHIFT, None, "log-odds shift", "of the target, nats"),
    (bias.BIAS_R2_FAMILY, None, "R², own family", "one vector each"),
    (bias.BIAS_R2, None, "R², all tasks", "one vector"),
    (bias.BIAS_R2_FAMILY, bias.OTHER_FAMILY, "R², other family", "control"),
)
"""Measure, control, title and unit of each column."""
OVERVIEW = drawn("prompting", "prompting")
"""Shifts of the overview by variant and of the figures of a task."""
SHOWN = OVERVIEW | drawn("prompting", "bias")
_CURVES = (recovery.PATCH_RECOVERY, recovery.PATCH_REMOVAL, recovery.LENS_KL, manifold.MANIFOLD_ALIGNMENT)
BY_LAYER = tuple(defined.name for defined in _CURVES)
_MAKES = {
    bias.BIAS_R2: (
        "whether one vector explains the shift, and its tokens (needs a group of 3 tasks or more)",
        "probe analyze RUN prompting --no-model",
    ),
    recovery.PATCH_RECOVERY: (
        "how much of the shift the activation pattern recovers",
        "probe analyze RUN patch",
    ),
    recovery.LENS_KL: ("the shift by depth", "probe analyze RUN lens"),
    manifold.MANIFOLD_ALIGNMENT: (
        "the task manifold (needs captured hidden states, a variant with examples, 4 tasks or more a family)",
        "probe analyze RUN prompting --no-model",
    ),
}
"""What is told of an absent measure: what it would show, and the command that makes it."""


def card(rows: list[Row]) -> dict[str, Any] | None:
    """`table`: cells of text; `curves`: by variant, {measure, control, points: [layer, value, low, high]};
    `vectors`: by variant, a family each; `missing`: [what, command]. None where no shift was measured."""
    measures = MeasureRows(rows, "prompting")
    variants = measures.labels("kl", "variant")
    if not variants:
        return None
    curves = {variant: _curves(measures, variant) for variant in variants}
    named = [BASE, *variants] if measures.estimate("accuracy", variant=BASE) else variants
    return {
        "columns": [[title, unit] for _, _, title, unit in COLUMNS],
        "table": [_line(measures, variant) for variant in named],
        "recovers": bool(measures.all(recovery.PATCH_RECOVERY_HELDOUT.name)),
        "first": max(variants, key=lambda variant: _size(measures.estimate("kl", variant=variant))),
        "curves": curves,
        "bare": next((curve["points"] for curve in _curves(measures, BASE)), None),
        "n": {name: max(row["n"] for row in measures.all(name)) for name in BY_LAYER if measures.all(name)},
        "vectors": {variant: _vectors(measures, variant) for variant in variants},
        "missing": [list(words) for defined, words in _MAKES.items() if not measures.all(defined.name)],
    }


def _size(estimate: Estimate | None) -> float:
    return estimate["value"] if estimate and isinstance(estimate["value"], float) else 0.0


def _curves(measures: MeasureRows, variant: str) -> list[dict[str, Any]]:
    """Of all families together."""
    curves: dict[tuple[str, str | None], list[list[float | None]]] = defaultdict(list)
    for name in BY_LAYER:
        for row in sorted(measures.all(name), key=lambda row: row["layer"]):
            if row["variant"] == variant and row["family"] is None:
                numbers = (short(row[key]) for key in ("value", "low", "high"))
                curves[name, row["control"]].append([row["layer"], *numbers])
    return [
        {"measure": name, "control": control, "points": points} for (name, control), points in curves.items()
    ]


def _vectors(measures: MeasureRows, variant: str) -> list[dict[str, Any]]:
    """Families in order, last all tasks as one: {family, n, r2, promoted, demoted: [token, nats]}."""
    vectors: dict[str | None, dict[str, Any]] = defaultdict(lambda: {end: [] for end in bias.ENDS})
    for end, defined in bias.ENDS.items():
        for row in sorted(measures.all(defined.name), key=lambda row: row["rank"]):
            if row["variant"] == variant:
                vectors[row["family"]][end].append([row["token"], short(row["value"], 3)])
                vectors[row["family"]]["n"] = row["n"]
    families = sorted(vectors, key=lambda family: (family is None, str(family)))
    return [
        {"family": family, "r2": measures.estimate("bias_r2", variant=variant, family=family)}
        | vectors[family]
        for family in families
    ]


# -- the table, which is drawn without a script --------------------------------------------------------------------


def _line(measures: MeasureRows, variant: str) -> dict[str, Any]:
    estimates = [
        (defined, measures.estimate(defined.name, variant=variant, control=control))
        for defined, control, _, _ in COLUMNS
    ]
    n = max(estimate["n"] for _, estimate in estimates if estimate)
    cells = [_cell(defined, estimate, n) for defined, estimate in estimates]
    held = measures.estimate(recovery.PATCH_RECOVERY_HELDOUT.name, variant=variant)
    recovered = None
    if held:
        recovered = [_number(held["value"]), _between(held["low"], held["high"], _number)]
    return {"variant": variant, "n": n, "cells": cells, "recovered": recovered}


def _cell(defined: Measure, estimate: Estimate | None, n: int) -> list[str] | None:
    """[value, interval and, where it is not the line's, n]."""
    if estimate is None:
        return None
    show = {shift.ACCURACY: _percent, shift.LOG_ODDS_SHIFT: _signed}.get(defined, _number)
    others = f"n {estimate['n']}" if estimate["n"] != n else ""
    return [
        show(estimate["value"]),
        " · ".join(filter(None, (_between(estimate["low"], estimate["high"], show), others))),
    ]


def _between(low: float | None, high: float | None, show: Any) -> str:
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−").replace("inf", "∞")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−").replace("inf", "∞")


def _percent(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"
