"""Running a run's tool tasks again with one thing changed: order, description, name, view, heads, intention.

    conditions  the changed prompts and edits of each experiment
    intentions  what the model says it wants before it chooses
    score       the candidates' log-probabilities under each, prefixes shared
    reasoning, faithful  chains of thought with parts hidden, deleted or replaced: reasoning.parquet
    `intervene` puts them into the run's interventions.parquet, one row a scored candidate

Columns: `condition` counts within task and experiment; `subject` is the tool acted upon, `other` the second of a
swap; `detail` is JSON; `layer_from` … `layer_to` a window, both included; `n_tokens` how many positions are
masked; `weight` log P(intention | state), nats; `tool` the scored candidate under its real name, null for
no-tool; `log_prob` as in a record's `tool_probabilities`. Analyzers read the table without a model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probe.errors import UsageError
from probe.interventions.conditions import SCORED, Condition, Effort, Subject
from probe.interventions.heads import HeadSets

if TYPE_CHECKING:
    from probe.model.hooked import Model
    from probe.runner import Progress
    from probe.store import Run

__all__ = ["EXPERIMENTS", "Effort", "intervene"]

EXPERIMENTS = (*SCORED, "intention", "heads")
"""By name; `word` is made only where it is asked for, since it costs a forward a word."""
_ASKED = frozenset({"word"})
_CHUNK = 4
"""Tasks whose intentions are drawn together."""
_WRITE = 20
"""Tasks after which the table is written, so that a stop costs little."""


def intervene(
    run: Run,
    names: Sequence[str] = (),
    *,
    model: Model | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Make the experiments that are missing, or make those named again; returns what was made.

    Needs the model of the run (loaded here unless given) and its task file, both unchanged. Raises UsageError,
    ModelUnavailable, BadInput and RunDirectoryError.
    """
    from probe.runner import Silent, load_model, refuse_other_weights, reopen

    progress, effort = progress or Silent(), effort or Effort()
    _refuse_unknown(names)
    wanted = list(names or (name for name in EXPERIMENTS if name not in _ASKED))
    heads = HeadSets.of(run, effort) if "heads" in wanted else HeadSets()
    if not heads.sets:
        wanted = [name for name in wanted if name != "heads"]
    todo = _missing(run, wanted, again=bool(names))
    if not todo:
        return []
    choices, tasks = reopen(run.path, run.run)
    loaded = model or load_model(choices.model, choices, progress)
    refuse_other_weights(run.run, loaded)
    limit = choices.generation("tool_selection").max_new_tokens
    made = _Table(run, wanted if names else ())
    try:
        _make(run, {task.id: task for task in tasks}, todo, loaded, limit, effort, heads, made, progress)
    finally:
        made.write()
    return [name for name in wanted if any(name in own for own in todo.values())]


def _refuse_unknown(names: Sequence[str]) -> None:
    for name in names:
        if name not in EXPERIMENTS:
            near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(EXPERIMENTS)}"
            raise UsageError(f"no experiment {name!r}: {hint}")


def _missing(run: Run, wanted: Sequence[str], *, again: bool) -> dict[str, list[str]]:
    """task id → experiments to make, for the tool tasks that ran to their end.

    An experiment that was made for a run may have no condition in some task: it is missing where the task has no
    rows at all, or the run none of the experiment.
    """
    table = run.interventions(arrow=True)
    tasks, experiments = (set(table[name].unique().to_pylist()) for name in ("task_id", "experiment"))
    todo = {}
    for task in run:
        if task.record["kind"] == "tool_selection" and task.record["status"] == "ok":
            own = [name for name in wanted if again or task.id not in tasks or name not in experiments]
            if own:
                todo[task.id] = own
    return todo


def _make(
    run: Run,
    tasks: dict[str, Any],
    todo: dict[str, list[str]],
    model: Model,
    limit: int,
    effort: Effort,
    heads: HeadSets,
    made: _Table,
    progress: Progress,
) -> None:
    from probe.interventions.intentions import Stating
    from probe.interventions.score import Scorer
    from probe.prompts import Codec

    codec = Codec(model.tokenizer, model.facts.n_ctx)
    scorer = Scorer(model, codec)
    stating = Stating(model, codec, effort, scorer.prefixes)
    progress.log(f"scoring changed prompts of {len(todo)} tasks")
    progress.start(len(todo))
    ids = list(todo)
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        subjects = [
            Subject(tasks[task_id], run[task_id].record, codec, model.facts.n_layers, limit, effort)
            for task_id in chunk
        ]
        stated = iter(stating.conditions([s for s in subjects if "intention" in todo[s.task.id]]))
        conditions: list[tuple[str, Condition]] = []
        for subject in subjects:
            own = todo[subject.task.id]
            found = list(_conditions(subject, own))
            if "intention" in own:
                found += next(stated)
            if "heads" in own:
                found += heads.conditions(subject)
            conditions += [(subject.task.id, condition) for condition in found]
        before = scorer.tokens
        made.add(scorer.rows(conditions))
        for subject in subjects:
            tokens = (scorer.tokens - before) // len(subjects)
            progress.done({"id": subject.task.id, "status": "ok"}, tokens)
        if (start // _CHUNK + 1) % (_WRITE // _CHUNK) == 0:
            made.write()


def _conditions(subject: Subject, names: Sequence[str]) -> Iterator[Condition]:
    for name in names:
        if name in SCORED:
            yield from SCORED[name](subject)


class _Table:
    """The rows of interventions.parquet, with those of experiments that are made again left out."""

    def __init__(self, run: Run, again: Sequence[str]):
        self._run = run
        kept = run.interventions(arrow=True)
        if again:
            import pyarrow.compute as pc

            kept = kept.filter(~pc.field("experiment").isin(list(again)))
        self._table, self._rows = kept, []

    def add(self, rows: Iterator[dict[str, Any]]) -> None:
        self._rows += rows

    def write(self) -> None:
        import pyarrow as pa

        if self._rows:
            new = pa.Table.from_pylist(self._rows, schema=self._table.schema)
            self._table, self._rows = pa.concat_tables([self._table, new]), []
            self._run.write_interventions(self._table)
