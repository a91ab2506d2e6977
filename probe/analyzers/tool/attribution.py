"""Measures of direct logit attribution: which parts of the model write the log-odds of two tools, and from where.

Reads the experiment `attribution` from the run's attribution.parquet (`probe.experiments.tool.attribution` says how the
log-odds are taken apart), and beside what a description writes what masking it takes away, from the experiment
`mask_decision`: attribution counts what goes straight to the logits, a mask also what later components make of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import MEAN, OVER_TASKS, RANKS, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.maths.intervals import mean_interval
from probe.maths.rank_correlation import spearman
from probe.runs.views.conditions import read_conditions

if TYPE_CHECKING:
    from probe.runs import Run

Frame = Any
"""A pandas DataFrame; see `probe.runs.views.conditions`."""
SHOWN_HEADS = 10
"""Heads whose reads are told by source."""
_NEEDS = ("experiment:attribution",)
_SOURCE = "Elhage et al. 2021"
_PAIR = (
    " Role `first_two`: the most probable of the names that are scored against the second; `chosen_right`: against the most probable right "
    "one, where that is another."
)
_SOURCES = (
    "`tool` and `other_tool` are the descriptions of the two, `tools` all others, `user` the last message that is no system's, `earlier` those "
    "before it, `name` the tokens of the name itself"
)
LOG_ODDS = measure(
    "tool",
    "attribution_log_odds",
    unit="nats",
    of="task run",
    axes="role tool? other_tool?",
    means="log P(tool) − log P(other) of two whole names: what `attribution` sums to." + _PAIR,
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="role", card="attribution"),
)
PART = measure(
    "tool",
    "attribution",
    unit="nats",
    of="task run",
    axes="role component layer?",
    means="What a part of the model adds to `attribution_log_odds` on the way straight to the logits, the norms on it held at "
    "their scale: Σ over the rows that emit the names of (what it wrote) · (the direction of the emitted token's log P). "
    "The parts sum to the log-odds; without `layer` over all layers, as every row of a task is. `normalizer` are the entropies of the rows that the "
    "names do not share, `remainder` is rounding.",
    source=_SOURCE,
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="bars", x="layer", by="component", card="attribution"),
)
HEAD = measure(
    "tool",
    "attribution_head",
    unit="nats",
    of="run",
    axes="role layer head",
    means="What a head adds to `attribution_log_odds`: Σ_j α_j v_j W_O · direction, over all that it reads.",
    source=_SOURCE,
    interval=f"{MEAN}, all heads together (Bonferroni)",
    needs=_NEEDS,
    figure=Figure(kind="matrix", x="head", by="layer", card="attribution"),
)
SPAN = measure(
    "tool",
    "attribution_span",
    unit="nats",
    of="task run",
    axes="role span layer? step?",
    means="What the heads' reads of a span add to `attribution_log_odds`, all heads together. Of a task by the span's label "
    "(`step` counts the messages where there are several); of the run, over the tasks that have it, by what it is to the pair: "
    f"{_SOURCES}.",
    source=_SOURCE,
    interval=OVER_TASKS,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="span", card="attribution"),
)
HEAD_SPAN = measure(
    "tool",
    "attribution_head_span",
    unit="nats",
    of="run",
    axes="role layer head span",
    means=f"`attribution_head` by what the head reads, of the {SHOWN_HEADS} heads of the largest mean; spans as in "
    "`attribution_span`.",
    source=_SOURCE,
    interval=f"{MEAN}, all heads and spans together (Bonferroni)",
    needs=_NEEDS,
    figure=Figure(kind="table", card="attribution"),
)
WORD = measure(
    "tool",
    "attribution_word",
    unit="nats",
    of="task",
    axes="role word word_index step?",
    means="What the heads' reads of a word of a message add to `attribution_log_odds`, in all layers; a token that carries "
    "two words counts for both.",
    source=_SOURCE,
    needs=_NEEDS,
    figure="words belong to one task",
)
KNOCKOUT = measure(
    "tool",
    "attribution_knockout",
    unit="nats",
    of="task run",
    axes="role span",
    means="How much `attribution_log_odds` falls when the description of `tool` or of `other_tool` is masked from the decision "
    "on: the cause beside `attribution_span`, which leaves out what later components make of a read.",
    source="Geva et al. 2023",
    interval=OVER_TASKS,
    needs=(*_NEEDS, "experiment:mask_decision"),
    figure=Figure(kind="estimates", by="span", card="attribution"),
)
SPEARMAN = measure(
    "tool",
    "attribution_spearman",
    unit="rank correlation",
    of="run",
    axes="role",
    means="Spearman's ρ of `attribution_span` with `attribution_knockout`, over the descriptions of both tools of every task: "
    "1 where what writes more also takes more away when it is masked. n are descriptions.",
    interval=RANKS,
    needs=(*_NEEDS, "experiment:mask_decision"),
    figure=Figure(kind="text", card="attribution"),
)
REMAINDER = measure(
    "tool",
    "attribution_remainder",
    unit="nats",
    of="run",
    axes="role",
    means="The largest distance, over tasks, between `attribution_log_odds` and the sum of its parts: rounding.",
    needs=_NEEDS,
    figure=Figure(kind="text", card="attribution"),
)
SCORE = measure(
    "tool",
    "attribution_score",
    unit="logits",
    of="run",
    axes="role layer head span",
    means="Score before the softmax (and before any softcap) of a head towards a description, at the row that emits the "
    "first token of the name: Σ_j a_j s_j over the description, a the head's attention within it.",
    interval=MEAN,
    needs=("experiment:head_scores",),
    figure=Figure(kind="table"),
)
SCORE_PART = measure(
    "tool",
    "attribution_score_part",
    unit="logits",
    of="run",
    axes="role layer head span module component writer?",
    means="`attribution_score` by what the head's query (module `query`), or its key (`key`), read: the embedding, or what the "
    "attention or MLP of layer `writer` wrote there, norms held at their scale; `bias` is what biases add. Each side sums to the "
    "score.",
    source=_SOURCE,
    interval=MEAN,
    needs=("experiment:head_scores",),
    figure=Figure(kind="table"),
)
_AXIS = {"part": "component"}
"""Columns of the table whose axis has another name."""
_DETAILS = ("log_odds", "span", "word")
"""Parts of the table that are not summands."""


def measures(run: Run) -> Iterator[Row | Grid]:
    """Measures of every pair of every task, and of the run; nothing where the experiment was not made."""
    stored: Frame = run.table("attribution")
    yield from _scores(stored[stored["experiment"] == "head_scores"])
    table = stored[stored["experiment"] == "attribution"]
    if table.empty:
        return
    knockouts = _knockouts(run, table)
    for role, of_role in table.groupby("pair", sort=True):
        yield from _whole(role, of_role)
        yield from _parts(role, of_role)
        yield from _heads(role, of_role)
        yield from _spans(role, of_role)
        yield from _caused(role, of_role, knockouts)


def _whole(role: str, table: Frame) -> Iterator[Row]:
    rows = table[table["part"] == "log_odds"]
    for row in rows.itertuples():
        tools: dict[str, Any] = {"tool": _name(row.tool), "other_tool": _name(row.other)}
        yield LOG_ODDS.row(row.task_id, row.value, role=role, **tools)
    yield LOG_ODDS.mean(rows["value"].to_numpy(), role=role)
    remainders = table[table["part"] == "remainder"]["value"].abs()
    yield REMAINDER.row(WHOLE_RUN, remainders.max(), n=len(remainders), role=role)


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _parts(role: str, table: Frame) -> Iterator[Row]:
    summands = table[~table["part"].isin(_DETAILS)]
    by_layer = summands[summands["layer"].notna()]
    for keys, layers in ((["part"], False), (["part", "layer"], True)):
        rows = by_layer if layers else summands
        sums = rows.groupby(["task_id", *keys], sort=False)["value"].sum()
        for (task_id, part), value in sums.items() if not layers else ():
            yield PART.row(task_id, value, role=role, component=part)
        for place, values in sums.groupby(keys, sort=False):
            yield PART.mean(values.to_numpy(), role=role, **_place(keys, place))


def _place(keys: list[str], labels: Any) -> dict[str, Any]:
    labels = labels if isinstance(labels, tuple | list) else [labels]
    place = dict(zip(keys, labels, strict=True))
    return {
        _AXIS.get(axis, axis): label if isinstance(label, str) else int(label)
        for axis, label in place.items()
    }


def _heads(role: str, table: Frame) -> Iterator[Row]:
    rows = table[table["part"] == "attention"]
    by_head = rows.groupby(["layer", "head", "task_id"], sort=True)["value"].sum()
    # tasks × heads
    values = by_head.unstack("task_id").T
    for (layer, head), column in values.items():
        data = column.to_numpy()
        interval = mean_interval(data, values.shape[1])
        place = {"role": role, "layer": int(layer), "head": int(head)}
        yield HEAD.row(WHOLE_RUN, float(data.mean()), n=len(data), interval=interval, **place)
    largest = values.mean().abs().sort_values(ascending=False, kind="stable").index[:SHOWN_HEADS]
    shown = rows.set_index(["layer", "head"]).loc[list(largest)]
    for (layer, head, source), group in shown.groupby(["layer", "head", "source"], sort=False):
        place = {"role": role, "layer": int(layer), "head": int(head), "span": source}
        # The heads are chosen by these numbers: the interval is that of all heads with all spans.
        interval = mean_interval(group["value"], values.shape[1] * rows["source"].nunique())
        yield HEAD_SPAN.row(WHOLE_RUN, float(group["value"].mean()), n=len(group), interval=interval, **place)


def _spans(role: str, table: Frame) -> Iterator[Row]:
    spans = table[table["part"] == "span"]
    words = dict(iter(table[table["part"] == "word"].groupby("task_id", sort=False)))
    for task_id, of_task in spans.groupby("task_id", sort=False):
        messages = sorted(set(of_task.loc[of_task["source"].isin(["user", "earlier"]), "start"]))
        several = {start: number for number, start in enumerate(messages, 1)} if len(messages) > 1 else {}
        steps = of_task["start"].map(lambda start, several=several: several.get(start, 0))
        sums = of_task.groupby([of_task["label"], steps], sort=False)["value"].sum()
        for (label, step), value in sums.items():
            yield SPAN.row(task_id, value, role=role, span=label, step=int(step) or None)
        for row in words[task_id].itertuples() if task_id in words else ():
            place = {"word": row.word, "word_index": int(row.word_index), "step": several.get(row.start)}
            yield WORD.row(task_id, row.value, role=role, **place)
    by_source = spans.groupby(["source", "layer", "task_id"], sort=False)["value"].sum()
    for (source, layer), values in by_source.groupby(["source", "layer"], sort=False):
        yield SPAN.mean(values.to_numpy(), role=role, span=source, layer=int(layer))
    for source, values in (
        by_source.groupby(["source", "task_id"], sort=False).sum().groupby("source", sort=False)
    ):
        yield SPAN.mean(values.to_numpy(), role=role, span=source)


def _scores(table: Frame) -> Iterator[Row]:
    import pandas as pd

    columns = {"role": "pair", "layer": "layer", "head": "head", "span": "source", "module": "part"}
    columns |= {"component": "label", "writer": "writer"}
    for place, rows in table.groupby(list(columns.values()), dropna=False, sort=False):
        at = {axis: value for axis, value in zip(columns, place, strict=True) if not pd.isna(value)}
        at |= {axis: int(at[axis]) for axis in ("layer", "head", "writer") if axis in at}
        if at["module"] == "score":
            del at["module"]
        yield (SCORE_PART if "module" in at else SCORE).mean(rows["value"].to_numpy(), **at)


# -- beside the cause ----------------------------------------------------------------------------------------------


def _knockouts(run: Run, table: Frame) -> dict[tuple[str, str, str], float]:
    """(task, pair, `tool` or `other_tool`) → how much the pair's log-odds fall when that description is masked."""
    conditions = read_conditions(run, ["mask_decision"])
    if conditions is None:
        return {}
    masked = {
        (conditions.tasks[task].id, subject): row
        for row, (task, subject) in enumerate(
            zip(conditions.task.tolist(), conditions.facts["subject"], strict=True)
        )
    }
    falls = {}
    for row in table[table["part"] == "log_odds"].itertuples():
        pair = [_name(row.tool), _name(row.other)]
        for span, subject in zip(("tool", "other_tool"), pair, strict=True):
            at = masked.get((row.task_id, subject))
            if at is None:
                continue
            task = int(conditions.task[at])
            places = [conditions.tasks[task].names.index(name) for name in pair]
            base, after = conditions.base[task, places], conditions.log_probs[at, places]
            falls[row.task_id, row.pair, span] = float((base[0] - base[1]) - (after[0] - after[1]))
    return falls


def _caused(role: str, table: Frame, knockouts: dict[tuple[str, str, str], float]) -> Iterator[Row]:
    spans = table[(table["part"] == "span") & table["source"].isin(["tool", "other_tool"])]
    written = spans.groupby(["source", "task_id"], sort=True)["value"].sum()
    fallen: dict[str, list[float]] = {}
    pairs: list[tuple[str, float, float]] = []
    for (source, task_id), value in written.items():
        fall = knockouts.get((task_id, role, source))
        if fall is not None:
            yield KNOCKOUT.row(task_id, fall, role=role, span=source)
            fallen.setdefault(source, []).append(fall)
            pairs.append((task_id, value, fall))
    for source, falls in fallen.items():
        yield KNOCKOUT.mean(falls, role=role, span=source)
    if pairs:
        tasks, written_by, lost = (np.array(column) for column in zip(*pairs, strict=True))
        estimate = spearman(written_by, lost, np.unique(tasks, return_inverse=True)[1])
        if estimate is not None:
            yield SPEARMAN.row(WHOLE_RUN, estimate.value, n=len(pairs), interval=estimate.interval, role=role)
