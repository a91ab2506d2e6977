"""How many calls of a run are right as the Berkeley Function Calling Leaderboard counts them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers.registry import WILSON, Figure, measure
from probe.analyzers.rows import Row
from probe.runs.read import finished
from probe.runs.records import ToolRecord

if TYPE_CHECKING:
    from probe.runs import Run


BFCL_ACCURACY = measure(
    "tool",
    "bfcl_accuracy",
    unit="share of tasks",
    of="run",
    means="Tasks of `probe tasks import bfcl` whose generated call, or that there is none, its AST checker accepts.",
    source="Patil et al. 2025",
    interval=WILSON,
    figure=Figure(kind="estimates"),
)


def measures(run: Run) -> Iterator[Row]:
    """`bfcl_accuracy`: share of the leaderboard's tasks whose call, or refusal to call, its checker accepts.

    No row for a run without such tasks.
    """
    verdicts = [task.typed(ToolRecord).bfcl for task in finished(run, "tool_selection")]
    hits = [verdict.valid for verdict in verdicts if verdict is not None]
    if hits:
        yield BFCL_ACCURACY.share(hits)
