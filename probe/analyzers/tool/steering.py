"""Measures of steering: whether a vector turns the choice to another tool, what becomes of the call, and what it costs elsewhere.

Reads the experiment `steering` from the run's steering.parquet (`probe.experiments.tool.steering` says what was added where).
Every number but the setting is of the half of the tasks from which neither directions nor settings were had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import OVER_TASKS, SHARE_OVER_TASKS, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.paired import difference_interval

if TYPE_CHECKING:
    from probe.runs import Run

Frame = Any
"""A pandas DataFrame; see `probe.runs.views.conditions`."""
RANDOM = "random"
_NEEDS = ("experiment:steering",)
_SOURCE = "Wu et al. 2026, arXiv 2605.07990"
_CARD = "steering"
_HELD_OUT = (
    " Of held-out tasks: directions are had from the other half. Role `drawn`: towards another name, drawn among those that the task "
    "shows; `right`: towards the most probable right one, where the choice is wrong."
)
_AT_SETTING = " Layer and dose are those of `steer_setting`."
SWITCH_RATE = measure(
    "tool",
    "steer_switch_rate",
    unit="share of tasks",
    of="run",
    axes="role direction layer dose",
    means="Tasks in which the whole name that the vector points to becomes the most probable one, when `dose` mean lengths of a state "
    "are added behind a layer at the row where the name begins." + _HELD_OUT,
    source=_SOURCE,
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="dose", by="direction", card=_CARD),
)
LOG_PROB = measure(
    "tool",
    "steer_log_prob",
    unit="nats",
    of="run",
    axes="role direction layer dose",
    means="Mean change of log P of the whole name that the vector points to." + _HELD_OUT,
    source="Turner et al. 2023",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="dose", by="direction", card=_CARD),
)
PROBABILITY = measure(
    "tool",
    "steer_probability",
    unit="probability",
    of="run",
    axes="role direction layer dose",
    means="Mean change of the probability of the whole name that the vector points to, e^`log_prob` after less before."
    + _HELD_OUT,
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="table", by="direction", card=_CARD),
)
KL = measure(
    "tool",
    "steer_kl",
    unit="nats",
    of="run",
    axes="direction layer dose",
    means="The price elsewhere: KL(without ‖ with the vector) of the next token of texts that have nothing to do with tools, the vector "
    "added at their last position; mean over the pairs of names, which n counts.",
    interval="95 % Hall's t over pairs of names, from 8 on",
    needs=_NEEDS,
    figure=Figure(kind="curve", x="dose", by="direction", card=_CARD),
)
DIFFERENCE = measure(
    "tool",
    "steer_difference_length",
    unit="mean lengths of a state",
    of="run",
    axes="layer",
    means="Length of the mean difference of two names: the dose at which the vector is the difference itself; mean over the pairs of "
    "names, which n counts.",
    needs=_NEEDS,
    figure=Figure(kind="table", card=_CARD),
)
SETTING = measure(
    "tool",
    "steer_setting",
    unit="share of tasks",
    of="run",
    axes="direction layer dose",
    means="The layer and dose that turn most choices of the tasks from which directions are had, each without its own state, among those "
    "whose `steer_kl` is at most `--most-kl`: the share that they turn there, n of these tasks. It is the best of a grid, and "
    "so too high: `steer_turned` tests it.",
    needs=_NEEDS,
    figure=Figure(kind="table", by="direction", card=_CARD),
)
TURNED = measure(
    "tool",
    "steer_turned",
    unit="share of tasks",
    of="run",
    axes="role direction",
    means="`steer_switch_rate` at the setting that was chosen on the other half." + _HELD_OUT + _AT_SETTING,
    source=_SOURCE,
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
TURNED_RANDOM = measure(
    "tool",
    "steer_turned_random",
    unit="share of tasks",
    of="run",
    axes="role direction",
    means="`steer_turned` of random vectors: those of the same tasks, at the layer and dose, and so at the length, of `direction`.",
    source=_SOURCE,
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
TURNED_MINUS_RANDOM = measure(
    "tool",
    "steer_turned_minus_random",
    unit="share of tasks",
    of="run",
    axes="role direction",
    means="`steer_turned` − `steer_turned_random`, task by task.",
    interval="95 % Bonett and Price (2012), paired shares",
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
VALID = measure(
    "tool",
    "steer_valid_call",
    unit="share of turned choices",
    of="run",
    axes="role direction",
    means="Of the held-out choices that were turned: the call that is then generated names that tool, and its arguments are valid for it."
    + _AT_SETTING,
    source=_SOURCE,
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
VALID_BEFORE = measure(
    "tool",
    "steer_valid_call_before",
    unit="share of turned choices",
    of="run",
    axes="role direction",
    means="Of the same tasks: the run's own call names the tool that it chose, and its arguments are valid for it.",
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
OTHER_ACCURACY = measure(
    "tool",
    "steer_other_accuracy",
    unit="share of tasks",
    of="run",
    axes="direction",
    means="The price elsewhere: change of the share of right choices in other held-out tasks, whose right name is neither of the vector's two."
    + _AT_SETTING,
    interval="95 % Bonett and Price (2012), paired shares",
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="direction", card=_CARD),
)
_SETTING = ["direction", "layer", "dose"]


def measures(run: Run) -> Iterator[Row]:
    """Measures of the grid and of the chosen settings; nothing where the experiment was not made."""
    table: Frame = run.table("steering")
    if table.empty:
        return
    switches = table[table["part"] == "switch"]
    yield from _grid(switches[switches["half"] == 1])
    for place, rows in table[table["part"] == "kl"].groupby(_SETTING, sort=False):
        yield KL.mean(rows["value"].to_numpy(), **_place(place))
    for layer, rows in table[table["part"] == "difference"].groupby("layer"):
        values = rows["value"].to_numpy()
        yield DIFFERENCE.row(WHOLE_RUN, float(values.mean()), n=len(values), layer=int(layer))
    for setting in table[table["part"] == "setting"].itertuples():
        yield from _at_setting(setting, switches, table)


def _place(labels: Any) -> dict[str, Any]:
    direction, layer, dose = labels
    return {"direction": direction, "layer": int(layer), "dose": float(dose)}


def _grid(tested: Frame) -> Iterator[Row]:
    for (role, *place), rows in tested.groupby(["role", *_SETTING], sort=False):
        at = {"role": role} | _place(place)
        before, after = rows["before"].to_numpy(), rows["log_prob"].to_numpy()
        yield SWITCH_RATE.share(rows["value"], **at)
        yield LOG_PROB.mean(after - before, **at)
        yield PROBABILITY.mean(np.exp(after) - np.exp(before), **at)


def _at_setting(setting: Any, switches: Frame, table: Frame) -> Iterator[Row]:
    direction = setting.direction
    here = (switches["layer"] == setting.layer) & (switches["dose"] == setting.dose)
    vectors, random = (switches[here & (switches["direction"] == name)] for name in (direction, RANDOM))
    trained = vectors[(vectors["half"] == 0) & (vectors["role"] == "drawn")]["value"]
    yield SETTING.row(
        WHOLE_RUN,
        float(trained.mean()),
        n=len(trained),
        direction=direction,
        layer=int(setting.layer),
        dose=float(setting.dose),
    )
    for role, rows in vectors[vectors["half"] == 1].groupby("role"):
        at = {"role": role, "direction": direction}
        yield TURNED.share(rows["value"], **at)
        if direction != RANDOM:
            paired = rows.merge(random, on=["task_id", "role"], suffixes=("", "_random"))
            first, second = paired["value_random"].to_numpy(), paired["value"].to_numpy()
            if len(paired):
                yield TURNED_RANDOM.share(first, **at)
                interval = difference_interval(first, second)
                yield TURNED_MINUS_RANDOM.row(
                    WHOLE_RUN, float((second - first).mean()), n=len(paired), interval=interval, **at
                )
    of_direction = table[table["direction"] == direction]
    for role, rows in of_direction[of_direction["part"] == "call"].groupby("role"):
        yield VALID.share(rows["value"], role=role, direction=direction)
        if len(before := rows["before"].dropna()):
            yield VALID_BEFORE.share(before, role=role, direction=direction)
    others = of_direction[of_direction["part"] == "elsewhere"]
    if len(others):
        first, second = others["before"].to_numpy(), others["value"].to_numpy()
        yield OTHER_ACCURACY.row(
            WHOLE_RUN,
            float((second - first).mean()),
            n=len(others),
            interval=difference_interval(first, second),
            direction=direction,
        )


# -- beside what was published -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A published figure and the measure that stands beside it."""

    analyzer: str
    name: str
    place: dict[str, Any]
    what: str
    published: str


CLAIMS = (
    Claim(
        "tool",
        TURNED.name,
        {"role": "drawn", "direction": "mean_difference"},
        "the mean difference turns the choice",
        "0.77 to 1.00, of 12 instruction-tuned models of 270 M to 27 B parameters, names only",
    ),
    Claim(
        "tool",
        TURNED_RANDOM.name,
        {"role": "drawn", "direction": "mean_difference"},
        "a random vector as long turns it",
        "0.00",
    ),
    Claim(
        "tool",
        TURNED.name,
        {"role": "drawn", "direction": "unembedding"},
        "the output layer's row of the name turns it",
        "0.93 to 1.00, models of 4 B parameters and more",
    ),
    Claim(
        "foresight",
        "error_ratio",
        {"signal": "log_odds_gap", "rule": "raw"},
        "the quarter of the smallest gaps is wrong so many times as often as that of the largest",
        "14 to 21, models of 12 B and 27 B parameters",
    ),
)
"""Of arXiv 2605.07990, versions 1 and 2."""


def claims(run: Run) -> list[str]:
    """Each published figure with the run's own beside it, in a sentence; what was not measured is said to be so."""
    import pyarrow.compute as pc

    names = pc.field("name").isin([claim.name for claim in CLAIMS])
    parts = run.table_parts("measures", names & (pc.field("task_id") == WHOLE_RUN))
    rows = [row for part in parts for row in part.to_pylist()]
    return [f"{claim.what}: {_beside(claim, rows)}; published {claim.published}" for claim in CLAIMS]


def _beside(claim: Claim, rows: list[dict[str, Any]]) -> str:
    for row in rows:
        if (row["analyzer"], row["name"]) == (claim.analyzer, claim.name) and all(
            row[axis] == label for axis, label in claim.place.items()
        ):
            interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
            null = ""
            if claim.analyzer == "foresight" and row["low"] is not None and row["low"] <= 1:
                null = ", in keeping with no difference"
            elif row["value"] == 0:
                null = ", never"
            return f"here {row['value']:.2f} {row['unit']}{interval}, n = {row['n']} ({row['name']}){null}"
    return f"here not measured ({claim.name})"
