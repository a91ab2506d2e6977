"""Tool selection: P(tool|context), what the decision attends to, and what causes the choice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers.tool import (
    ablation,
    attention,
    attribution,
    bfcl,
    calibration,
    causal,
    choice,
    confusion,
    heads,
    intention,
    linear,
    orders,
    patching,
    scorers,
    steering,
)

if TYPE_CHECKING:
    from probe.analyzers.rows import Grid, Row
    from probe.runs import Run

PARTS = (
    choice,
    attention,
    calibration,
    scorers,
    orders,
    confusion,
    heads,
    ablation,
    linear,
    causal,
    intention,
    attribution,
    patching,
    steering,
    bfcl,
)


def measures(run: Run) -> Iterator[Row | Grid]:
    """Measures of every `tool_selection` task and of the run, part by part."""
    for part in PARTS:
        yield from part.measures(run)
