"""What a notebook shows of a run and of its tasks: HTML without scripts and without anything to load, all text escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from probe.jsontext import inert
from probe.runs.records import FailedRecord, Passage, TaskRecord, ToolRecord, struct_of
from probe.runs.summary import score_text, summary

_ROWS = 20
"""Tasks of a run, and rows of a table, that are shown."""
_TEXT = 4000
"""Characters of a text that are shown."""
# MathJax leaves elements of these classes alone: a dollar sign of a model is no formula.
_CLASSES = "probe tex2jax_ignore mathjax_ignore"
_CELL = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"
_PLAIN = "white-space:pre-wrap;overflow-wrap:anywhere;max-height:24em;overflow:auto;margin:0"


def escape(value: Any) -> str:
    """A value as text of a page: escaped, and without what reorders or hides a line. Absent is empty, numbers are short."""
    if value is None or value != value:  # NaN: what a frame has for absent
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = inert(text)
    return html.escape(shown if len(shown) <= _TEXT else f"{shown[:_TEXT]}… ({len(shown):,} characters)")


def block(*parts: str) -> str:
    """Parts, each HTML already, as what a notebook shows."""
    return f'<div class="{_CLASSES}" style="font-family:sans-serif;font-size:90%">{"".join(parts)}</div>'


def line(*values: Any, title: str = "") -> str:
    """A line of values, the first one of them strong where there is a title."""
    head = f"<b>{escape(title)}</b> " if title else ""
    return f"<div>{head}{' · '.join(filter(None, map(escape, values)))}</div>"


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]], most: int = _ROWS) -> str:
    """A table of its first rows, and how many more there are."""
    every = list(rows)
    if not every:
        return ""
    head = "".join(_cell("th", title) for title in titles)
    body = "".join(f"<tr>{''.join(_cell('td', value) for value in row)}</tr>" for row in every[:most])
    more = f"<div>… and {len(every) - most:,} more</div>" if len(every) > most else ""
    return f'<table style="border-collapse:collapse"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


def _cell(element: str, value: Any) -> str:
    return f'<{element} style="{_CELL}">{escape(value)}</{element}>'


def text(value: str, title: str, shown: bool = True) -> str:
    """A text under a title that folds it away."""
    state = " open" if shown else ""
    return f'<details{state}><summary>{escape(title)}</summary><pre style="{_PLAIN}">{escape(value)}</pre></details>'


def run_html(run: Any) -> str:
    """A run: model, scores with intervals, and its first tasks."""
    header, totals = run.run, summary(run)
    model = header.get("model") or {}
    counts = ", ".join(f"{n} {status}" for status, n in totals["counts"].items())
    scores = [
        line(f"{kind}: {score_text(value)}", title="score") for kind, value in totals["accuracy"].items()
    ]
    frame = run.tasks()
    columns = [
        column
        for column in ("kind", "status", "score", "target", "chosen", "n_prompt", "n_new")
        if frame[column].notna().any()
    ]
    cells = frame[columns].to_numpy(object, na_value=None)
    rows = [[task, *values] for task, values in zip(frame.index, cells, strict=True)]
    from probe.runs.edits import edits_text

    edits = edits_text(header)
    return block(
        line(header.get("status"), counts, title=f"Run {run.path.name}"),
        line(*(model.get(key) for key in ("name", "dtype", "device")), title="model"),
        line(edits, title="edits") if edits else "",
        *scores,
        table(["task", *columns], rows),
    )


def task_html(task: Any) -> str:
    """A task: its prompt, what the model said, and the probabilities of the candidates."""
    record = task.typed(struct_of(task.record))
    head = line(record.kind, record.status, *_scored(record), title=f"Task {record.id}")
    if isinstance(record, FailedRecord):
        return block(head, line(record.error))
    parts = [head]
    for name, passage in task.passages.items():
        parts += _passage(name, passage)
    if isinstance(record, ToolRecord):
        entries = sorted(record.decision.tool_probabilities, key=lambda entry: -entry.probability)
        marks = [_marks(entry.tool, record.decision.chosen, record.right) for entry in entries]
        parts.append(
            table(
                ["candidate", "P(tool|context)", "log-probability, nats", ""],
                [
                    [entry.tool or "no tool", entry.probability, entry.log_prob, mark]
                    for entry, mark in zip(entries, marks, strict=True)
                ],
            )
        )
    tensors = ", ".join(f"{name} {list(task.shape(name))}" for name in task)
    return block(*parts, line(tensors, title="tensors") if tensors else "")


def _scored(record: TaskRecord) -> list[str]:
    return [] if record.score is None else [f"score {record.score:.2f}"]


def _passage(name: str, passage: Passage) -> list[str]:
    where = "" if name == "main" else f"{name}: "
    return [
        text(passage.prompt, f"{where}prompt, {passage.n_prompt} tokens", shown=False),
        text(passage.completion, f"{where}completion, {passage.n_new} tokens, {passage.finish_reason}"),
    ]


def _marks(name: str | None, chosen: str | None, right: Sequence[str | None]) -> str:
    return ", ".join(word for word, holds in (("chosen", name == chosen), ("right", name in right)) if holds)
