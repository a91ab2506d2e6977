"""The card of attribution: what writes the choice, by layer, head and source, beside what masks take away."""

from __future__ import annotations

from typing import Any

from probe.report.rows import MeasureRows, Row, estimate

_LAYERED = ("attention", "mlp")


def attribution(measures: MeasureRows) -> list[dict[str, Any]] | None:
    """One entry a pair: its `log_odds`, and these taken apart: `layers`, `parts`, `heads` by the size of their mean, `sources`
    with the knock-out of the same description. Every estimate is {value, low, high, n}. None where none was made."""
    roles = sorted(measures.labels("attribution_log_odds", "role"), reverse=True)
    return [_pair(measures, role) for role in roles] or None


def _pair(measures: MeasureRows, role: str) -> dict[str, Any]:
    def rows(name: str) -> list[Row]:
        return [row for row in measures.all(name) if row["role"] == role]

    parts = {(row["component"], row["layer"]): estimate(row) for row in rows("attribution")}
    layers = sorted({layer for _, layer in parts if layer is not None})
    reads: dict[tuple[int, int], list[tuple[str, float]]] = {}
    for row in rows("attribution_head_span"):
        reads.setdefault((row["layer"], row["head"]), []).append((row["span"], row["value"]))
    heads = [row for row in rows("attribution_head") if (row["layer"], row["head"]) in reads]
    heads.sort(key=lambda row: -abs(row["value"]))
    sources = [row for row in rows("attribution_span") if row["layer"] is None]
    sources.sort(key=lambda row: -abs(row["value"]))
    return {
        "pair": role,
        "log_odds": measures.estimate("attribution_log_odds", role=role),
        "remainder": measures.estimate("attribution_remainder", role=role),
        "spearman": measures.estimate("attribution_spearman", role=role),
        "parts": [{"part": part, "effect": parts[part, layer]} for part, layer in parts if layer is None],
        "layers": [
            {"layer": layer} | {part: parts.get((part, layer)) for part in _LAYERED} for layer in layers
        ],
        "heads": [
            {"layer": row["layer"], "head": row["head"], "effect": estimate(row)}
            | {"reads": sorted(reads[row["layer"], row["head"]], key=lambda read: -abs(read[1]))[:2]}
            for row in heads
        ],
        "sources": [
            {"source": row["span"], "effect": estimate(row)}
            | {"knockout": measures.estimate("attribution_knockout", role=role, span=row["span"])}
            for row in sources
        ],
    }
