"""`probe show`: a run or a task as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from probe.cli.run import fallback_lines, score_text
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
        yield f"score    {kind}: {score_text(value)}"
    for line in fallback_lines(summary):
        yield f"template {line}"
    yield ""
    for task in run:
        record = task.record
        score = f"{record['score']:.2f}" if "score" in record else "-"
        yield f"{printable(record['id'], 200):20}  {record['status']:10} score {score:5} {_gist(record)}"


def _gist(record: dict[str, Any]) -> str:
    if "error" in record:
        return printable(record["error"], _TEXT)
    kind = kind_named(record["kind"])
    return "" if kind is None else kind.gist(record)


def task_lines(task: TaskRun) -> Iterator[str]:
    """What one task gave: prompt, completion, probabilities, spans, tensors."""
    record = task.record
    yield f"{printable(record['id'], 200)}  {record['kind']}  {record['status']}  {record['seconds']:.2f} s  {_gist(record)}"
    if "error" in record:
        return
    for name, passage in record.get("passages", {"main": record}).items():
        yield f"— {name}: {passage['n_prompt']} prompt + {passage['n_new']} new tokens, {passage['finish_reason']}"
        template = passage.get("template") or {}
        if template.get("fallback"):
            yield f"  template: {template['name']}, not as the model's own writes it: {template['fallback']}"
        text = passage["prompt"]
        yield text if len(text) <= 2 * _TEXT else f"{text[:_TEXT]}\n […]\n{text[-_TEXT:]}"
        yield f"→ {passage['completion'][: 2 * _TEXT]}"
        for entry in passage.get("choice_probabilities", []):
            yield f"  {entry['probability']:.4f}  {entry['log_prob']:9.4f} nats  {entry['choice']!r}"
    for turn in record.get("turns", []):
        yield from _turn_lines(turn)
    for entry in record.get("tool_probabilities", []) if "turns" not in record else []:
        mark = "*" if entry["tool"] == record["chosen"] else " "
        yield f" {mark}{entry['probability']:.4f}  {entry['log_prob']:9.4f} nats  {entry['tool'] or '(no tool)'}"
    yield "tensors  " + ", ".join(f"{name} {list(task.shape(name))}" for name in task)


def _turn_lines(turn: dict[str, Any]) -> Iterator[str]:
    """One turn of an agent: what it called, what came back, and P(tool|context) at its decision."""
    where = f"position {turn['position']}" + (", opener attached" if turn["slot"] == "attached" else "")
    shares = ", ".join(
        f"{e['tool'] or '(no tool)'} {e['probability']:.3f}" for e in turn["tool_probabilities"]
    )
    yield f"turn {turn['turn']}  called {turn['called'] or '(nothing)'}  at {where}: {shares}"
    if "result" in turn:
        result = turn["result"]
        kind = f" ({result['error']})" if "error" in result else ""
        unseen = "" if result["shown"] else " (not given back)"
        yield f"  result{kind}{unseen}: {result['content'][:_TEXT]}"
