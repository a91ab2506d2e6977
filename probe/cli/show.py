"""`probe show`: a run or a task as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from probe.runs.records import (
    AgentRecord,
    FailedRecord,
    TaskRecord,
    ToolRecord,
    Turn,
    VariantPassage,
    struct_of,
)
from probe.tasks import kind_named
from probe.tools.definitions import printable

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

_TEXT = 400


def run_lines(run: Run, summary: dict[str, Any]) -> Iterator[str]:
    """Summary and one line a task."""
    header = run.run
    model = header["model"]
    yield f"run      {run.path}  ({summary['status']}, {header.get('created')})"
    yield f"model    {model['name']}  {model['dtype']} on {model['device']}, {model['n_params']:,} parameters"
    yield f"tasks    {header['task_file']['path']}  " + ", ".join(
        f"{n} {s}" for s, n in summary["counts"].items()
    )
    for kind, value in summary["accuracy"].items():
        yield f"score    {kind}: {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}] 95 %, n = {value['n']}"
    yield ""
    for task in run:
        record = task.typed(TaskRecord)
        score = "-" if record.score is None else f"{record.score:.2f}"
        yield f"{printable(record.id, 200):20}  {record.status:10} score {score:5} {_gist(task)}"


def _gist(task: TaskRun) -> str:
    record = task.typed(TaskRecord)
    if record.error is not None:
        return printable(record.error, _TEXT)
    kind = kind_named(record.kind)
    return "" if kind is None else kind.gist(task.record)


def task_lines(task: TaskRun) -> Iterator[str]:
    """What one task gave: prompt, completion, probabilities, spans, tensors."""
    record = task.typed(struct_of(task.record))
    yield f"{printable(record.id, 200)}  {record.kind}  {record.status}  {record.seconds:.2f} s  {_gist(task)}"
    if isinstance(record, FailedRecord):
        return
    for name, passage in task.passages.items():
        yield f"— {name}: {passage.n_prompt} prompt + {passage.n_new} new tokens, {passage.finish_reason}"
        text = passage.prompt
        yield text if len(text) <= 2 * _TEXT else f"{text[:_TEXT]}\n […]\n{text[-_TEXT:]}"
        yield f"→ {passage.completion[: 2 * _TEXT]}"
        for entry in passage.choice_probabilities or () if isinstance(passage, VariantPassage) else ():
            yield f"  {entry.probability:.4f}  {entry.log_prob:9.4f} nats  {entry.choice!r}"
    for turn in record.turns if isinstance(record, AgentRecord) else ():
        yield from _turn_lines(turn)
    if isinstance(record, ToolRecord):
        for entry in record.decision.tool_probabilities:
            mark = "*" if entry.tool == record.decision.chosen else " "
            yield f" {mark}{entry.probability:.4f}  {entry.log_prob:9.4f} nats  {entry.tool or '(no tool)'}"
    yield "tensors  " + ", ".join(f"{name} {list(task.shape(name))}" for name in task)


def _turn_lines(turn: Turn) -> Iterator[str]:
    """One turn of an agent: what it called, what came back, and P(tool|context) at its decision."""
    where = f"position {turn.position}" + (", opener attached" if turn.slot == "attached" else "")
    shares = ", ".join(f"{e.tool or '(no tool)'} {e.probability:.3f}" for e in turn.tool_probabilities)
    yield f"turn {turn.turn}  called {turn.called or '(nothing)'}  at {where}: {shares}"
    if turn.result is not None:
        kind = f" ({turn.result.error})" if turn.result.error is not None else ""
        unseen = "" if turn.result.shown else " (not given back)"
        yield f"  result{kind}{unseen}: {turn.result.content[:_TEXT]}"
