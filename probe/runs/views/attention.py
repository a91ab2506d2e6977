"""Attention at a decision: what each head reads from the labelled spans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from probe.prompts.labels import SINKS, TOOL_PARTS, tool_of
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.runs import TaskRun


@dataclass(frozen=True)
class ToolReads:
    """What one row reads of tools: of their whole definitions, or of one part of each."""

    tools: list[str]
    """In shown order; those that have the part."""
    tokens: np.ndarray
    """[tool]: positions that the row can see, at least 1."""
    mass: np.ndarray
    """[layer, head, tool]"""
    norm: np.ndarray | None
    """[layer, head, tool]; None where not captured."""


@dataclass(frozen=True)
class Attention:
    """Attention of the row that emits the first token of the tool's name."""

    layers: list[int]
    labels: list[str]
    """One a span label, `bos` and the like included."""
    tokens: np.ndarray
    """[span]: positions of each label that the row can see; 0 for a learned sink, which has none."""
    mass: np.ndarray
    """[layer, head, span]: probability mass; a row sums to 1."""
    norm: np.ndarray | None = None
    """[layer, head, span]: ‖Σ α v W_O‖ of what each head reads from the span; None where not captured."""
    by_part: Mapping[str, ToolReads] = field(default_factory=dict)
    """Part of a tool's definition → what the row reads of it; empty in runs that captured no parts."""

    @property
    def sinks(self) -> dict[str, int]:
        """Column of each attention sink."""
        return {label: self.labels.index(label) for label in SINKS if label in self.labels}

    @property
    def tools(self) -> dict[str, int]:
        """Column of each tool whose definition the row can see, in shown order."""
        return {
            name: column
            for column, name in enumerate(map(tool_of, self.labels))
            if name is not None and self.tokens[column]
        }

    @property
    def reads(self) -> dict[str | None, ToolReads]:
        """What the row reads of whole definitions (None), then of each part."""
        columns = list(self.tools.values())
        norm = None if self.norm is None else self.norm[:, :, columns]
        whole = ToolReads(list(self.tools), self.tokens[columns], self.mass[:, :, columns], norm)
        return {None: whole, **self.by_part}


def decision_attention(task: TaskRun, number: int = 0) -> Attention | None:
    """Attention at a decision (an agent has one a turn); None where `attn_to_spans` was not captured."""
    if "attn_to_spans" not in task:
        return None
    position = int(task["decisions"][number])
    row = int((task["rows"] == position).nonzero()[0, 0])
    labels = task.labels()
    mass = _row(task, "attn_to_spans", row)
    norm = _row(task, "value_to_spans", row) if "value_to_spans" in task else None
    passage = task.typed(PassageRecord).passage
    tokens = np.zeros(len(labels), dtype=np.int64)
    for span in passage.spans:
        if span.label in labels:
            tokens[labels.index(span.label)] += max(0, min(span.end, position + 1) - span.start)
    return Attention(
        task.layers("attn_to_spans"),
        labels,
        tokens,
        mass,
        norm,
        _by_part(task, number, passage.tool_parts),
    )


def _row(task: TaskRun, name: str, row: int) -> np.ndarray:
    """[layer, head, column] of one row or decision."""
    return task.slice(name)[:, :, row : row + 1, :][:, :, 0].double().numpy()


def _by_part(task: TaskRun, number: int, tokens: Mapping[tuple[str, str], int]) -> dict[str, ToolReads]:
    if "attn_to_parts" not in task:
        return {}
    columns = task.parts()
    mass = _row(task, "attn_to_parts", number)
    norm = _row(task, "value_to_parts", number) if "value_to_parts" in task else None
    reads = {}
    for part in TOOL_PARTS:
        places = [index for index, (_, of) in enumerate(columns) if of == part]
        if places:
            names = [tool_of(columns[index][0]) or "" for index in places]
            lengths = np.array([tokens[columns[index]] for index in places])
            read_norm = None if norm is None else norm[:, :, places]
            reads[part] = ToolReads(names, lengths, mass[:, :, places], read_norm)
    return reads
