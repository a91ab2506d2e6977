"""How sure the choices are and how right: calibration, and what the temperature τ of the choice does to it."""

from __future__ import annotations

from typing import Any

from probe.analyzers.tool.calibration import MIN_TASKS, TAU_RANGE
from probe.report.rows import MeasureRows, Row, estimate, short

_SWEPT = ("tau_entropy", "tau_top1", "tau_accuracy", "tau_log_loss")


def card(measures: MeasureRows) -> dict[str, Any] | None:
    """`sweep`: by measure, [τ, value, low, high]; `scores`: raw and fitted; `bins`: the reliability curves.

    Without `fitted` there were too few tasks for a fit.
    """
    sweep = {name: _curve(measures, name) for name in _SWEPT}
    if not any(sweep.values()):
        return None
    fit = next(iter(measures.all("tau_fitted")), None)
    return {
        "n": measures.all("tau_entropy")[0]["n"],
        "min_tasks": MIN_TASKS,
        "tau_range": TAU_RANGE,
        "sweep": sweep,
        "fitted": estimate(fit),
        "at_bound": fit is not None and fit["rule"] == "bound",
        "folds": [short(row["value"]) for row in measures.all("tau_fold")],
        "gain": measures.estimate("log_loss_gain"),
        "scores": [
            {
                "name": name,
                "bins": binning,
                "raw": raw,
                "fitted": measures.estimate(name, rule="fitted", binning=binning),
            }
            for name, binning in (
                *(("log_loss", None), ("brier", None), ("brier_multiclass", None)),
                *((name, binning) for binning in ("width", "mass") for name in ("ece", "ece_floor")),
            )
            if (raw := measures.estimate(name, rule="raw", binning=binning))
        ],
        "bins": {
            binning: {rule: _bins(measures, rule=rule, binning=binning) for rule in ("raw", "fitted")}
            for binning in ("width", "mass")
        },
    }


def _curve(measures: MeasureRows, name: str) -> list[list[float | None]]:
    rows = sorted(measures.all(name), key=lambda row: row["temperature"])
    return [[short(row[key]) for key in ("temperature", "value", "low", "high")] for row in rows]


def _bins(measures: MeasureRows, **place: str) -> list[dict[str, Any]]:
    """Bins that hold tasks: accuracy with its Wilson interval, n, and mean `confidence`."""

    def rows(name: str) -> list[Row]:
        return [row for row in measures.all(name) if all(row[axis] == label for axis, label in place.items())]

    sure = {row["bin"]: row["value"] for row in rows("reliability_confidence")}
    return [
        {**(estimate(row) or {}), "bin": row["bin"], "confidence": sure[row["bin"]]}
        for row in rows("reliability_accuracy")
    ]
