"""How many calls of a run are right as the Berkeley Function Calling Leaderboard counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers.rows import WHOLE_RUN, Row, finished
from probe.maths.statistics import wilson

if TYPE_CHECKING:
    from probe.runs import Run


def measures(run: Run) -> Iterator[Row]:
    """`bfcl_accuracy`: share of the leaderboard's tasks whose call, or refusal to call, its checker accepts.

    The interval is Wilson's, 95 %, over tasks. No row for a run without such tasks.
    """
    hits = [task.record["bfcl"]["valid"] for task in finished(run, "tool_selection") if "bfcl" in task.record]
    if not hits:
        return
    share = sum(hits) / len(hits)
    low, high = wilson(share, len(hits))
    yield Row(
        task_id=WHOLE_RUN,
        analyzer="tool",
        name="bfcl_accuracy",
        value=share,
        unit="share of tasks",
        low=low,
        high=high,
        n=len(hits),
    )
