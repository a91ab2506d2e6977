"""Prompting as a task-specific bias of the output distribution, by its activation pattern, in a task manifold.

    shift       how far every variant moves the answer against the bare input (`base`)
    bias        whether one vector of log-probabilities explains the shift, and what it says
    pattern     the difference in the residual stream by layer
    recovery    what the experiments show: the shift by depth, and how much of it a vector recovers
    manifold    the subspace of many-shot states, and how much of a prompted state lies in it
    spread      accuracy and choices over variants that say the same

Tasks, their states and distributions, and the groups that vectors are means of: `probe.runs.views.prompting`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers.prompting import bias, manifold, pattern, recovery, shift, spread
from probe.runs.views.prompting import PromptStates, items_of

if TYPE_CHECKING:
    from probe.analyzers.rows import Grid, Row
    from probe.runs import Run


def measures(run: Run) -> Iterator[Row | Grid]:
    items = items_of(run)
    table = run.table("prompting")
    yield from shift.measures(run)
    yield from bias.measures(items, table, run.run.get("token_texts"))
    states = PromptStates(items)
    yield from pattern.measures(items, states)
    yield from manifold.measures(items, states)
    yield from spread.measures(items)
    yield from recovery.measures(items, table)
