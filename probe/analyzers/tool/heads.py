"""Measures of the heads that point at the chosen tool or at the right one (see `probe.runs.views.heads`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, get_args

from probe.analyzers.registry import SHARE, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.runs.views.choice import Target
from probe.runs.views.heads import Ranking, rank

if TYPE_CHECKING:
    from probe.runs import Run

_NEEDS = ("attn_to_spans", "8 tasks")
_MATRIX = Figure(kind="matrix", x="head", by="layer", card="heads")
_TEXT = Figure(kind="text", card="heads")
HEAD_AUROC = measure(
    "tool",
    "head_auroc",
    unit="probability",
    of="run",
    axes="role layer head",
    means="P(the target outranks another tool of its task), ties ½, by the head's attention per token of the "
    "definition, less what slot and log length predict within tasks; chance is ½. n are tasks.",
    interval=f"{SHARE}, all heads together (Bonferroni)",
    needs=_NEEDS,
    figure=_MATRIX,
)
HEAD_P = measure(
    "tool",
    "head_p",
    unit="p-value",
    of="run",
    axes="role layer head",
    means="One-sided p-value of `head_auroc`: targets are permuted within tasks, 1,000 times; not corrected for the "
    "number of heads.",
    needs=_NEEDS,
    figure="its corrected value is drawn",
)
HEAD_P_CORRECTED = measure(
    "tool",
    "head_p_corrected",
    unit="p-value",
    of="run",
    axes="role layer head",
    means="The same p-value, corrected for all heads at once: step-down maxT.",
    source="Westfall and Young 1993, algorithm 4.1",
    needs=_NEEDS,
    figure=_MATRIX,
)
HEADS_ABOVE_CHANCE = measure(
    "tool",
    "heads_found",
    unit="heads",
    of="run",
    axes="role",
    means="Number of heads whose `head_p_corrected` is below 0.05.",
    needs=_NEEDS,
    figure=_TEXT,
)
HEAD_AUROC_HELDOUT = measure(
    "tool",
    "head_auroc_heldout",
    unit="probability",
    of="run",
    axes="role half?",
    means="Mean AUROC of the best heads (a twentieth of all, 1 to 10) of a half of the tasks on the other half; without "
    "`half`, of both.",
    interval=SHARE,
    needs=_NEEDS,
    figure=_TEXT,
)


def measures(run: Run) -> Iterator[Row | Grid]:
    """Measures of the ranking for both targets; nothing where attention was not captured or tasks are few."""
    for target in get_args(Target):
        ranking = rank(run, target)
        if ranking is not None:
            yield from _rows(ranking)


def _rows(ranking: Ranking) -> Iterator[Row | Grid]:
    n, role = ranking.n_tasks, ranking.target
    for row, layer in enumerate(ranking.layers):
        for head, value in enumerate(ranking.auroc[row]):
            interval = ranking.intervals[row * ranking.auroc.shape[1] + head]
            yield HEAD_AUROC.row(WHOLE_RUN, value, n=n, interval=interval, role=role, layer=layer, head=head)
    axes = (
        {"layer": ranking.layers, "role": [role] * len(ranking.layers)},
        {"head": range(ranking.auroc.shape[1])},
    )
    yield HEAD_P.grid(WHOLE_RUN, ranking.p, *axes, n=n)
    yield HEAD_P_CORRECTED.grid(WHOLE_RUN, ranking.p_corrected, *axes, n=n)
    yield HEADS_ABOVE_CHANCE.row(WHOLE_RUN, (ranking.p_corrected < 0.05).sum(), n=n, role=role)
    for half in (None, 0, 1):
        held = ranking.held_out(half=half)
        yield HEAD_AUROC_HELDOUT.row(
            WHOLE_RUN, held.value, n=held.n, interval=held.interval, role=role, half=half
        )
