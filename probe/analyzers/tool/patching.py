"""Measures of patching between two prompts: how much of the choice comes over with which states.

Reads the experiments `patching`, `patch_parts` and `patch_sets` from the run's patching.parquet
(`probe.experiments.tool.patching` says what is patched). Recoveries are quotients of sums over tasks, Σ effect / Σ gap, so that a
pair with a small gap weighs little; pairs below the least gap were never patched and are counted in `patch_pairs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import MEAN, RANKS, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import ratio_interval
from probe.maths.rank_correlation import spearman
from probe.runs.views.patching import CURVE, RANDOM, SHARE, TESTED, patched, smallest

if TYPE_CHECKING:
    from probe.runs import Run

Frame = Any
"""A pandas DataFrame; see `probe.runs.views.patching`."""
_MAPS, _PARTS, _SETS = "experiment:patching", "experiment:patch_parts", "experiment:patch_sets"
_SOURCE = "Heimersheim and Nanda 2024, section 2"
_ROLE = (
    " `role` says in what the two prompts differ, `mode` which is changed: `denoise` puts states of the clean prompt into the "
    "corrupt one, `noise` the reverse."
)
_HALVES = (
    "With `half` of the heads that this half of the tasks chose, on the other half; without, of all tasks."
)
PAIRS = measure(
    "tool",
    "patch_pairs",
    unit="tasks",
    of="run",
    axes="role status",
    means="Tasks by what became of their pair: `ok`; `small_gap`, log-odds less than a nat apart; `no_partner`, no other task or tool to "
    "exchange with; `not_scored`, a name that is no candidate of both prompts; `unaligned`, spans that do not follow each other alike; "
    "`no_room`, a prompt that does not fit the context; `not_finite`.",
    needs=(_MAPS,),
    figure=Figure(kind="text", card="patching"),
)
GAP = measure(
    "tool",
    "patch_gap",
    unit="nats",
    of="run",
    axes="role",
    means="Distance of the log-odds of the two names under the clean prompt and under the corrupt one: what a patch can recover. "
    "Mean over the pairs that are patched.",
    interval=MEAN,
    needs=(_MAPS,),
    figure=Figure(kind="text", card="patching"),
)
RECOVERY = measure(
    "tool",
    "patch_recovery",
    unit="share of the gap",
    of="run",
    axes="role mode site span layer control?",
    means="Σ (how far the log-odds go towards those of the prompt that the states are from) / Σ gap, over tasks, when the states of a "
    "span behind or in a layer are replaced: 1 where they bring the whole choice, 0 where they bring nothing. Control `random`: "
    "states of a third prompt." + _ROLE,
    source=_SOURCE,
    interval=MEAN,
    needs=(_MAPS,),
    figure=Figure(kind="curve", x="layer", by="span", card="patching"),
)
NET = measure(
    "tool",
    "patch_recovery_minus_random",
    unit="share of the gap",
    of="run",
    axes="role mode site span layer",
    means="`patch_recovery` less that of the third prompt's states, paired by task, over the tasks that have both.",
    interval=MEAN,
    needs=(_MAPS,),
    figure=Figure(kind="curve", x="layer", by="span", card="patching"),
)
HEAD = measure(
    "tool",
    "patch_recovery_head",
    unit="share of the gap",
    of="run",
    axes="role mode layer head",
    means="`patch_recovery` of one head's output at the decision: the last position of the prompt and the tokens of the names.",
    source=_SOURCE,
    interval=f"{MEAN}, all heads together (Bonferroni)",
    needs=(_PARTS,),
    figure=Figure(kind="matrix", x="head", by="layer", card="patching"),
)
LINEAR = measure(
    "tool",
    "patch_recovery_gradient",
    unit="share of the gap",
    of="run",
    axes="role mode site span layer head?",
    means="The first-order estimate of `patch_recovery`, and with `head` of `patch_recovery_head`: the gradient of the log-odds by "
    "the state, times what would replace it. `patch_gradient_spearman` says how far to trust it.",
    source="Nanda 2023; Syed et al. 2023",
    interval=f"{MEAN}; of heads all together (Bonferroni)",
    needs=(_MAPS,),
    figure=Figure(kind="table"),
)
SPEARMAN = measure(
    "tool",
    "patch_gradient_spearman",
    unit="rank correlation",
    of="run",
    axes="role mode site",
    means="Spearman's ρ of the estimate by gradients with the exact patch, in nats, over all layers and spans (of `z` all heads) "
    "of every task: 1 where it orders them alike. n are patches.",
    interval=RANKS,
    needs=(_MAPS,),
    figure=Figure(kind="text", card="patching"),
)
SET_CURVE = measure(
    "tool",
    "patch_set_curve",
    unit="share of the gap",
    of="run",
    axes="role half n_heads",
    means="`patch_recovery` of so many heads together, at the decision, on the half of the tasks on which they recover most one by "
    "one. The sizes are compared on the tasks that chose the heads.",
    needs=(_SETS,),
    figure=Figure(kind="curve", x="n_heads", by="half"),
)
SET_SIZE = measure(
    "tool",
    "patch_set_size",
    unit="heads",
    of="run",
    axes="role half",
    means=f"The smallest of the tried numbers of heads with `patch_set_curve` of {SHARE} or more; no row where none has.",
    needs=(_SETS,),
    figure=Figure(kind="text", card="patching"),
)
SET_RECOVERY = measure(
    "tool",
    "patch_set_recovery",
    unit="share of the gap",
    of="run",
    axes="role heads half?",
    means="`patch_recovery` of the set of `patch_set_size` heads (of the largest that was tried, where none is enough), on the tasks that "
    f"did not choose it: `together`; `random` is the mean over as many random heads of the same layers. {_HALVES}",
    interval=MEAN,
    needs=(_SETS,),
    figure=Figure(kind="estimates", by="heads", card="patching"),
)
SET_NET = measure(
    "tool",
    "patch_set_recovery_minus_random",
    unit="share of the gap",
    of="run",
    axes="role half?",
    means=f"`patch_set_recovery` of the heads less the task's own mean over random sets, paired by task. {_HALVES}",
    interval=MEAN,
    needs=(_SETS,),
    figure=Figure(kind="estimates", by="role", card="patching"),
)
_CELL = ["site", "span", "layer"]


def measures(run: Run) -> Iterator[Row]:
    """Measures of every kind of pair; nothing where none was patched."""
    table: Frame = run.table("patching")
    for role in sorted(table["pair"].unique()):
        of_role = table[table["pair"] == role]
        yield from _pairs(role, of_role)
        maps, parts, sets = (patched(table, name, role) for name in ("patching", "patch_parts", "patch_sets"))
        for mode in ("denoise", "noise"):
            place = {"role": role, "mode": mode}
            of_map, of_parts = (rows[rows["mode"] == mode] for rows in (maps, parts))
            yield from _recoveries(of_map[of_map["value"].notna()], place)
            yield from _recoveries(of_parts[of_parts["site"] != "z"], place)
            yield from _heads(HEAD, of_parts[of_parts["site"] == "z"], "value", place)
            yield from _estimates(of_map[of_map["linear"].notna()], place)
            yield from _agreement(of_map, of_parts, place)
        yield from _sets(sets, role)


def _ratio(defined: Measure, rows: Frame, column: str = "value", family: int = 1, **place: Any) -> Row:
    """The row of Σ column / Σ gap over tasks."""
    above, below = rows[column].to_numpy(np.float64), rows["gap"].to_numpy(np.float64)
    interval = ratio_interval(above, below, family)
    return defined.row(WHOLE_RUN, above.sum() / below.sum(), n=len(rows), interval=interval, **place)


def _pairs(role: str, table: Frame) -> Iterator[Row]:
    pairs = table[table["status"].notna()].drop_duplicates("task_id", keep="last")
    for status, n in pairs["status"].value_counts().items():
        yield PAIRS.row(WHOLE_RUN, n, n=len(pairs), role=role, status=status)
    ok = pairs[pairs["status"] == "ok"]
    if len(ok):
        yield GAP.mean((ok["clean"] - ok["corrupt"]).abs().to_numpy(), role=role)


def _recoveries(rows: Frame, place: dict[str, Any]) -> Iterator[Row]:
    for cell, group in rows.groupby(_CELL, sort=True):
        at = place | _at(cell)
        donors = {donor: of_donor.set_index("task_id") for donor, of_donor in group.groupby("donor")}
        yield _ratio(RECOVERY, donors["pair"], **at)
        if "control" in donors:
            yield _ratio(RECOVERY, donors["control"], control="random", **at)
            both = donors["pair"].join(donors["control"]["value"].rename("control"), how="inner")
            yield _ratio(NET, both.assign(value=both["value"] - both["control"]), **at)


def _at(cell: Any) -> dict[str, Any]:
    site, span, layer = cell
    return {"site": site, "span": span, "layer": int(layer)}


def _heads(defined: Measure, rows: Frame, column: str, place: dict[str, Any]) -> Iterator[Row]:
    by_head = rows.groupby(["layer", "head"], sort=True)
    for (layer, head), group in by_head:
        yield _ratio(defined, group, column, by_head.ngroups, layer=int(layer), head=int(head), **place)


def _estimates(rows: Frame, place: dict[str, Any]) -> Iterator[Row]:
    for cell, group in rows[rows["site"] != "z"].groupby(_CELL, sort=True):
        yield _ratio(LINEAR, group, "linear", **place, **_at(cell))
    of_heads = rows[rows["site"] == "z"]
    if len(of_heads):
        at = place | {"site": "z", "span": of_heads["span"].iloc[0]}
        yield from _heads(LINEAR, of_heads, "linear", at)


def _agreement(maps: Frame, parts: Frame, place: dict[str, Any]) -> Iterator[Row]:
    """The rank correlation of estimate and patch, where both were made."""
    import pandas as pd

    key = ["task_id", *_CELL, "head"]
    estimated, exact = (
        rows.assign(head=rows["head"].fillna(-1)).set_index(key)
        for rows in (maps[(maps["donor"] == "pair") & maps["linear"].notna()], parts)
    )
    values = pd.concat([rows[["value"]].dropna() for rows in (estimated, exact)])
    both = estimated[["linear"]].join(values, how="inner").reset_index()
    for site, rows in both.groupby("site", sort=True):
        groups = np.unique(rows["task_id"].to_numpy(str), return_inverse=True)[1]
        estimate = spearman(rows["linear"].to_numpy(), rows["value"].to_numpy(), groups)
        if estimate is not None:
            at = place | {"site": site}
            yield SPEARMAN.row(WHOLE_RUN, estimate.value, n=len(rows), interval=estimate.interval, **at)


def _sets(rows: Frame, role: str) -> Iterator[Row]:
    what = rows["heads"].str.extract(r'"(\w+)"')[0]
    curve = rows[what == CURVE]
    for half, of_half in curve.groupby("half"):
        for n_heads, group in of_half.groupby("n_heads"):
            recovery = group["value"].sum() / group["gap"].sum()
            place = {"role": role, "half": int(half), "n_heads": int(n_heads)}
            yield SET_CURVE.row(WHOLE_RUN, recovery, n=len(group), **place)
        size = smallest(of_half)
        if size is not None:
            n = of_half["task_id"].nunique()
            yield SET_SIZE.row(WHOLE_RUN, size, n=n, role=role, half=int(half))
    tested, drawn = (rows[what == name] for name in (TESTED, RANDOM))
    if tested.empty:
        return
    by_task = tested.set_index("task_id")[["value", "gap", "half"]]
    by_task["random"] = drawn.groupby("task_id")["value"].mean()
    for half in (0, 1, None):
        of_half = by_task if half is None else by_task[by_task["half"] == half]
        place = {"role": role, "half": half}
        if of_half.empty:
            continue
        yield _ratio(SET_RECOVERY, of_half, heads=TESTED, **place)
        at_random = of_half[of_half["random"].notna()]
        if len(at_random):
            yield _ratio(SET_RECOVERY, at_random, "random", heads=RANDOM, **place)
            yield _ratio(SET_NET, at_random.assign(value=at_random["value"] - at_random["random"]), **place)
