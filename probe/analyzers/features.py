"""Measures of a sparse autoencoder on a run's states: what it explains, which features go with which tool, what their loss does.

Reads features.parquet, which `probe features` makes (`probe.experiments.tool.features`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import MEAN, OVER_TASKS, SHARE_OVER_TASKS, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.auroc import auroc
from probe.maths.intervals import mean_interval, ratio_interval
from probe.maths.paired import difference_interval
from probe.maths.selectivity import DRAWS, max_p, standardized_wins
from probe.runs.views.features import LEAST, FeatureActivity, Frame

if TYPE_CHECKING:
    from probe.runs import Run

MOST = 10
"""Features that are named for a tool."""
_NEEDS = ("experiment:feature_ablation",)
_ABLATED = (
    " Of tasks whose chosen tool has features: those that are more active where it is chosen, in the other half of the tasks. The state "
    "at the row where the name begins becomes the autoencoder's `reconstruction` without them, or the `state` itself less what they write."
)
UNEXPLAINED = measure(
    "features",
    "sae_unexplained",
    unit="share of variance",
    of="task run",
    axes="layer state",
    means="Σ ‖x − x̂‖² / Σ ‖x − mean x‖² of the states x that a sparse autoencoder reads and of what it makes of them, x̂; the mean is "
    "over all tasks. 0 is a perfect reconstruction, 1 no better than the mean. Read it first: what is not explained has no feature.",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="bars", by="state"),
)
ACTIVE = measure(
    "features",
    "sae_l0",
    unit="features",
    of="task run",
    axes="layer state",
    means="Features of the autoencoder that are active in a state, mean over the states.",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="bars", by="state"),
)
DEAD = measure(
    "features",
    "sae_dead",
    unit="share of features",
    of="run",
    axes="layer",
    means="Features that are active in none of the run's captured rows, which n counts: of few rows it says little of the autoencoder.",
    needs=_NEEDS,
    figure=Figure(kind="text"),
)
AUROC = measure(
    "features",
    "feature_auroc",
    unit="probability",
    of="run",
    axes="layer tool rank feature",
    means=f"P(a task that chooses the tool has the feature more active at its decision than one that does not), ties ½; the {MOST} features "
    f"of each tool that {LEAST} tasks choose with the largest distance from ½ in standard deviations of shuffled labels; n counts the tasks that choose the tool. They are the "
    "best of all, and so too high: read `feature_p`.",
    source="Mann and Whitney 1947",
    interval="95 % Newcombe (2006), method 5, of one feature that was not chosen; from 5 tasks of either kind on",
    needs=_NEEDS,
    figure=Figure(kind="table", by="tool"),
)
P = measure(
    "features",
    "feature_p",
    unit="p-value",
    of="run",
    axes="layer tool rank feature",
    means=f"One-sided p-value of the same, corrected for all features and tools at once: tasks exchange labels {DRAWS} times, and the largest "
    "distance of any feature from ½ counts (maxT).",
    source="Westfall and Young 1993",
    needs=_NEEDS,
    figure=Figure(kind="table", by="tool"),
)
SELECTIVE = measure(
    "features",
    "feature_tools",
    unit="share of tools",
    of="run",
    axes="layer",
    means=f"Tools, of those that {LEAST} tasks choose, which n counts, for which the `feature_p` of a feature is below 0.05.",
    needs=_NEEDS,
    figure=Figure(kind="text"),
)
FLIPPED = measure(
    "features",
    "feature_flip_rate",
    unit="share of tasks",
    of="run",
    axes="layer features replacement",
    means="Choices that become another name when features are set to zero: `top`, those of the chosen tool; `random`, as many other active "
    "ones that write as much; `none`, the control of the reconstruction alone." + _ABLATED,
    interval=SHARE_OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="features"),
)
FLIPPED_BEYOND = measure(
    "features",
    "feature_flip_difference",
    unit="share of tasks",
    of="run",
    axes="layer features replacement",
    means="`feature_flip_rate` of `top`, less that of the control `features`, task by task.",
    interval="95 % Bonett and Price (2012), paired shares",
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="features"),
)
LOG_PROB = measure(
    "features",
    "feature_log_prob",
    unit="nats",
    of="run",
    axes="layer features replacement",
    means="Mean change of log P of the chosen name when features are set to zero." + _ABLATED,
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="features"),
)
LOG_PROB_BEYOND = measure(
    "features",
    "feature_log_prob_difference",
    unit="nats",
    of="run",
    axes="layer features replacement",
    means="`feature_log_prob` of `top`, less that of the control `features`, task by task.",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="features"),
)
ABLATED = measure(
    "features",
    "feature_ablated",
    unit="features",
    of="run",
    axes="layer",
    means="Features of the chosen tool that are active at its decision, and so ablated; mean over tasks.",
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="text"),
)


def measures(run: Run) -> Iterator[Row]:
    """Measures of each layer that an autoencoder was applied to; nothing where none was."""
    table: Frame = run.table("features")
    for number in sorted(set(table["layer"])):
        layer, rows = int(number), table[table["layer"] == number]
        yield from _reconstruction(rows, layer)
        yield from _selectivity(FeatureActivity.of(table, layer), layer)
        yield from _ablation(rows[rows["part"] == "ablation"], layer)


def _reconstruction(rows: Frame, layer: int) -> Iterator[Row]:
    errors, active = rows[rows["part"] == "error"], rows[rows["part"] == "active"]
    for state in ("decision", "rows"):
        at = {"layer": layer, "state": state}
        error, l0 = errors[errors["state"] == state], active[active["state"] == state]
        above, below, n = (error[name].to_numpy(float) for name in ("value", "before", "n"))
        if below.sum() > 0:
            yield UNEXPLAINED.row(
                WHOLE_RUN,
                float(above.sum() / below.sum()),
                n=len(error),
                interval=ratio_interval(above, below),
                **at,
            )
        for task_id, part, whole, n_rows in zip(error["task_id"], above, below, n, strict=True):
            if whole > 0:
                yield UNEXPLAINED.row(task_id, part / whole, n=int(n_rows), **at)
        counts, wholes = l0["value"].to_numpy(float), l0["n"].to_numpy(float)
        if len(l0):
            yield ACTIVE.row(
                WHOLE_RUN,
                float(counts.sum() / wholes.sum()),
                n=len(l0),
                interval=ratio_interval(counts, wholes),
                **at,
            )
        for task_id, count, n_rows in zip(l0["task_id"], counts, wholes, strict=True):
            yield ACTIVE.row(task_id, count / n_rows, n=int(n_rows), **at)
    seen, width = rows[rows["part"] == "rows"], rows[rows["part"] == "width"]["value"]
    n_rows = int(active[active["state"] == "rows"]["n"].sum())
    if len(width) and n_rows:
        yield DEAD.row(WHOLE_RUN, 1 - len(seen) / float(width.iloc[0]), n=n_rows, layer=layer)


def _selectivity(activity: FeatureActivity, layer: int) -> Iterator[Row]:
    tools = activity.tools()
    if not tools or not len(activity.features):
        return
    member = activity.member(tools)
    area, z = standardized_wins(activity.activity, member)
    p = max_p(activity.activity, member)
    for row, tool in enumerate(tools):
        for rank, column in enumerate(np.argsort(-z[row], kind="stable")[:MOST], 1):
            at = {"layer": layer, "tool": tool, "rank": rank, "feature": int(activity.features[column])}
            estimate = auroc(activity.activity[:, column], member[:, row])
            n = int(member[:, row].sum())
            yield AUROC.row(WHOLE_RUN, area[row, column], n=n, interval=estimate and estimate.interval, **at)
            yield P.row(WHOLE_RUN, p[row, column], n=n, **at)
    yield SELECTIVE.row(WHOLE_RUN, float((p.min(1) < 0.05).mean()), n=len(tools), layer=layer)


def _ablation(rows: Frame, layer: int) -> Iterator[Row]:
    if rows.empty:
        return
    top = rows[rows["features"] == "top"]
    first = top.drop_duplicates("task_id")["n"].to_numpy(float)
    yield ABLATED.mean(first, layer=layer)
    for (features, replacement), of_kind in rows.groupby(["features", "replacement"], sort=False):
        at = {"layer": layer, "features": features, "replacement": replacement}
        yield FLIPPED.share(of_kind["value"], **at)
        yield LOG_PROB.mean((of_kind["log_prob"] - of_kind["before"]).to_numpy(), **at)
        if features == "top":
            continue
        paired = of_kind.merge(
            top[top["replacement"] == replacement], on="task_id", suffixes=("_control", "")
        )
        for defined, column in ((FLIPPED_BEYOND, "value"), (LOG_PROB_BEYOND, "log_prob")):
            control, values = (paired[name].to_numpy() for name in (f"{column}_control", column))
            if len(paired):
                interval: Any = (
                    difference_interval(control, values)
                    if column == "value"
                    else mean_interval(values - control)
                )
                yield defined.row(
                    WHOLE_RUN, float((values - control).mean()), n=len(paired), interval=interval, **at
                )


# -- in words ------------------------------------------------------------------------------------------------------


def sentences(run: Run) -> list[str]:
    """What was measured of each layer, the reconstruction first; and why nothing was ablated, where that is so."""
    import pyarrow.compute as pc

    wanted = pc.field("name").isin(
        [d.name for d in (UNEXPLAINED, ACTIVE, DEAD, AUROC, P, SELECTIVE, FLIPPED)]
    )
    wanted |= pc.field("name").isin([d.name for d in (FLIPPED_BEYOND, ABLATED)])
    parts = run.table_parts("measures", wanted & (pc.field("task_id") == WHOLE_RUN))
    rows = [row for part in parts for row in part.to_pylist()]
    return [line for layer in sorted({row["layer"] for row in rows}) for line in _of_layer(rows, layer)]


def _of_layer(rows: Sequence[dict[str, Any]], layer: int) -> Iterator[str]:
    def of(defined: Measure, **place: Any) -> list[dict[str, Any]]:
        at = {"name": defined.name, "layer": layer} | place
        return [row for row in rows if all(row[axis] == label for axis, label in at.items())]

    def number(row: dict[str, Any]) -> str:
        interval = "" if row["low"] is None else f" [{row['low']:.3g}, {row['high']:.3g}]"
        return f"{row['value']:.3g}{interval}, n = {row['n']}"

    lead = f"layer {layer}"
    for row in of(UNEXPLAINED):
        yield f"{lead}: share of variance not explained, {row['state']}: {number(row)}"
    for row in of(ACTIVE, state="decision"):
        yield f"{lead}: active features at the decision: {number(row)}"
    for row in of(DEAD):
        yield f"{lead}: features never active in these {row['n']} states: {row['value']:.3g}"
    for row in of(SELECTIVE):
        yield f"{lead}: tools with a feature beyond shuffled labels: {row['value']:.3g} of {row['n']}"
    for row in of(AUROC, rank=1):
        (p,) = of(P, rank=1, tool=row["tool"])
        yield f"{lead}: {row['tool']}: feature {row['feature']}, AUROC {number(row)}, corrected p {p['value']:.3g}"
    if not of(FLIPPED):
        yield f"{lead}: nothing ablated: needs the model, and tools that {LEAST} tasks of each half choose"
    for row in of(ABLATED):
        yield f"{lead}: active features of the chosen tool, ablated: {number(row)}"
    for row in of(FLIPPED):
        yield f"{lead}: choices flipped, {row['features']} in the {row['replacement']}: {number(row)}"
    for row in of(FLIPPED_BEYOND):
        yield f"{lead}: flipped, top beyond {row['features']} in the {row['replacement']}: {number(row)}"
