"""Correlation against cause: does what correlates with a tool tell what masking its description does?

`causal_spearman` is the Spearman correlation, over every (task, tool), of a number that needs no intervention
with minus the knock-out: 1 where the tool that has more of it also loses more when its description is masked.
`causal_spearman_within` correlates the ranks within each task, centred on the task's mean rank: it leaves out
what differs between tasks alone. `variant` is "NUMBER~CAUSE"; n are pairs of task and tool; intervals resample
tasks, since the tools of a task are not independent.

`log_prob` correlates in part by construction: the knock-out is a difference from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.conditions import Conditions, Frame
from probe.maths.rank_correlation import spearman, spearman_within
from probe.prompts.labels import SINKS, tool_of

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

CAUSES = ("knockout", "knockout_decision")


def correlations(run: Run, conditions: Conditions, effects: Frame) -> Iterator[Row]:
    """`causal_spearman` and `causal_spearman_within` of every correlate that the run has with every cause.

    `effects` has columns `task`, `tool`, `name` and `value`.
    """
    causes = effects[effects["name"].isin(CAUSES)]
    if not len(causes):
        return
    causes = causes.pivot(index=["task", "tool"], columns="name", values="value")
    found = correlates(run, conditions).reindex(causes.index)
    for cause in CAUSES:
        for name in found if cause in causes else ():
            there = (found[name].notna() & causes[cause].notna()).to_numpy()
            x, y = found[name].to_numpy(dtype=np.float64)[there], -causes[cause].to_numpy()[there]
            groups = np.unique(causes.index.get_level_values("task")[there], return_inverse=True)[1]
            for measure, correlate in (
                ("causal_spearman", spearman),
                ("causal_spearman_within", spearman_within),
            ):
                estimate = correlate(x, y, groups)
                if estimate is not None:
                    low, high = estimate.interval or (None, None)
                    yield Row(
                        task_id=WHOLE_RUN,
                        analyzer="tool",
                        name=measure,
                        value=estimate.value,
                        unit="rank correlation",
                        n=len(x),
                        low=low,
                        high=high,
                        variant=f"{name}~{cause}",
                    )


# -- what correlates ---------------------------------------------------------------------------------------------


def correlates(run: Run, conditions: Conditions) -> Frame:
    """One row a (task, tool), one column a number at the decision that no intervention made; NaN where absent.

    Attention and norms are means over layers and heads; a sum over them differs by a constant, and so not in
    rank.
    """
    import pandas as pd

    rows = []
    for number, choice in enumerate(conditions.tasks):
        read = _read(run[choice.id])
        for place, tool in enumerate(choice.names):
            if tool is not None:
                row = {"task": number, "tool": tool} | read.get(tool, {})
                row["description_tokens"] = choice.tokens[tool] or np.nan
                row |= {"shown_position": place, "log_prob": conditions.base[number, place]}
                rows.append(row)
    return pd.DataFrame(rows).set_index(["task", "tool"])


def _read(task: TaskRun) -> dict[str, dict[str, float]]:
    """What the decision's row reads from each tool's description; nothing where it was not captured."""
    from probe.analyzers.tool.attention import decision_attention

    found: dict[str, dict[str, float]] = {}
    attention = decision_attention(task)
    if attention is not None and attention.tools:
        columns = list(attention.tools.values())
        mass = attention.mass[:, :, columns]
        sinks = [column for column, label in enumerate(attention.labels) if label in SINKS]
        read = {
            "attention": mass,
            "attention_rate": mass / attention.tokens[columns],
            "attention_restricted": _share(mass, mass.sum(-1, keepdims=True)),
            "attention_no_sink": _share(mass, 1 - attention.mass[:, :, sinks].sum(-1, keepdims=True)),
        }
        for name, values in read.items():
            _collect(found, name, list(attention.tools), values)
    if "value_to_spans" in task:
        position = int(task["decisions"][0])
        row = int((task["rows"] == position).nonzero()[0, 0])
        norms = task.slice("value_to_spans")[:, :, row : row + 1, :][:, :, 0].double().numpy()
        labels = task.labels()
        columns = [column for column, label in enumerate(labels) if tool_of(label) is not None]
        _collect(
            found,
            "value_norm",
            [name for name in map(tool_of, labels) if name is not None],
            norms[:, :, columns],
        )
    return found


def _share(mass: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(mass, total, out=np.full_like(mass, np.nan), where=total > 1e-9)


def _collect(found: dict[str, dict[str, float]], name: str, tools: list[str], values: np.ndarray) -> None:
    """Means over layer and head of what is there, under each tool."""
    for tool, own in zip(tools, np.moveaxis(values, -1, 0), strict=True):
        if not np.isnan(own).all():
            found.setdefault(tool, {})[name] = float(np.nanmean(own))
