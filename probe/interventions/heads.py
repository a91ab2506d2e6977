"""Ablating the heads that point at a tool, beside random heads: the causal check of attention's ranking.

Heads are chosen on one half of the tasks and ablated in the other, so that nothing is tested on what chose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from probe.interventions.conditions import Condition, Effort, Subject

if TYPE_CHECKING:
    from probe.store import Run


@dataclass
class HeadSets:
    """The sets of heads to ablate."""

    @classmethod
    def of(cls, run: Run, effort: Effort) -> HeadSets | None:
        return None

    def conditions(self, subject: Subject) -> list[Condition]:
        return []
