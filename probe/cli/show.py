"""`probe show`: a run or a task as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from probe.jsontext import printable
from probe.runs.files import header_faults
from probe.runs.records import (
    AgentRecord,
    FailedRecord,
    TaskRecord,
    ToolRecord,
    Turn,
    VariantPassage,
    struct_of,
)
from probe.runs.summary import fallback_lines, score_text
from probe.tasks.gists import GISTS

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

_TEXT = 400
NO_TOOL = "(no tool)"


def run_lines(run: Run, summary: dict[str, Any]) -> Iterator[str]:
    """Summary and one line a task."""
    from probe.runs.edits import edits_text

    header = run.run
    with header_faults(run.path):
        model, file = header["model"], header["task_file"]["path"]
        facts = f"{model['name']}  {model['dtype']} on {model['device']}, {model['n_params']:,} parameters"
    yield f"run      {run.path}  ({summary['status']}, {header.get('created')})"
    yield f"model    {facts}"
    yield f"tasks    {file}  " + ", ".join(f"{n} {s}" for s, n in summary["counts"].items())
    if edits := edits_text(header):
        yield f"edits    {printable(edits)}"
    for kind, value in summary["accuracy"].items():
        yield f"score    {kind}: {score_text(value)}"
    for line in fallback_lines(summary):
        yield f"template {line}"
    yield ""
    for task in run:
        record = task.typed(TaskRecord)
        score = "-" if record.score is None else f"{record.score:.2f}"
        yield f"{printable(record.id, 200):20}  {record.status:10} score {score:5} {_gist(task)}"


def _gist(task: TaskRun) -> str:
    record = task.typed(TaskRecord)
    if record.error is not None:
        return printable(record.error, _TEXT)
    _ = task.typed(struct_of(task.record))  # what a gist reads is there, and what it should be
    if (gist := GISTS.get(record.kind)) is not None:
        return gist(task.record)
    from probe.tasks.kinds import kind_named

    kind = kind_named(record.kind)
    return "" if kind is None else kind.gist(task.record)


def task_lines(task: TaskRun, full: bool = False) -> Iterator[str]:
    """What one task gave: prompt, completion, probabilities, spans, tensors; `full` leaves out nothing of a text."""
    record = task.typed(struct_of(task.record))
    yield f"{printable(record.id, 200)}  {record.kind}  {record.status}  {record.seconds:.2f} s  {_gist(task)}"
    if isinstance(record, FailedRecord):
        return
    for name, passage in task.passages.items():
        yield f"— {name}: {passage.n_prompt} prompt + {passage.n_new} new tokens, {passage.finish_reason}"
        if passage.template.fallback:
            yield f"  template: {passage.template.name}, not as the model's own writes it: {passage.template.fallback}"
        if passage.truncation is not None:
            yield f"  the prompt was cut: {passage.truncation}"
        yield _cut(passage.prompt, full)
        yield f"→ {_cut(passage.completion, full)}"
        if isinstance(passage, VariantPassage):
            for entry in passage.choice_probabilities or ():
                marks = _marks(entry.choice, passage.chosen, _targets(task.record))
                yield f"  {entry.probability:.4f}  {entry.log_prob:9.4f} nats  {entry.choice!r}{marks}"
    for turn in record.turns if isinstance(record, AgentRecord) else ():
        yield from _turn_lines(turn, full)
    if isinstance(record, ToolRecord):
        for entry in record.decision.tool_probabilities:
            marks = _marks(entry.tool, record.decision.chosen, record.right)
            yield f"  {entry.probability:.4f}  {entry.log_prob:9.4f} nats  {entry.tool or NO_TOOL}{marks}"
    yield "tensors  " + ", ".join(f"{name} {list(task.shape(name))}" for name in task)


def _targets(record: dict[str, Any]) -> list[Any]:
    """Acceptable choices of a prompting task; empty where it has no target."""
    if "target" not in record:
        return []
    return record["target"] if isinstance(record["target"], list) else [record["target"]]


def _marks(name: str | None, chosen: str | None, targets: Sequence[str | None]) -> str:
    words = [word for word, holds in (("chosen", name == chosen), ("target", name in targets)) if holds]
    return f"  ← {', '.join(words)}" if words else ""


def _cut(text: str, full: bool) -> str:
    """A long text without its middle, and how much that is."""
    if full or len(text) <= 2 * _TEXT:
        return text
    left_out = f"[… {len(text) - 2 * _TEXT:,} characters left out: --full shows them …]"
    return f"{text[:_TEXT]}\n{left_out}\n{text[-_TEXT:]}"


def _turn_lines(turn: Turn, full: bool) -> Iterator[str]:
    """One turn of an agent: what it called, what came back, and P(tool|context) at its decision."""
    where = f"position {turn.position}" + (", opener attached" if turn.slot == "attached" else "")
    shares = ", ".join(f"{e.tool or NO_TOOL} {e.probability:.3f}" for e in turn.tool_probabilities)
    yield f"turn {turn.turn}  called {turn.called or '(nothing)'}  at {where}: {shares}"
    if turn.result is not None:
        kind = f" ({turn.result.error})" if turn.result.error is not None else ""
        unseen = "" if turn.result.shown else " (not given back)"
        yield f"  result{kind}{unseen}: {_cut(turn.result.content, full)}"
