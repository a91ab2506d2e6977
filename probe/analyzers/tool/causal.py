"""Why a tool is chosen: what changes when a description is masked, removed, exchanged or renamed.

The effect on a tool is a change in its log-odds against all other candidates, no tool included,
log P_i − log Σ_{j≠i} P_j (nats), from the unchanged prompt to the changed one. A masked description's attention
edges are cut before the softmax ("attention knockout", Geva et al. 2023), so that the rest takes its place; a
random run of as many positions, masked in the same way, is the control.

Where attention is set against these effects (`causal_spearman`), attention is the correlation and the
knock-out is the cause.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.analyzers.tool.conditions import Choice, Conditions, Frame, read_conditions, renormalized
from probe.analyzers.tool.correlates import correlations
from probe.maths.statistics import bootstrap_mean, bootstrap_ratio, log_odds, wilson

if TYPE_CHECKING:
    from probe.runs import Run

_NAME = "tool"
ROLES = ("chosen", "right", "other")
"""`variant` of the run's means: the most probable tool, the acceptable tools, and the tools that are neither."""
_CHANGES = {
    "mask_all": "knockout",
    "mask_all_random": "knockout_random",
    "mask_decision": "knockout_decision",
    "mask_decision_random": "knockout_decision_random",
    "mask_window": "knockout_window",
    "scramble": "scramble",
    "word": "word",
}
_NET = {
    "knockout": "knockout_minus_random",
    "knockout_decision": "knockout_decision_minus_random",
}
_EXPERIMENTS = (*_CHANGES, "remove", "swap")
_SMALL = 0.01  # nats: scores of one prompt agree within 1e-4 nats, 1 % of such a log-odds


def measures(run: Run) -> Iterator[Row | Grid]:
    """Effects of every (task, tool), their means over the run, and what correlates with them."""
    import pandas as pd

    conditions = read_conditions(run, _EXPERIMENTS)
    if conditions is None:
        return
    changes = _changes(conditions.of(_CHANGES))
    swaps = _swaps(conditions.of(["swap"]))
    effects = pd.concat(
        [changes, _net(changes), _removals(conditions.of(["remove"])), _swap_rows(swaps)], ignore_index=True
    )
    yield from _rows(effects.sort_values("task", kind="stable"), conditions)
    yield from _means(effects, conditions)
    yield from _swap_summary(swaps)
    yield from correlations(run, conditions, effects)


# -- effects: data frames of task, tool, name, unit, value, low, high, n, layer, span, variant --------------------


def _effects(places: Frame, unit: str) -> Frame:
    """Mean of `value` over the conditions of each place, with Student's 95 % interval where there are several."""
    import scipy.stats

    keys = ["task", "tool", "name", "layer", "variant", "span"]
    found = places.dropna(subset=["value"]).groupby(keys, sort=False, dropna=False)["value"]
    out = found.agg(["mean", "count", "std"]).reset_index()
    n = out["count"].to_numpy()
    half = scipy.stats.t.ppf(0.975, np.maximum(n - 1, 1)) * out["std"].to_numpy() / np.sqrt(np.maximum(n, 1))
    half = np.where(n > 1, half, np.nan)  # one number, without an interval
    out = out.rename(columns={"mean": "value", "count": "n"}).drop(columns="std")
    return out.assign(unit=unit, low=out["value"] - half, high=out["value"] + half)


def _changes(found: Conditions) -> Frame:
    """Change in the log-odds of the tool that was acted upon."""
    import pandas as pd

    facts = found.facts
    acted = found.column("subject")[:, None] == np.arange(found.base.shape[1])
    after, before = log_odds(found.log_probs, acted), log_odds(found.base[found.task], acted)
    names = facts["experiment"].map(_CHANGES)
    window, word = (names == name for name in ("knockout_window", "word"))
    places = {
        "task": found.task,
        "tool": facts["subject"],
        "name": names,
        "layer": facts["layer_from"].where(window),
        "variant": [
            f"{int(first)}-{int(last)}" if shown else None
            for first, last, shown in zip(facts["layer_from"], facts["layer_to"], window, strict=True)
        ],
        "span": [_word(text) if shown else None for text, shown in zip(facts["detail"], word, strict=True)],
        "value": after - before,
    }
    out = _effects(pd.DataFrame(places), "nats")
    largest = out["value"].abs().where(out["name"] == "word")
    return out.iloc[np.lexsort([-largest.fillna(np.inf), out["task"]])].reset_index(drop=True)


def _word(detail: str) -> str:
    found = json.loads(detail)
    return f"{found['index']}:{found['text']}"


def _net(changes: Frame) -> Frame:
    """Knock-out minus the mean of its random controls, whose interval it takes over."""
    import pandas as pd

    out = [changes.iloc[:0]]
    for name, net in _NET.items():
        effect = changes[changes["name"] == name]
        control = changes[changes["name"] == f"{name}_random"]
        both = effect.merge(control, on=["task", "tool"], suffixes=("", "_random"))
        low, high = both["value"] - both["high_random"], both["value"] - both["low_random"]
        both = both.assign(
            name=net, low=low, high=high, n=both["n_random"], value=both["value"] - both["value_random"]
        )
        out.append(both[changes.columns])
    return pd.concat(out, ignore_index=True)


def _removals(found: Conditions) -> Frame:
    """What taking a tool off the list does to the candidates that remain.

    `remove_tv`: total variation between the remaining candidates' distributions with and without the tool, each
    renormalised over them. `remove`: change in the log-odds, among them, of the one that was most probable
    before. A choice that weighs each candidate on its own merits (Luce 1959) has 0 in both.
    """
    import pandas as pd

    column, rows = found.column("subject"), np.arange(len(found.facts))
    kept = ~np.isnan(found.base[found.task])
    kept[rows, column] = False
    before, after = renormalized(found.base[found.task], kept), renormalized(found.log_probs, kept)
    first = np.where(kept, before, -np.inf).argmax(1)[:, None] == np.arange(kept.shape[1])
    odds = [log_odds(np.where(kept, p, np.nan), first) for p in (before, after)]
    common = {
        "task": found.task,
        "tool": found.facts["subject"],
        "layer": None,
        "variant": None,
        "span": None,
    }
    values = {"remove": odds[1] - odds[0], "remove_tv": np.abs(np.exp(after) - np.exp(before)).sum(1) / 2}
    units = {"remove": "nats", "remove_tv": "probability"}
    frames = [
        _effects(pd.DataFrame({**common, "name": name, "value": value}), units[name])
        for name, value in values.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _swaps(found: Conditions) -> Frame:
    """One row a pair: `before` and `after`, log P(subject) − log P(other) without and with the exchange (nats),
    and whether the pair holds the two most probable tools (`first_two`)."""
    import pandas as pd

    one, two, rows = found.column("subject"), found.column("other"), np.arange(len(found.facts))
    base = found.base[found.task]
    first_two = [_first_two(task, scores) for task, scores in zip(found.tasks, found.base, strict=True)]
    pairs = zip(found.task, found.facts["subject"], found.facts["other"], strict=True)
    return pd.DataFrame(
        {
            "task": found.task,
            "tool": found.facts["subject"],
            "variant": found.facts["other"],
            "before": base[rows, one] - base[rows, two],
            "after": found.log_probs[rows, one] - found.log_probs[rows, two],
            "first_two": [first_two[task] == {subject, other} for task, subject, other in pairs],
        }
    ).dropna(subset=["before", "after"])


def _first_two(task: Choice, scores: np.ndarray) -> set[str]:
    """The two most probable tools."""
    tools = [(score, name) for score, name in zip(scores, task.names, strict=False) if name is not None]
    return {name for _, name in sorted(tools, reverse=True)[:2]}


def _swap_rows(swaps: Frame) -> Frame:
    """`swap`: change in the log-odds of the tool against `variant`, its partner.

    `swap_share` is −change / (2 · log-odds before): 1 where the choice goes with the description, 0 where it
    goes with the name and its place in the list. Left out where the log-odds before are nearly 0.
    """
    import pandas as pd

    change = swaps["after"] - swaps["before"]
    share = (-change / (2 * swaps["before"])).where(swaps["before"].abs() >= _SMALL)
    common = {"task": swaps["task"], "tool": swaps["tool"], "layer": None, "variant": swaps["variant"]}
    return pd.concat(
        [
            _effects(pd.DataFrame({**common, "span": None, "name": name, "value": value}), unit)
            for name, unit, value in (("swap", "nats", change), ("swap_share", "share", share))
        ],
        ignore_index=True,
    )


def _rows(effects: Frame, conditions: Conditions) -> Iterator[Row]:
    import pandas as pd

    for row in effects.itertuples(index=False):
        yield Row(
            task_id=conditions.tasks[row.task].id,
            analyzer=_NAME,
            name=row.name,
            value=row.value,
            unit=row.unit,
            n=row.n,
            low=None if pd.isna(row.low) else row.low,
            high=None if pd.isna(row.high) else row.high,
            layer=None if pd.isna(row.layer) else int(row.layer),
            span=None if pd.isna(row.span) else row.span,
            tool=row.tool,
            variant=None if pd.isna(row.variant) else row.variant,
        )


# -- the run -----------------------------------------------------------------------------------------------------


def _means(effects: Frame, conditions: Conditions) -> Iterator[Row]:
    """Mean of each effect by role: over the role's tools within a task, then over the tasks.

    `variant` is the role; for `knockout_window` "chosen:0-7", and `layer` the window's first.
    """
    names = {"knockout", "knockout_decision", "knockout_window", "scramble", "remove", "remove_tv"}
    names |= {f"{name}_random" for name in _NET} | set(_NET.values())
    found = effects[effects["name"].isin(names)]
    roles = [
        conditions.tasks[task].role(tool) for task, tool in zip(found["task"], found["tool"], strict=True)
    ]
    for role in ROLES:
        rows = found[np.array([role in r for r in roles], dtype=bool)]
        places = ["name", "unit", "layer", "variant"]
        within = rows.groupby([*places, "task"], sort=False, dropna=False)["value"].mean()
        for place, values in within.groupby(level=places, sort=False, dropna=False):
            name, unit, layer, window = place
            inside = isinstance(window, str)
            yield _estimate(
                name,
                f"{role}:{window}" if inside else role,
                float(values.mean()),
                unit,
                len(values),
                bootstrap_mean(values),
                layer=int(layer) if inside else None,
            )


def _swap_summary(swaps: Frame) -> Iterator[Row]:
    """How far the choice goes with descriptions, over the run.

    `swap_slope` is the slope through the origin of change on −2 · log-odds before, so that pairs without a
    preference weigh nothing and the direction in which a pair is read does not matter; its interval resamples
    tasks, n are pairs. `swap_follow_description` is the share of pairs whose preference is reversed; the pairs
    of one task share its first tool, so `variant` "first two" counts one pair a task, its two most probable
    tools.
    """
    if not len(swaps):
        return
    x, y = -2 * swaps["before"], swaps["after"] - swaps["before"]
    sums = (x * y).groupby(swaps["task"]).sum(), (x * x).groupby(swaps["task"]).sum()
    if sums[1].sum() > 0:
        products, squares = (s.to_numpy() for s in sums)
        slope = float(products.sum() / squares.sum())
        interval = bootstrap_ratio(products, squares)
        yield _estimate("swap_slope", None, slope, "share", len(swaps), interval)
    decided = swaps[swaps["before"] != 0]
    flipped = decided["before"] * decided["after"] < 0
    for variant, rows in ((None, flipped), ("first two", flipped[decided["first_two"]])):
        if len(rows):
            share = float(rows.mean())
            yield _estimate(
                "swap_follow_description",
                variant,
                share,
                "share of pairs",
                len(rows),
                wilson(share, len(rows)),
            )


def _estimate(
    name: str,
    variant: str | None,
    value: float,
    unit: str,
    n: int,
    interval: tuple[float, float] | None,
    layer: int | None = None,
) -> Row:
    low, high = interval or (None, None)
    return Row(
        task_id=WHOLE_RUN,
        analyzer=_NAME,
        name=name,
        value=value,
        unit=unit,
        low=low,
        high=high,
        n=n,
        layer=layer,
        variant=variant,
    )
