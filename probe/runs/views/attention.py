"""Attention at a decision: what each head reads from the labelled spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from probe.prompts.labels import SINKS, tool_of
from probe.runs.records import PassageRecord

if TYPE_CHECKING:
    from probe.runs import TaskRun


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

    @property
    def sinks(self) -> dict[str, int]:
        """Column of each attention sink."""
        return {label: self.labels.index(label) for label in SINKS if label in self.labels}

    @property
    def tools(self) -> dict[str, int]:
        """Column of each tool whose description the row can see, in shown order."""
        return {
            name: column
            for column, name in enumerate(map(tool_of, self.labels))
            if name is not None and self.tokens[column]
        }


def decision_attention(task: TaskRun, number: int = 0) -> Attention | None:
    """Attention at a decision (an agent has one a turn); None where `attn_to_spans` was not captured."""
    if "attn_to_spans" not in task:
        return None
    position = int(task["decisions"][number])
    row = int((task["rows"] == position).nonzero()[0, 0])
    labels = task.labels()
    layers = task.listed("layers")
    at = slice(row, row + 1)
    mass = task.slice("attn_to_spans")[:, :, at, :][:, :, 0].double().numpy()
    norm = None
    if "value_to_spans" in task:
        norm = task.slice("value_to_spans")[:, :, at, :][:, :, 0].double().numpy()
    tokens = np.zeros(len(labels), dtype=np.int64)
    for span in task.typed(PassageRecord).passage.spans:
        if span.label in labels:
            tokens[labels.index(span.label)] += max(0, min(span.end, position + 1) - span.start)
    return Attention(list(range(len(mass))) if layers is None else layers, labels, tokens, mass, norm)
