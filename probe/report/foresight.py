"""How well a wrong choice is foretold: the signals in a table, and the risk–coverage curves."""

from __future__ import annotations

from typing import Any

from probe.analyzers.foresight import BEST, HELD_OUT, RAW, TRANSFER, absences
from probe.analyzers.foresight.signals import PROBE, SIGNALS
from probe.report.rows import MeasureRows, Row, estimate, short

_COLUMNS = ("auroc", "auroc_p", "aurc", "aurc_gain", "error_ratio", "brier", "brier_gain", "ece", "ece_floor")


def card(rows: list[Row]) -> dict[str, Any] | None:
    """`signals`: a row a signal and rule; `curves`: [coverage, risk, low, high] of each; `layers`: AUROC of the probe by
    layer; `base`: the error rate; `missing`: sentences. None where no tool task was judged."""
    measures = MeasureRows(rows, "foresight")
    base = measures.estimate("error_rate")
    if base is None:
        return None
    table, curves = [], []
    for signal in (*SIGNALS, PROBE, BEST):
        for rule in (RAW, HELD_OUT, TRANSFER):
            if measures.estimate("auroc", signal=signal, rule=rule) is None:
                continue
            fitted = HELD_OUT if rule == RAW else rule
            place = {
                name: fitted if name in ("brier", "brier_gain", "ece", "ece_floor") else rule
                for name in _COLUMNS
            }
            cells = {name: measures.estimate(name, signal=signal, rule=place[name]) for name in _COLUMNS}
            table.append({"signal": signal, "rule": rule} | cells)
            curve = sorted(_at(measures.all("risk"), signal, rule), key=lambda row: row["coverage"])
            points = [[short(row[key]) for key in ("coverage", "value", "low", "high")] for row in curve]
            curves.append({"signal": signal, "rule": rule, "points": points, "aurc": cells["aurc"]})
    layers = [
        [row["layer"], *(short(row[key]) for key in ("value", "low", "high"))]
        for row in sorted(
            (row for row in measures.all("auroc") if row["layer"] is not None), key=lambda row: row["layer"]
        )
    ]
    present = {row["signal"] for row in measures.all("error_rate")}
    absent = [name for name in (*SIGNALS, PROBE) if name not in present]
    return {
        "base": base,
        "lowest": estimate(next(iter(measures.all("aurc_lowest")), None)),
        "signals": table,
        "curves": curves,
        "layers": layers,
        "readouts": [
            {"scorer": scorer}
            | {
                name: measures.estimate(name, scorer=scorer)
                for name in ("readout_accuracy", "readout_gain", "repaired", "broken", "repair_overlap")
            }
            for scorer in measures.labels("readout_accuracy", "scorer")
        ],
        "chosen": [[row["signal"], row["value"]] for row in measures.all("chosen_folds")],
        "missing": absences(round(base["value"] * base["n"]), base["n"], absent),
    }


def _at(rows: list[Row], signal: str, rule: str) -> list[Row]:
    return [row for row in rows if (row["signal"], row["rule"]) == (signal, rule)]
