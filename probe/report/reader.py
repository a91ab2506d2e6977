"""What a page shows of a task, read from the run when the page asks for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from probe.report.details import details
from probe.report.measures import RunMeasures
from probe.report.text import visible

if TYPE_CHECKING:
    from probe.runs import Run

BLOCK = 50
"""Tasks whose measures are read together: a reader goes from one to the next."""


class TaskReader:
    """The details of a run's tasks by their place in it."""

    def __init__(self, run: Run):
        self.run = run
        self._block = -1
        self._measures: RunMeasures | None = None

    def read(self, place: int) -> str:
        """JSON of a task's details. Raises ArtifactCorrupt."""
        run, ids = self.run, self.run.task_ids
        if self._measures is None or self._block != place // BLOCK:
            self._block = place // BLOCK
            first = self._block * BLOCK
            self._measures = RunMeasures(run, set(ids[first : first + BLOCK]))
        measures, name = self._measures, ids[place]
        shown = details(run, run[name], measures.of(name), measures.tables, measures.undrawn)
        return json.dumps(visible(shown), ensure_ascii=False, allow_nan=False)
