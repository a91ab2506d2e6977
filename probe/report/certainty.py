"""How sure the choices are and how right: calibration, and what the temperature τ of the choice does to it."""

from __future__ import annotations

from typing import Any

from probe.analyzers.tool.calibration import MIN_TASKS, TAU_RANGE
from probe.report.found import Found, estimate, short

SHOWN = frozenset(
    (
        *("tau_entropy", "tau_top1", "tau_accuracy", "tau_log_loss", "tau_fitted", "tau_fold"),
        *(
            "log_loss",
            "brier",
            "ece",
            "ece_floor",
            "log_loss_gain",
            "reliability_accuracy",
            "reliability_confidence",
        ),
    )
)
_SWEPT = ("tau_entropy", "tau_top1", "tau_accuracy", "tau_log_loss")


def card(found: Found) -> dict[str, Any] | None:
    """`sweep`: by measure, [τ, value, low, high]; `scores`: raw and fitted; `bins`: the reliability curves.

    Without `fitted` there were too few tasks for a fit.
    """
    sweep = {name: _curve(found, name) for name in _SWEPT}
    if not any(sweep.values()):
        return None
    fit = next(iter(found.all("tau_fitted")), None)
    return {
        "n": found.all("tau_entropy")[0]["n"],
        "min_tasks": MIN_TASKS,
        "tau_range": TAU_RANGE,
        "sweep": sweep,
        "fitted": estimate(fit),
        "at_bound": fit is not None and fit["variant"] == "bound",
        "folds": [short(row["value"]) for row in found.all("tau_fold")],
        "gain": found.one("log_loss_gain"),
        "scores": [
            {"name": name, "bins": kind, "raw": raw, "fitted": found.one(name, _of("fitted", kind))}
            for name, kind in (
                *(("log_loss", None), ("brier", None)),
                *((name, kind) for kind in ("width", "mass") for name in ("ece", "ece_floor")),
            )
            if (raw := found.one(name, _of("raw", kind)))
        ],
        "bins": {
            f"{which}:{kind}": _bins(found, f"{which}:{kind}")
            for kind in ("width", "mass")
            for which in ("raw", "fitted")
        },
    }


def _of(which: str, kind: str | None) -> str:
    return which if kind is None else f"{which}:{kind}"


def _curve(found: Found, name: str) -> list[list[float | None]]:
    rows = [(float(row["variant"]), row) for row in found.all(name)]
    return [
        [tau, *(short(row[key]) for key in ("value", "low", "high"))]
        for tau, row in sorted(rows, key=lambda x: x[0])
    ]


def _bins(found: Found, variant: str) -> list[dict[str, Any]]:
    """Bins that hold tasks: accuracy with its Wilson interval, n, and mean `confidence`."""
    sure = {
        row["step"]: row["value"] for row in found.all("reliability_confidence") if row["variant"] == variant
    }
    rows = [row for row in found.all("reliability_accuracy") if row["variant"] == variant]
    return [{**(estimate(row) or {}), "bin": row["step"], "confidence": sure[row["step"]]} for row in rows]
