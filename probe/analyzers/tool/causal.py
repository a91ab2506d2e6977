"""Why a tool is chosen: what changes when a definition, or a part of it, is masked, removed, exchanged or renamed.

The effect on a tool is a change in its log-odds against all other candidates, no tool included,
log P_i − log Σ_{j≠i} P_j (nats), from the unchanged prompt to the changed one. A masked text's attention
edges are cut before the softmax ("attention knockout", Geva et al. 2023), so that the rest takes its place; a
random span of the same length, masked in the same way, is the control.

Where attention is set against these effects (`causal_spearman`), attention is the correlation and the
knock-out is the cause.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import MEAN, OVER_TASKS, SHARE, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.correlates import correlations
from probe.maths.intervals import LEAST, ratio_interval, share_interval
from probe.maths.statistics import log_odds, renormalized
from probe.prompts.labels import DESCRIPTION, NAME
from probe.runs.views.choice import Choice
from probe.runs.views.conditions import Conditions, Frame, read_conditions

if TYPE_CHECKING:
    from probe.runs import Run

ROLES = ("chosen", "right", "other")
"""Roles that the run's means are over: the most probable tool, the acceptable tools, and all others."""
FIRST_TWO = "first_two"
_CHANGES = {
    "mask_all": "knockout",
    "mask_all_random": "knockout_random",
    "mask_part": "knockout",
    "mask_part_random": "knockout_random",
    "mask_decision": "knockout_decision",
    "mask_decision_random": "knockout_decision_random",
    "mask_window": "knockout_window",
    "scramble": "scramble",
    "word": "word",
}
_OTHERS = {"mask_all": "knockout_other", "mask_part": "knockout_other"}
"""Experiments whose effect on tools that are not acted upon is a control."""
_NET = {
    "knockout_minus_random": ("knockout", "knockout_random"),
    "knockout_minus_other": ("knockout", "knockout_other"),
    "knockout_decision_minus_random": ("knockout_decision", "knockout_decision_random"),
}
"""Difference → effect and control."""
_EXPERIMENTS = (*_CHANGES, "remove", "swap")
_PLACES = ("part", "layer", "layer_to", "word_index", "word", "other_tool")
_SMALL = 0.01  # nats: scores of one prompt agree within 1e-4 nats, 1 % of such a log-odds

_T_OF_TASK = f"95 % Student's t over its conditions, from {LEAST} on"
_T = f"of a task {_T_OF_TASK}; {OVER_TASKS}"
_OF_RUN = " Of the run the mean by role: over the role's tools within a task, then over tasks."
_EFFECTS: dict[str, Measure] = {}
"""Effects on a (task, tool), by name."""


def _effect(name: str, experiment: str, means: str, **more: Any) -> Measure:
    """An effect on a tool, and its mean by role unless `of` says otherwise."""
    definition: dict[str, Any] = {
        "unit": "nats",
        "of": "task run",
        "axes": "tool? role?",
        "means": means + (_OF_RUN if more.get("of") != "task" else ""),
        "interval": _T if more.get("of") != "task" else _T_OF_TASK,
        "needs": tuple(f"experiment:{each}" for each in experiment.split()),
        "figure": Figure(kind="estimates", by="role", card="why"),
    }
    _EFFECTS[name] = defined = measure("tool", name, **definition | more)
    return defined


_BY_PART = {"axes": "tool? role? part?"}
_effect(
    "knockout",
    "mask_all mask_part",
    "Change in the tool's log-odds when its whole definition, or with `part` its name, description or parameters alone, "
    "is masked from all later rows.",
    source="Geva et al. 2023",
    **_BY_PART,
)
_effect(
    "knockout_random",
    "mask_all_random mask_part_random",
    "Change in the tool's log-odds when a random run of the same length outside of its definition is masked instead: a "
    "control of `knockout`.",
    **_BY_PART,
)
_effect(
    "knockout_other",
    "mask_all mask_part",
    "Change in the tool's log-odds when another tool's definition, or that part of it, is masked instead, mean over the "
    "others: a control of `knockout`.",
    **_BY_PART,
)
_NET_OF_TASK = f"of a task that of the controls; {OVER_TASKS}"
_effect(
    "knockout_minus_random",
    "mask_all mask_all_random mask_part mask_part_random",
    "`knockout` minus the mean of its random controls, paired within the tool.",
    interval=_NET_OF_TASK,
    **_BY_PART,
)
_effect(
    "knockout_minus_other",
    "mask_all mask_part",
    "`knockout` minus `knockout_other`, paired within the tool: what masking this tool's text does and masking "
    "another's does not.",
    interval=_NET_OF_TASK,
    **_BY_PART,
)
_effect(
    "knockout_name_minus_description",
    "mask_part",
    "`knockout` of the tool's name minus that of its description.",
    interval=f"of a task none; {OVER_TASKS}",
)
_effect(
    "knockout_decision",
    "mask_decision",
    "Change in the tool's log-odds when its whole definition is masked from the decision on; what earlier tokens read of "
    "it stays.",
    source="Geva et al. 2023",
)
_effect(
    "knockout_decision_random",
    "mask_decision_random",
    "The control of `knockout_decision`, as `knockout_random`.",
)
_effect(
    "knockout_decision_minus_random",
    "mask_decision mask_decision_random",
    "`knockout_decision` minus the mean of its random controls.",
    interval=_NET_OF_TASK,
)
_effect(
    "knockout_window",
    "mask_window",
    "As `knockout_decision`, in the layers `layer` to `layer_to` alone.",
    axes="layer layer_to tool? role?",
    figure=Figure(kind="estimates", by="layer", card="why"),
)
_effect("scramble", "scramble", "Change in the tool's log-odds under a scrambled name.")
_effect(
    "word",
    "word",
    "Change in the tool's log-odds when one word of its description is masked from every row behind it; largest first.",
    of="task",
    axes="tool word word_index",
    figure=Figure(kind="table", by="word", card="why"),
)
_effect(
    "remove",
    "remove",
    "Change, when the tool is taken off the list, in the log-odds among the other candidates of the one that was most "
    "probable; 0 for a choice that weighs each on its own merits.",
    source="Luce 1959",
)
_effect(
    "remove_tv",
    "remove",
    "½ Σ |Δp| over the other candidates, renormalized, when the tool is taken off the list.",
    unit="probability",
)
_effect(
    "swap",
    "swap",
    "Change in log P(`tool`) − log P(`other_tool`) when the two exchange descriptions.",
    of="task",
    axes="tool other_tool",
    figure=Figure(kind="table", by="tool", card="why"),
)
_effect(
    "swap_share",
    "swap",
    "−change / (2 · difference before) of `swap`: 1 where the choice goes with the description, 0 where it goes with name "
    f"and place; left out where the difference is below {_SMALL:g}.",
    unit="share",
    of="task",
    axes="tool other_tool",
    figure=Figure(kind="table", by="tool", card="why"),
)
SWAP_SLOPE = measure(
    "tool",
    "swap_slope",
    unit="share",
    of="run",
    means="Slope through the origin of the change of `swap` on −2 · difference before, so that pairs without a preference "
    "weigh nothing and the direction in which a pair is read does not matter: 1 where choices go with descriptions. n "
    "are pairs.",
    interval=MEAN,
    needs=("experiment:swap",),
    figure=Figure(kind="text", card="why"),
)
SWAP_FOLLOW_DESCRIPTION = measure(
    "tool",
    "swap_follow_description",
    unit="share of pairs",
    of="run",
    axes="role?",
    means="Pairs whose preference is reversed when they exchange descriptions; with role `first_two` one pair a task, its "
    "two most probable tools, since the pairs of a task share its first tool. n are pairs.",
    interval=SHARE,
    needs=("experiment:swap",),
    figure=Figure(kind="text", card="why"),
)


def measures(run: Run) -> Iterator[Row]:
    """Effects of every (task, tool), their means over the run, and what correlates with them."""
    import pandas as pd

    conditions = read_conditions(run, _EXPERIMENTS)
    if conditions is None:
        return
    changes = pd.concat(
        [_changes(conditions.of(_CHANGES)), _on_others(conditions.of(_OTHERS))], ignore_index=True
    )
    swaps = _swaps(conditions.of(["swap"]))
    effects = pd.concat(
        [changes, _net(changes), _removals(conditions.of(["remove"])), _swap_rows(swaps)], ignore_index=True
    )
    yield from _rows(effects.sort_values("task", kind="stable"), conditions)
    yield from _means(effects, conditions)
    yield from _swap_summary(swaps)
    yield from correlations(run, conditions, effects)


# -- effects: data frames of task, tool, name, value, low, high, n and _PLACES -------------------------------------


def _effects(places: Frame) -> Frame:
    """Mean of `value` over the conditions of each place, with Student's 95 % interval where there are LEAST."""
    import scipy.stats

    places = places.assign(**{name: None for name in _PLACES if name not in places})
    keys = ["task", "tool", "name", *_PLACES]
    grouped = places.dropna(subset=["value"]).groupby(keys, sort=False, dropna=False)["value"]
    out = grouped.agg(["mean", "count", "std"]).reset_index()
    out["part"] = out["part"].astype(object).where(out["part"].notna(), None)
    n = out["count"].to_numpy()
    half = scipy.stats.t.ppf(0.975, np.maximum(n - 1, 1)) * out["std"].to_numpy() / np.sqrt(np.maximum(n, 1))
    half = np.where(n >= LEAST, half, np.nan)
    out = out.rename(columns={"mean": "value", "count": "n"}).drop(columns="std")
    return out.assign(low=out["value"] - half, high=out["value"] + half)


def _changes(conditions: Conditions) -> Frame:
    """Change in the log-odds of the tool that was acted upon."""
    import pandas as pd

    facts = conditions.facts
    acted = conditions.column("subject")[:, None] == np.arange(conditions.base.shape[1])
    after, before = log_odds(conditions.log_probs, acted), log_odds(conditions.base[conditions.task], acted)
    names = facts["experiment"].map(_CHANGES)
    window = names == "knockout_window"
    words = [
        json.loads(text) if name == "word" else {} for name, text in zip(names, facts["detail"], strict=True)
    ]
    places = {
        "task": conditions.task,
        "tool": facts["subject"],
        "name": names,
        "part": facts["part"],
        "layer": facts["layer_from"].where(window),
        "layer_to": facts["layer_to"].where(window),
        "word_index": [word.get("index") for word in words],
        "word": [word.get("text") for word in words],
        "value": after - before,
    }
    out = _effects(pd.DataFrame(places))
    largest = out["value"].abs().where(out["name"] == "word")
    return out.iloc[np.lexsort([-largest.fillna(np.inf), out["task"]])].reset_index(drop=True)


def _on_others(conditions: Conditions) -> Frame:
    """Change in the log-odds of each tool when another one was acted upon."""
    import pandas as pd

    tools = np.full((len(conditions.tasks), conditions.base.shape[1]), None, dtype=object)
    for number, choice in enumerate(conditions.tasks):
        tools[number, : choice.n_tools] = choice.tools
    each = np.eye(conditions.base.shape[1], dtype=bool)
    after, before = (
        log_odds(scores[:, None], each) for scores in (conditions.log_probs, conditions.base[conditions.task])
    )
    tools, facts = tools[conditions.task], conditions.facts
    rows, columns = np.nonzero((tools != None) & (tools != facts["subject"].to_numpy()[:, None]))  # noqa: E711
    places = {
        "task": conditions.task[rows],
        "tool": tools[rows, columns],
        "name": facts["experiment"].map(_OTHERS).to_numpy()[rows],
        "part": facts["part"].to_numpy()[rows],
        "value": (after - before)[rows, columns],
    }
    return _effects(pd.DataFrame(places))


def _net(changes: Frame) -> Frame:
    """Each effect minus the mean of its controls, whose interval it takes over; a name's minus its description's."""
    import pandas as pd

    out = [changes.iloc[:0]]
    for net, (name, against) in _NET.items():
        effect, control = (changes[changes["name"] == each] for each in (name, against))
        both = effect.merge(control, on=["task", "tool", "part"], suffixes=("", "_control"))
        low, high = both["value"] - both["high_control"], both["value"] - both["low_control"]
        both = both.assign(
            name=net, low=low, high=high, n=both["n_control"], value=both["value"] - both["value_control"]
        )
        out.append(both[changes.columns])
    effects = changes[changes["name"] == "knockout"]
    name, description = (effects[effects["part"] == part] for part in (NAME, DESCRIPTION))
    both = name.merge(description, on=["task", "tool"], suffixes=("", "_description"))
    both = both.assign(
        name="knockout_name_minus_description", part=None, value=both["value"] - both["value_description"]
    )
    out.append(both[changes.columns])
    return pd.concat(out, ignore_index=True)


def _removals(conditions: Conditions) -> Frame:
    """What taking a tool off the list does to the candidates that remain.

    `remove_tv`: total variation between the remaining candidates' distributions with and without the tool, each
    renormalised over them. `remove`: change in the log-odds, among them, of the one that was most probable
    before. A choice that weighs each candidate on its own merits (Luce 1959) has 0 in both.
    """
    import pandas as pd

    column, rows = conditions.column("subject"), np.arange(len(conditions.facts))
    kept = ~np.isnan(conditions.base[conditions.task])
    kept[rows, column] = False
    before, after = (
        renormalized(conditions.base[conditions.task], kept),
        renormalized(conditions.log_probs, kept),
    )
    first = np.where(kept, before, -np.inf).argmax(1)[:, None] == np.arange(kept.shape[1])
    odds = [log_odds(np.where(kept, p, np.nan), first) for p in (before, after)]
    common = {"task": conditions.task, "tool": conditions.facts["subject"]}
    values = {"remove": odds[1] - odds[0], "remove_tv": np.abs(np.exp(after) - np.exp(before)).sum(1) / 2}
    frames = [
        _effects(pd.DataFrame({**common, "name": name, "value": value})) for name, value in values.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _swaps(conditions: Conditions) -> Frame:
    """One row a pair: `before` and `after`, log P(subject) − log P(other) without and with the exchange (nats),
    and whether the pair holds the two most probable tools (`first_two`)."""
    import pandas as pd

    first, second, rows = (
        conditions.column("subject"),
        conditions.column("other"),
        np.arange(len(conditions.facts)),
    )
    base = conditions.base[conditions.task]
    first_two = [
        _first_two(task, scores) for task, scores in zip(conditions.tasks, conditions.base, strict=True)
    ]
    pairs = zip(conditions.task, conditions.facts["subject"], conditions.facts["other"], strict=True)
    return pd.DataFrame(
        {
            "task": conditions.task,
            "tool": conditions.facts["subject"],
            "other_tool": conditions.facts["other"],
            "before": base[rows, first] - base[rows, second],
            "after": conditions.log_probs[rows, first] - conditions.log_probs[rows, second],
            "first_two": [first_two[task] == {subject, other} for task, subject, other in pairs],
        }
    ).dropna(subset=["before", "after"])


def _first_two(task: Choice, scores: np.ndarray) -> set[str]:
    """The two most probable tools."""
    tools = [(score, name) for score, name in zip(scores, task.names, strict=False) if name is not None]
    return {name for _, name in sorted(tools, reverse=True)[:2]}


def _swap_rows(swaps: Frame) -> Frame:
    """`swap`: change in the log-odds of the tool against `other_tool`, its partner.

    `swap_share` is −change / (2 · log-odds before): 1 where the choice goes with the description, 0 where it
    goes with the name and its place in the list. Left out where the log-odds before are nearly 0.
    """
    import pandas as pd

    change = swaps["after"] - swaps["before"]
    part = (-change / (2 * swaps["before"])).where(swaps["before"].abs() >= _SMALL)
    common = {name: swaps[name] for name in ("task", "tool", "other_tool")}
    frames = [
        _effects(pd.DataFrame({**common, "name": name, "value": value}))
        for name, value in (("swap", change), ("swap_share", part))
    ]
    return pd.concat(frames, ignore_index=True)


def _rows(effects: Frame, conditions: Conditions) -> Iterator[Row]:
    import pandas as pd

    for row in effects.itertuples(index=False):
        place = {name: value for name in _PLACES if not pd.isna(value := getattr(row, name))}
        for name in ("layer", "layer_to", "word_index"):
            if name in place:
                place[name] = int(place[name])
        yield _EFFECTS[row.name].row(
            conditions.tasks[row.task].id,
            row.value,
            n=row.n,
            interval=None if pd.isna(row.low) else (row.low, row.high),
            tool=row.tool,
            **place,
        )


# -- the run -----------------------------------------------------------------------------------------------------


def _means(effects: Frame, conditions: Conditions) -> Iterator[Row]:
    """Mean of each effect by role: over the role's tools within a task, then over the tasks."""
    import pandas as pd

    by_role = {name for name, defined in _EFFECTS.items() if "run" in defined.of}
    effects = effects[effects["name"].isin(by_role)]
    roles = [
        conditions.tasks[task].role(tool) for task, tool in zip(effects["task"], effects["tool"], strict=True)
    ]
    places = ["name", "part", "layer", "layer_to"]
    for role in ROLES:
        rows = effects[np.array([role in r for r in roles], dtype=bool)]
        within = rows.groupby([*places, "task"], sort=False, dropna=False)["value"].mean()
        for (name, part, layer, layer_to), values in within.groupby(level=places, sort=False, dropna=False):
            window = {} if pd.isna(layer) else {"layer": int(layer), "layer_to": int(layer_to)}
            yield _EFFECTS[name].mean(values, role=role, part=None if pd.isna(part) else part, **window)


def _swap_summary(swaps: Frame) -> Iterator[Row]:
    """How far the choice goes with descriptions, over the run."""
    if not len(swaps):
        return
    x, y = -2 * swaps["before"], swaps["after"] - swaps["before"]
    products, squares = ((x * other).groupby(swaps["task"]).sum().to_numpy() for other in (y, x))
    if squares.sum() > 0:
        slope = float(products.sum() / squares.sum())
        yield SWAP_SLOPE.row(WHOLE_RUN, slope, n=len(swaps), interval=ratio_interval(products, squares))
    decided = swaps[swaps["before"] != 0]
    flipped = decided["before"] * decided["after"] < 0
    for role, pairs in ((None, flipped), (FIRST_TWO, flipped[decided["first_two"]])):
        if len(pairs):
            by_task = pairs.groupby(decided["task"].loc[pairs.index])
            interval = share_interval(by_task.sum().to_numpy(), by_task.size().to_numpy())
            share = float(pairs.mean())
            yield SWAP_FOLLOW_DESCRIPTION.row(WHOLE_RUN, share, n=len(pairs), interval=interval, role=role)
