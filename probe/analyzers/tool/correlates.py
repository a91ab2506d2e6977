"""Correlation against cause: does what correlates with a tool tell what masking its description does?

Attention and norms are the measures of that name (`probe.analyzers.tool.attention`), the rest is known before the model
reads. `log_prob` correlates in part by construction: the knock-out is a difference from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.registry import RANKS, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.attention import by_tool, mean_of
from probe.maths.rank_correlation import spearman, spearman_within
from probe.runs.views.attention import decision_attention
from probe.runs.views.conditions import Conditions, Frame

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

CAUSES = ("knockout", "knockout_decision")


def _correlation(name: str, means: str) -> Measure:
    return measure(
        "tool",
        name,
        unit="rank correlation",
        of="run",
        axes="correlate cause",
        means=means,
        interval=RANKS,
        needs=("experiment:mask_all", "experiment:mask_decision"),
        figure=Figure(kind="estimates", by="correlate", card="why"),
    )


CAUSAL_SPEARMAN = _correlation(
    "causal_spearman",
    "Spearman's ρ, over every pair of task and tool, of a number that needs no intervention with minus the knock-out: 1 "
    "where the tool that has more of it also loses more when its description is masked. n are pairs.",
)
CAUSAL_SPEARMAN_WITHIN = _correlation(
    "causal_spearman_within",
    "The same of ranks within each task, centred on the task's mean rank, which leaves out what differs between tasks "
    "alone.",
)


def correlations(run: Run, conditions: Conditions, effects: Frame) -> Iterator[Row]:
    """`causal_spearman` and `causal_spearman_within` of every correlate that the run has with every cause.

    `effects` has columns `task`, `tool`, `name` and `value`.
    """
    causes = effects[effects["name"].isin(CAUSES)]
    if not len(causes):
        return
    causes = causes.pivot(index=["task", "tool"], columns="name", values="value")
    numbers = correlates(run, conditions).reindex(causes.index)
    for cause in CAUSES:
        for name in numbers if cause in causes else ():
            known = (numbers[name].notna() & causes[cause].notna()).to_numpy()
            x, y = numbers[name].to_numpy(dtype=np.float64)[known], -causes[cause].to_numpy()[known]
            groups = np.unique(causes.index.get_level_values("task")[known], return_inverse=True)[1]
            for defined, correlate in (
                (CAUSAL_SPEARMAN_WITHIN, spearman_within),
                (CAUSAL_SPEARMAN, spearman),
            ):
                estimate = correlate(x, y, groups)
                if estimate is not None:
                    value, interval = estimate
                    yield defined.row(
                        WHOLE_RUN, value, n=len(x), interval=interval, correlate=name, cause=cause
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
        reads = _reads(run[choice.id])
        for place, tool in enumerate(choice.names):
            if tool is not None:
                row = {"task": number, "tool": tool} | reads.get(tool, {})
                row["description_tokens"] = choice.description_tokens[tool] or np.nan
                row |= {"shown_position": place, "log_prob": conditions.base[number, place]}
                rows.append(row)
    return pd.DataFrame(rows).set_index(["task", "tool"])


def _reads(task: TaskRun) -> dict[str, dict[str, float]]:
    """Means over layers and heads, by tool and measure; empty where attention was not captured."""
    attention = decision_attention(task)
    if attention is None or not attention.tools:
        return {}
    means = {measure.name: mean_of(values, (0, 1)) for measure, values in by_tool(attention).items()}
    return {
        tool: {name: float(values[place]) for name, values in means.items()}
        for place, tool in enumerate(attention.tools)
    }
