"""How well a wrong choice is foretold: the signals in a table, their risk–coverage curves, and what a readout would repair."""

from __future__ import annotations

from typing import Any

from probe.analyzers.foresight import BEST, HELD_OUT, RAW, TRANSFER, absences
from probe.analyzers.foresight.signals import PROBE
from probe.report.rows import MeasureRows, Row, short

_TEXTS = {
    "margin": ("margin", "first minus second, nats"),
    "entropy": ("entropy", "turned round"),
    "log_odds_gap": ("log-odds gap", "chosen minus the tools’ mean"),
    "attention_margin": ("attention margin", "to the chosen tool, per token"),
    "order_agreement": ("order agreement", "orders with the same choice"),
    "candidate_mass": ("candidate mass", "on all names together"),
    "log_prob": ("log P", "of the chosen name"),
    PROBE: ("linear probe", "of resid_post, layer chosen"),
    BEST: ("best", "signal chosen"),
}
_RULES = {RAW: "", HELD_OUT: "on other folds", TRANSFER: "on the other run"}
_COLUMNS = {
    "auroc": ("AUROC", "½ is chance"),
    "auroc_p": ("p", "of permuted labels"),
    "aurc": ("AURC", "lower is better"),
    "aurc_gain": ("gain", "0 random, 1 best possible"),
    "error_ratio": ("errors", "least sure ÷ surest quarter"),
    "brier_gain": ("Brier gain", "over the base rate"),
    "ece": ("ECE", "calibration error"),
    "ece_floor": ("ECE by chance", ""),
}
_READOUTS = {
    None: ("the model", "its most probable tool"),
    "guess": ("guess", "even"),
    "attention": ("attention", "per token, of one head"),
    "cosine": ("cosine", "decision’s state with the description’s"),
    PROBE: ("linear probe", "of both states"),
    "prompted": ("another prompt", "the model’s choice in the other run"),
}
_OF_READOUTS = {
    "readout_accuracy": ("right", "among the tools"),
    "readout_gain": ("gain", "over the model"),
    "repaired": ("repaired", "of its failures"),
    "broken": ("broken", "of its successes"),
    "repair_overlap": ("overlap", "with another prompt"),
}
_POINT = ("value", "low", "high")


def card(rows: list[Row]) -> dict[str, Any] | None:
    """`tables` of estimates with their texts, `curves` ([x, value, low, high] over a level), and `missing`: sentences. None
    where no tool task was judged."""
    measures = MeasureRows(rows, "foresight")
    base = measures.estimate("error_rate")
    if base is None:
        return None
    tables = [table for table in (_signals(measures, base["value"]), _readouts(measures)) if table["rows"]]
    return {
        "title": "Could the error be foreseen?",
        "how": "Signals that are there before the call runs. AUROC is how often a wrong choice has less of the signal than a "
        "right one. AURC is the mean share of wrong choices where the surest are accepted first.",
        "tables": tables,
        "curves": [*_risks(measures, base["value"]), *_layers(measures)],
        "missing": [f"Not measured: {why}." for why in absences(measures.all("error_rate"))],
    }


def _signals(measures: MeasureRows, base: float) -> dict[str, Any]:
    rows = []
    for signal, rule in _forecasts(measures):
        label, note = _TEXTS[signal]
        cells = []
        for name in _COLUMNS:
            fitted = HELD_OUT if rule == RAW and name in ("brier_gain", "ece", "ece_floor") else rule
            cells.append(measures.estimate(name, signal=signal, rule=fitted))
        rows.append([label, " ".join(filter(None, (note, _RULES[rule]))), *cells])
    lowest = next(iter(measures.all("aurc_lowest")), None)
    best = "" if lowest is None else f", the best possible one {lowest['value']:.2f}"
    return {
        "title": "Signals",
        "head": [("signal", None), *_COLUMNS.values()],
        "rows": rows,
        "note": f"{base:.0%} of the choices are wrong, and so is a random order’s AURC{best}.",
    }


def _readouts(measures: MeasureRows) -> dict[str, Any]:
    return {
        "title": "Repair: what another readout would choose among the tools",
        "head": [("readout", None), *_OF_READOUTS.values()],
        "rows": [
            [*_READOUTS[scorer], *(measures.estimate(name, scorer=scorer) for name in _OF_READOUTS)]
            for scorer in measures.labels("readout_accuracy", "scorer")
        ],
        "note": "Layer, head and weights are had on other folds than they are tested on.",
    }


def _forecasts(measures: MeasureRows) -> list[tuple[str, str]]:
    pairs = [(signal, rule) for signal in _TEXTS for rule in _RULES]
    return [pair for pair in pairs if measures.estimate("auroc", signal=pair[0], rule=pair[1]) is not None]


def _risks(measures: MeasureRows, base: float) -> list[dict[str, Any]]:
    curves = []
    for signal, rule in _forecasts(measures):
        points = [row for row in measures.all("risk") if (row["signal"], row["rule"]) == (signal, rule)]
        n = max(row["n"] for row in points)
        errors = measures.estimate("error_rate", signal=signal)
        level = base if errors is None else errors["value"]
        curves.append(
            _curve(
                f"Wrong among the surest, by {_TEXTS[signal][0]}{' (other run)' if rule == TRANSFER else ''}",
                "coverage",
                {"y": level, "label": "base rate, a random order"},
                points,
                n,
            )
        )
    return curves


def _layers(measures: MeasureRows) -> list[dict[str, Any]]:
    points = [row for row in measures.all("auroc") if row["layer"] is not None]
    if not points:
        return []
    level = {"y": 0.5, "label": "chance"}
    title = "AUROC of the linear probe, every layer by itself"
    return [_curve(title, "layer", level, points, points[0]["n"])]


def _curve(title: str, axis: str, level: dict[str, Any], rows: list[Row], n: int) -> dict[str, Any]:
    points = [
        [row[axis], *(short(row[key]) for key in _POINT)] for row in sorted(rows, key=lambda row: row[axis])
    ]
    return {"title": title, "axis": axis, "level": level, "points": points, "n": n}
