"""What the inside of the model says of the choice: heads that point at a tool, and layers that it is readable from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probe.analyzers.tool import context
from probe.report.rows import MeasureRows, Row, estimate, short

if TYPE_CHECKING:
    from probe.runs import Run

BY_LAYER = frozenset(
    (
        *("head_auroc", "head_p_corrected", "head_ablation"),
        *("probe_accuracy", "probe_selectivity", "probe_auroc"),
    )
)
"""Measures by layer or head, of the run as a whole, that the cards need."""
SHOWN = BY_LAYER | {
    *("head_p", "heads_found", "head_auroc_heldout", "head_ablation_rank", "head_ablation_accuracy"),
    *("probe_chance", "decodable_layer"),
}
_TARGETS = ("chosen", "right")


# -- heads -----------------------------------------------------------------------------------------------------


def heads(found: MeasureRows) -> dict[str, Any] | None:
    """`targets`: matrices [layer][head] of AUROC, interval and corrected p; `ablation` by target."""
    targets = [_target(found, target) for target in _TARGETS]
    there = [target for target in targets if target]
    if not there:
        return None
    return {"targets": there, "ablation": _ablation(found)}


def _target(found: MeasureRows, target: str) -> dict[str, Any] | None:
    rows = [row for row in found.all("head_auroc") if row["variant"] == target]
    if not rows:
        return None
    p = {_place(r): r["value"] for r in found.all("head_p_corrected") if r["variant"] == target}
    layers = sorted({row["layer"] for row in rows})
    at = {_place(row): row for row in rows}
    n_heads = 1 + max(row["head"] for row in rows)

    def matrix(key: str) -> list[list[float | None]]:
        return [[short(at[layer, head][key]) for head in range(n_heads)] for layer in layers]

    survivors = found.one("heads_found", target)
    return {
        "target": target,
        "n": rows[0]["n"],
        "layers": layers,
        "auroc": matrix("value"),
        "low": matrix("low"),
        "high": matrix("high"),
        "p": [[short(p.get((layer, head))) for head in range(n_heads)] for layer in layers],
        "found": None if survivors is None else survivors["value"],
        "held_out": found.one("head_auroc_heldout", target),
        "held_out_halves": [
            half
            for number in (0, 1)
            if (half := found.one("head_auroc_heldout", target, f"chosen on half {number}"))
        ],
    }


def _place(row: Row) -> tuple[int, int]:
    return row["layer"], row["head"]


def _ablation(found: MeasureRows) -> list[dict[str, Any]]:
    out = []
    for target in _TARGETS:
        for replaced, ending in (("zero", ""), ("mean", "/mean")):
            chosen = found.one("head_ablation", f"chosen{ending}", target)
            alone = [
                {"layer": row["layer"], "head": row["head"], "effect": estimate(row)}
                for row in found.all("head_ablation")
                if (row["variant"], row["span"]) == (f"alone{ending}", target) and row["layer"] is not None
            ]
            if chosen is None and not alone:
                continue
            accuracy = ("base", "chosen", "random")
            out.append(
                {
                    "target": target,
                    "replace": replaced,
                    "chosen": chosen,
                    "random": found.one("head_ablation", f"random{ending}", target),
                    "rank": found.one("head_ablation_rank", f"chosen{ending}", target),
                    "accuracy": {
                        name: found.one("head_ablation_accuracy", f"{name}{ending}", target)
                        for name in accuracy
                    },
                    "alone": sorted(alone, key=lambda row: row["effect"]["value"]),
                }
            )
    return out


# -- layers ----------------------------------------------------------------------------------------------------


def layers(run: Run, found: MeasureRows) -> dict[str, Any] | None:
    """`probes`: by state and target, accuracy and control by layer; `missing` says why there are no states."""
    rows = found.all("probe_accuracy")
    if not rows:
        # Only where the tool analyzer looked: the calibration of a task's choice needs no capture.
        reason = context.missing(run) if found.all("tau_entropy") else None
        return None if reason is None else {"missing": reason, "probes": []}
    places = [(r["span"], r["variant"]) for r in rows if not r["variant"].endswith("/control")]
    return {"missing": None, "probes": [_probe(found, *place) for place in dict.fromkeys(places)]}


def _probe(found: MeasureRows, span: str, variant: str) -> dict[str, Any]:
    def curve(name: str, labelled: str) -> list[list[float | None]]:
        rows = [row for row in found.all(name) if (row["span"], row["variant"]) == (span, labelled)]
        rows.sort(key=lambda row: row["layer"])
        return [[row["layer"], *(short(row[key]) for key in ("value", "low", "high"))] for row in rows]

    target, _, named = variant.partition("/")
    decodable = found.one("decodable_layer", variant, span)
    chance = found.one("probe_chance", variant, span)
    return {
        "state": span,
        "target": target,
        "names_tools": named == "class",
        "n": chance["n"] if chance else None,
        "chance": chance["value"] if chance else None,
        "decodable": None if decodable is None else int(decodable["value"]),
        "accuracy": curve("probe_accuracy", variant),
        "control": curve("probe_accuracy", f"{variant}/control"),
        "selectivity": curve("probe_selectivity", variant),
        "auroc": curve("probe_auroc", variant),
    }
