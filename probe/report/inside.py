"""What the inside of the model says of the choice: heads that point at a tool, and layers that it is readable from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probe.analyzers.tool import context
from probe.analyzers.tool.ablation import ALONE, RANDOM, TOGETHER
from probe.analyzers.tool.linear import LABELS, NAMING
from probe.report.rows import MeasureRows, Row, estimate, short

if TYPE_CHECKING:
    from probe.runs import Run


# -- heads -----------------------------------------------------------------------------------------------------


def heads(measures: MeasureRows) -> dict[str, Any] | None:
    """`targets`: matrices [layer][head] of AUROC, interval and corrected p; `ablation` by target and replacement."""
    targets = [_target(measures, role) for role in measures.labels("head_auroc", "role")]
    return {"targets": targets, "ablation": _ablation(measures)} if targets else None


def _target(measures: MeasureRows, role: str) -> dict[str, Any]:
    rows = [row for row in measures.all("head_auroc") if row["role"] == role]
    p = {_place(row): row["value"] for row in measures.all("head_p_corrected") if row["role"] == role}
    layers = sorted({row["layer"] for row in rows})
    at = {_place(row): row for row in rows}
    n_heads = 1 + max(row["head"] for row in rows)

    def matrix(key: str) -> list[list[float | None]]:
        return [[short(at[layer, head][key]) for head in range(n_heads)] for layer in layers]

    survivors = measures.estimate("heads_found", role=role)
    halves = (measures.estimate("head_auroc_heldout", role=role, half=half) for half in (0, 1))
    return {
        "target": role,
        "n": rows[0]["n"],
        "layers": layers,
        "auroc": matrix("value"),
        "low": matrix("low"),
        "high": matrix("high"),
        "p": [[short(p.get((layer, head))) for head in range(n_heads)] for layer in layers],
        "survivors": None if survivors is None else survivors["value"],
        "held_out": measures.estimate("head_auroc_heldout", role=role),
        "held_out_halves": [half for half in halves if half],
    }


def _place(row: Row) -> tuple[int, int]:
    return row["layer"], row["head"]


def _ablation(measures: MeasureRows) -> list[dict[str, Any]]:
    groups = dict.fromkeys((row["role"], row["replacement"]) for row in measures.all("head_ablation"))
    return [_ablated(measures, role, replacement) for role, replacement in groups]


def _ablated(measures: MeasureRows, role: str, replacement: str) -> dict[str, Any]:
    place = {"role": role, "replacement": replacement}
    alone = [
        {"layer": row["layer"], "head": row["head"], "effect": estimate(row)}
        for row in measures.all("head_ablation")
        if row["heads"] == ALONE and {axis: row[axis] for axis in place} == place
    ]
    return {
        "target": role,
        "replace": replacement,
        "chosen": measures.estimate("head_ablation", heads=TOGETHER, **place),
        "random": measures.estimate("head_ablation", heads=RANDOM, **place),
        "rank": measures.estimate("head_ablation_rank", **place),
        "accuracy": {
            name: measures.estimate("head_ablation_accuracy", heads=heads, **place)
            for name, heads in (("base", None), ("chosen", TOGETHER), ("random", RANDOM))
        },
        "alone": sorted(alone, key=lambda row: row["effect"]["value"]),
    }


# -- layers ----------------------------------------------------------------------------------------------------


def layers(run: Run, measures: MeasureRows) -> dict[str, Any] | None:
    """`probes`: by state and target, accuracy and control by layer; `missing` says why there are no states."""
    rows = measures.all("probe_accuracy")
    if not rows:
        # Only where the tool analyzer looked: the calibration of a task's choice needs no capture.
        reason = context.missing(run) if measures.all("tau_entropy") else None
        return None if reason is None else {"missing": reason, "probes": []}
    places = dict.fromkeys((row["state"], row["role"], row["rule"]) for row in rows)
    return {"missing": None, "probes": [_probe(measures, *place) for place in places]}


def _probe(measures: MeasureRows, state: str, role: str, rule: str) -> dict[str, Any]:
    place = {"state": state, "role": role, "rule": rule}

    def curve(name: str, control: str | None = None) -> list[list[float | None]]:
        wanted = place | {"control": control}
        rows = [row for row in measures.all(name) if {axis: row[axis] for axis in wanted} == wanted]
        rows.sort(key=lambda row: row["layer"])
        return [[row["layer"], *(short(row[key]) for key in ("value", "low", "high"))] for row in rows]

    decodable, chance = (
        measures.estimate("decodable_layer", **place),
        measures.estimate("probe_chance", **place),
    )
    return {
        "state": state,
        "target": role,
        "names_tools": rule == NAMING,
        "n": chance["n"] if chance else None,
        "chance": chance["value"] if chance else None,
        "decodable": None if decodable is None else int(decodable["value"]),
        "accuracy": curve("probe_accuracy"),
        "control": curve("probe_accuracy", LABELS),
        "selectivity": curve("probe_selectivity"),
        "auroc": curve("probe_auroc"),
    }
