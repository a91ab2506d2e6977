"""The card of steering: a slider over the doses that were run, what each turns and costs, and the chosen setting beside its control."""

from __future__ import annotations

from typing import Any

from probe.report.rows import MeasureRows, Row, estimate

_GRID = ("steer_switch_rate", "steer_log_prob", "steer_probability")
_CHOSEN = (
    *("steer_turned", "steer_turned_random", "steer_turned_minus_random"),
    *("steer_valid_call", "steer_valid_call_before"),
)


def card(measures: MeasureRows) -> dict[str, Any] | None:
    """`layers`, `doses`, `roles`, the `grid` of estimates [{role, direction, layer, dose, …}], `settings` by direction with what they
    turn, and the `lengths` of mean differences. None where nothing was steered."""
    rows = measures.all("steer_switch_rate")
    if not rows:
        return None
    return {
        "roles": measures.labels("steer_switch_rate", "role"),
        "layers": sorted(measures.labels("steer_switch_rate", "layer")),
        "doses": sorted(measures.labels("steer_switch_rate", "dose")),
        "grid": [_cell(measures, row) for row in rows],
        "settings": [_setting(measures, row) for row in measures.all("steer_setting")],
        "lengths": [[row["layer"], row["value"]] for row in measures.all("steer_difference_length")],
    }


def _cell(measures: MeasureRows, row: Row) -> dict[str, Any]:
    place = {axis: row[axis] for axis in ("direction", "layer", "dose")}
    numbers = {name: measures.estimate(name, role=row["role"], **place) for name in _GRID}
    return {"role": row["role"], **place, **numbers, "steer_kl": measures.estimate("steer_kl", **place)}


def _setting(measures: MeasureRows, row: Row) -> dict[str, Any]:
    place = {axis: row[axis] for axis in ("direction", "layer", "dose")}
    numbers = {
        name: {
            role: measures.estimate(name, role=role, direction=row["direction"])
            for role in measures.labels("steer_switch_rate", "role")
        }
        for name in _CHOSEN
    }
    accuracy = measures.estimate("steer_other_accuracy", direction=row["direction"])
    return {
        **place,
        "chosen": estimate(row),
        **numbers,
        "steer_other_accuracy": accuracy,
        "steer_kl": measures.estimate("steer_kl", **place),
    }
