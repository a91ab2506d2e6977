"""Tool selection: P(tool|context), and the attention that the decision pays to the tools' descriptions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from probe.analyzers import bfcl, causal, intention
from probe.analyzers.tool import (
    ablation,
    attention,
    calibration,
    choice,
    confusion,
    heads,
    linear,
    orders,
    scorers,
)
from probe.analyzers.tool.attention import Attention, decision_attention
from probe.analyzers.tool.choice import NO_TOOL, _Verdict, _whole_run

if TYPE_CHECKING:
    from probe.analyzers.measure import Grid, Measure
    from probe.store import Run

__all__ = ["NO_TOOL", "Attention", "_Verdict", "_whole_run", "decision_attention", "measures"]

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
    bfcl,
)


def measures(run: Run) -> Iterator[Measure | Grid]:
    """Measures of every `tool_selection` task and of the run, part by part."""
    for part in PARTS:
        yield from part.measures(run)
