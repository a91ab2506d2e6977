"""Running a run's tool tasks again with one thing changed: order, description, name, view, heads, intention.

The rows go to the run's interventions.parquet, one row a scored candidate. Columns: `condition` counts within task
and experiment; `subject` is the tool acted upon, `other` the second of a swap; `detail` is JSON; `layer_from` …
`layer_to` a window, both included; `n_tokens` how many positions are masked; `weight` log P(intention | state),
nats; `part` the part of the subject's definition that is masked, null for the whole; `tool` the scored candidate under its real name, null for no-tool; `log_prob` as in a record's
`tool_probabilities`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.experiments.registry import EXPERIMENTS, experiment
from probe.experiments.tool.conditions import Condition, Effort, Subject
from probe.experiments.tool.heads import HeadSets
from probe.runs.records import TaskRecord, ToolRecord

if TYPE_CHECKING:
    import pyarrow

    from probe.experiments.loaded_run import LoadedRun
    from probe.experiments.tool.intentions import IntentionWriter
    from probe.harness.runner import Progress
    from probe.runs import Run

_MADE = b"made"
"""Key in the table's metadata: JSON, task id → names of the experiments that were made with it."""
_CHUNK = 4
"""Tasks whose intentions are drawn together."""
_WRITE = 20
"""Tasks after which the table is written, so that a kill costs little; of many a quarter, since all of it is written."""


@dataclass
class ToolBench:
    """What the experiments on tool tasks share: the sets of heads, and the model that states intentions."""

    heads: HeadSets
    stating: IntentionWriter


@experiment(
    "tool",
    changes='the assistant\'s turn begins with "To answer this, I need to" and an intention of at most 24 tokens, up to the end of '
    "its line or sentence; then the call opens and the candidates are scored. Controls: 8 times random tokens in its place, and "
    "the intentions of another task",
    cost="8 to 32 drawn at temperature 1, untruncated, as many as `--standard-error` (0.05) of the action's probability asks for, or "
    "`--draws`; or the texts in `intentions` of the task, each once",
)
def intention(subjects: Sequence[Subject], bench: ToolBench) -> list[list[Condition]]:
    return bench.stating.conditions(subjects)


@experiment(
    "tool",
    requires="attention",
    changes="what some heads read is set to zero from the decision on. The heads that point best at the target on one "
    "half of the tasks are ablated in the other half: together, the first 2 one by one, and 6 random sets of as "
    "many heads from the same layers, each random set in every second task",
    cost="at most 6 for each target, `chosen` and `right`",
)
def heads(subjects: Sequence[Subject], bench: ToolBench) -> list[list[Condition]]:
    return [bench.heads.conditions(subject) for subject in subjects]


def make(
    opened: LoadedRun, wanted: Sequence[str], *, again: bool, effort: Effort, progress: Progress
) -> list[str]:
    """Make what is missing of the wanted experiments, or all of them again; returns what was made."""
    run = opened.run
    heads = HeadSets.of(run, effort) if "heads" in wanted else HeadSets()
    if not heads.sets:
        wanted = [name for name in wanted if name != "heads"]
    todo = missing(run, wanted, again=again)
    if not todo:
        return []
    table = _InterventionRows(run, wanted, again)
    try:
        _make(opened, todo, effort, heads, table, progress)
    finally:
        table.write()
    return [name for name in wanted if any(name in names for names in todo.values())]


def missing(run: Run, wanted: Sequence[str], *, again: bool) -> dict[str, list[str]]:
    """task id → experiments to make, for the tool tasks that ran to their end.

    An experiment may have no condition in some task, such as an exchange where one tool is shown, so the rows do
    not tell what was made: it is noted.
    """
    noted = _noted(run.table("interventions", arrow=True))
    todo = {}
    for task in run:
        record = task.typed(TaskRecord)
        if record.kind == "tool_selection" and record.status == "ok":
            names = [name for name in wanted if again or name not in noted.get(task.id, ())]
            if names:
                todo[task.id] = names
    return todo


def _make(
    opened: LoadedRun,
    todo: dict[str, list[str]],
    effort: Effort,
    heads: HeadSets,
    table: _InterventionRows,
    progress: Progress,
) -> None:
    from probe.experiments.tool.intentions import IntentionWriter
    from probe.experiments.tool.score import Scorer

    run, tasks, model, codec = opened.run, opened.tasks, opened.model, opened.codec
    limit = opened.max_new_tokens("tool_selection")
    scorer = Scorer(model, codec)
    bench = ToolBench(heads, IntentionWriter(model, codec, effort, scorer))
    progress.log(f"scoring changed prompts of {len(todo)} tasks")
    ids = list(todo)
    n_conditions = written = 0
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        subjects = [
            Subject(
                tasks[task_id], run[task_id].typed(ToolRecord), codec, model.facts.n_layers, limit, effort
            )
            for task_id in chunk
        ]
        by_task: dict[str, list[Condition]] = {task_id: [] for task_id in chunk}
        for name, entry in EXPERIMENTS.items():
            asked = [subject for subject in subjects if name in todo[subject.task.id]]
            for subject, changed in zip(asked, entry.make(asked, bench) if asked else (), strict=True):
                by_task[subject.task.id] += changed
        conditions = [(task_id, condition) for task_id in chunk for condition in by_task[task_id]]
        n_conditions, n_tasks = n_conditions + len(conditions), start + len(chunk)
        total = round(n_conditions / n_tasks * len(ids))  # as if the rest were like these
        progress.expect(total) if start else progress.start(total, "conditions")
        rows = scorer.rows(conditions, lambda count, tokens: progress.done(tokens, count))
        table.add({task_id: todo[task_id] for task_id in chunk}, rows)
        scorer.prefixes.clear()  # other tasks share little with these, and each held prefix is looked through
        if n_tasks - written >= max(_WRITE, written // 4):
            table.write()
            written = n_tasks


def _noted(table: pyarrow.Table) -> dict[str, list[str]]:
    return json.loads((table.schema.metadata or {}).get(_MADE, b"{}"))


class _InterventionRows:
    """The rows of interventions.parquet, with those of experiments that are made again left out."""

    def __init__(self, run: Run, wanted: Sequence[str], again: bool):
        self._run = run
        kept = run.table("interventions", arrow=True)
        self._noted = {task_id: set(names) for task_id, names in _noted(kept).items()}
        if again:
            import pyarrow.compute as pc

            kept = kept.filter(~pc.field("experiment").isin(list(wanted)))
            self._noted = {task_id: names - {*wanted} for task_id, names in self._noted.items()}
        self._table, self._rows, self._new = kept, [], False

    def add(self, experiments: Mapping[str, Sequence[str]], rows: Iterator[dict[str, Any]]) -> None:
        """The rows of experiments that were made with these tasks."""
        self._rows += list(rows)  # whole, or nothing where a signal stops it
        for task_id, names in experiments.items():
            self._noted.setdefault(task_id, set()).update(names)
        self._new = True

    def write(self) -> None:
        import pyarrow as pa

        if self._new:
            new = pa.Table.from_pylist(self._rows, schema=self._table.schema)
            noted = json.dumps({task_id: sorted(names) for task_id, names in self._noted.items()})
            self._table = pa.concat_tables([self._table, new]).replace_schema_metadata({_MADE: noted})
            self._rows, self._new = [], False
            self._run.write_table("interventions", self._table)
