"""Correlation against cause: does what correlates with a tool tell what masking it does?

Attention and norms are the measures of that name (`probe.analyzers.tool.attention`), the rest is known before the model
reads. `log_prob` correlates in part by construction: the knock-out is a difference from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import RANKS, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.analyzers.tool.attention import by_tool, mean_of
from probe.maths.rank_correlation import spearman, spearman_within
from probe.prompts.labels import TOOL_PARTS
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
        axes="correlate cause part?",
        means=means,
        interval=RANKS,
        needs=("experiment:mask_all", "experiment:mask_decision", "experiment:mask_part"),
        figure=Figure(kind="estimates", by="correlate", card="why"),
    )


CAUSAL_SPEARMAN_WITHIN = _correlation(
    "causal_spearman_within",
    "Rank correlation, of ranks within each task about the task's mean rank, of a number that needs no intervention with minus the "
    "knock-out: 1 where the tool of a task that has more of it also loses more when its definition is masked. With `part` both are "
    "those of one part of the definition. n are pairs of task and tool.",
)
CAUSAL_SPEARMAN = _correlation(
    "causal_spearman",
    "Spearman's ρ of the same over every pair of task and tool, so that differences between tasks count as well. n are pairs.",
)


def correlations(run: Run, conditions: Conditions, effects: Frame) -> Iterator[Row]:
    """`causal_spearman` and `causal_spearman_within` of every correlate that the run has with every cause.

    `effects` has columns `task`, `tool`, `name` and `value`.
    """
    causes = effects[effects["name"].isin(CAUSES)]
    if not len(causes):
        return
    numbers = correlates(run, conditions)
    for part in (None, *TOOL_PARTS):
        of_part = causes["part"].isna() if part is None else causes["part"] == part
        effect = causes[of_part].pivot(index=["task", "tool"], columns="name", values="value")
        if part in numbers and len(effect):
            yield from _of_part(part, numbers[part].reindex(effect.index), effect)


def _of_part(part: str | None, numbers: Frame, causes: Frame) -> Iterator[Row]:
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
                    place = {"correlate": name, "cause": cause, "part": part}
                    yield defined.row(WHOLE_RUN, value, n=len(x), interval=interval, **place)


# -- what correlates ---------------------------------------------------------------------------------------------


def correlates(run: Run, conditions: Conditions) -> dict[str | None, Frame]:
    """Part of the definition, None for the whole → one row a (task, tool) that has it, one column a number at the
    decision that no intervention made; NaN where absent.

    Attention and norms are means over layers and heads; a sum over them differs by a constant, and so not in
    rank.
    """
    import pandas as pd

    rows: dict[str | None, list[dict[str, Any]]] = defaultdict(list)
    for number, choice in enumerate(conditions.tasks):
        reads = _reads(run[choice.id])
        for place, tool in enumerate(choice.names):
            if tool is None:
                continue
            common = {"task": number, "tool": tool}
            known = {"shown_position": place, "log_prob": conditions.base[number, place]}
            tokens = {None: choice.description_tokens[tool], **choice.part_tokens[tool]}
            for part, count in tokens.items():
                of_part = reads.get((tool, part), {}) | {"description_tokens": count or np.nan}
                rows[part].append(common | of_part | known)
    return {part: pd.DataFrame(of_part).set_index(["task", "tool"]) for part, of_part in rows.items()}


def _reads(task: TaskRun) -> dict[tuple[str, str | None], dict[str, float]]:
    """Means over layers and heads, by tool, part and measure; empty where attention was not captured."""
    attention = decision_attention(task)
    if attention is None or not attention.tools:
        return {}
    reads = {}
    for part, of_part in attention.reads.items():
        means = {
            measure.name: mean_of(values, (0, 1)) for measure, values in by_tool(attention, part).items()
        }
        for place, tool in enumerate(of_part.tools):
            reads[tool, part] = {name: float(values[place]) for name, values in means.items()}
    return reads
