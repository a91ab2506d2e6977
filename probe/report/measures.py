"""The measures that a page shows: of the run, and by task."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from probe.analyzers.rows import WHOLE_RUN
from probe.report import bias
from probe.report.more import undrawn
from probe.report.reasoning import MATRICES, Tables
from probe.report.rows import drawn

if TYPE_CHECKING:
    from probe.runs import Run


class RunMeasures:
    """Measures by task, those by layer or head left out (figures read the captured tensors), and of the run."""

    def __init__(self, run: Run, shown: set[str]):
        self.analyzed = run.has_measures
        self.undrawn = undrawn()
        self.by_layer: list[dict[str, Any]] = []
        """Rows of the run that only a generic picture reads."""
        self.whole_run: list[dict[str, Any]] = []
        self.by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
        if not self.analyzed:
            self.tables = Tables(None)
            return
        import pyarrow as pa
        import pyarrow.compute as pc

        of_run = pc.field("task_id") == WHOLE_RUN
        of_shown = of_run | pc.field("task_id").isin(pa.array(sorted(shown), pa.string()))
        flat = pc.field("layer").is_null() & pc.field("head").is_null()
        flat |= pc.field("name") == "reconstruction_error"
        of_cards = drawn("tool", "why", "attribution", "patching", "steering", "heads", "layers")
        flat |= (pc.field("name").isin([*of_cards]) | (pc.field("analyzer") == "foresight")) & of_run
        flat |= pc.field("name").isin(bias.BY_LAYER) & pc.field("family").is_null()
        flat &= ~(pc.field("name").isin(MATRICES) & ~of_run)
        wanted = flat & (of_shown | pc.field("name").isin(["margin", "entropy"]))
        names = pc.field("name").isin([name for _, name in self.undrawn])
        by_layer = ~flat & names & of_run
        # What is drawn is a small part of a table that grows with layers, heads and tasks.
        table = pa.concat_tables(run.table_parts("measures", wanted | by_layer | Tables.kept(of_shown)))
        self.tables = Tables(table)
        self.by_layer = table.filter(by_layer).to_pylist()
        for row in table.filter(wanted).to_pylist():
            if row["task_id"] == WHOLE_RUN:
                self.whole_run.append(row)
            else:
                self.by_task[row["task_id"]].append(row)

    def of(self, task_id: str) -> list[dict[str, Any]]:
        return self.by_task.get(task_id, [])

    def over_tasks(self, analyzer: str, name: str, kind: str | None = None) -> dict[str, Any] | None:
        for row in self.whole_run:
            if (row["analyzer"], row["name"], row["variant"], row["kind"]) == (analyzer, name, None, kind):
                return row
        return None
