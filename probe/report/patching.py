"""The card of patching: which states carry the choice from one prompt to another, beside those of a third prompt."""

from __future__ import annotations

from typing import Any

from probe.report.rows import MeasureRows, Row, estimate

_SHOWN = 10
"""Heads, and places of attention and MLP, that are listed."""


def patching(measures: MeasureRows) -> list[dict[str, Any]] | None:
    """One entry a kind of pair: its `gap`, the `pairs` by what became of them, the two `modes`, and the `sets` of heads.
    Every estimate is {value, low, high, n}. None where nothing was patched."""
    return [_of_kind(measures, role) for role in measures.labels("patch_gap", "role")] or None


def _of_kind(measures: MeasureRows, role: str) -> dict[str, Any]:
    def rows(name: str, **place: Any) -> list[Row]:
        wanted = {"role": role} | place
        return [row for row in measures.all(name) if all(row[axis] == wanted[axis] for axis in wanted)]

    def of_mode(name: str) -> dict[str, Any]:
        cells = rows("patch_recovery", mode=name)
        residual = [row for row in cells if row["site"] == "resid_post"]
        parts = [row for row in cells if row["site"] != "resid_post"]
        heads = rows("patch_recovery_head", mode=name)
        for listed in (parts, heads):
            listed.sort(key=lambda row: -abs(row["value"]))
        return {
            "mode": name,
            "spans": [
                {
                    "span": span,
                    "control": control,
                    "layers": [
                        _at_layer(row)
                        for row in residual
                        if row["span"] == span and row["control"] == control
                    ],
                }
                for span, control in dict.fromkeys((row["span"], row["control"]) for row in residual)
            ],
            "parts": [
                {"site": row["site"], "layer": row["layer"], "span": row["span"], "recovery": estimate(row)}
                for row in parts[:_SHOWN]
            ],
            "heads": [
                {"layer": row["layer"], "head": row["head"], "recovery": estimate(row)}
                for row in heads[:_SHOWN]
            ],
            "spearman": [
                {"site": row["site"], "rho": estimate(row)}
                for row in rows("patch_gradient_spearman", mode=name)
            ],
        }

    modes = [of_mode(name) for name in ("denoise", "noise")]
    return {
        "pair": role,
        "gap": measures.estimate("patch_gap", role=role),
        "pairs": [{"status": row["status"], "n": row["value"]} for row in rows("patch_pairs")],
        "modes": [entry for entry in modes if entry["spans"] or entry["heads"]],
        "sets": {
            "sizes": [{"half": row["half"], "n_heads": row["value"]} for row in rows("patch_set_size")],
            "together": measures.estimate("patch_set_recovery", role=role, heads="together"),
            "random": measures.estimate("patch_set_recovery", role=role, heads="random"),
            "net": measures.estimate("patch_set_recovery_minus_random", role=role),
        },
    }


def _at_layer(row: Row) -> dict[str, Any]:
    return {"layer": row["layer"], "recovery": estimate(row)}
