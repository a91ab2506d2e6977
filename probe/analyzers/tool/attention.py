"""The attention that the decision pays to the tools' descriptions.

Attention says where the decision's row reads, not why a tool is chosen: the most attended description is
often not the chosen tool (`attention_agreement` says how often it is).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.measure import Grid, finished

if TYPE_CHECKING:
    from probe.store import Run, TaskRun

_NAME = "tool"


def measures(run: Run) -> Iterator[Grid]:
    """Attention of every `tool_selection` task whose `attn_to_spans` was captured."""
    for task in finished(run, "tool_selection"):
        attention = decision_attention(task)
        if attention is not None and attention.tools:
            yield from _attention(task.id, attention)


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

    @property
    def tools(self) -> dict[str, int]:
        """Column of each tool whose description the row can see, in shown order."""
        prefix = "tool:"
        return {
            label.removeprefix(prefix): column
            for column, label in enumerate(self.labels)
            if label.startswith(prefix) and self.tokens[column]
        }


def decision_attention(task: TaskRun) -> Attention | None:
    """Attention at the decision of a `tool_selection` task; None where `attn_to_spans` was not captured."""
    if "attn_to_spans" not in task:
        return None
    position = int(task["decisions"][0])
    row = int((task["rows"] == position).nonzero()[0, 0])
    labels = task.labels()
    layers = task.listed("layers")
    mass = task.slice("attn_to_spans")[:, :, row : row + 1, :][:, :, 0].double().numpy()
    tokens = np.zeros(len(labels), dtype=np.int64)
    for span in task.record["spans"]:
        if span["label"] in labels:
            tokens[labels.index(span["label"])] += max(0, min(span["end"], position + 1) - span["start"])
    return Attention(list(range(len(mass))) if layers is None else layers, labels, tokens, mass)


def _attention(task_id: str, found: Attention) -> Iterator[Grid]:
    columns = list(found.tools.values())
    mass = found.mass[:, :, columns]
    n_heads = mass.shape[1]
    rate = mass / found.tokens[columns]
    total = mass.sum(-1, keepdims=True)
    # The softmax over the tools' tokens alone is their mass over its sum: the same scores, another normalizer.
    restricted = np.divide(mass, total, out=np.full_like(mass, np.nan), where=total > 0)
    tool, layer = {"tool": list(found.tools)}, {"layer": found.layers}
    head = {"head": list(range(n_heads))}
    names = {
        "attention": "probability",
        "attention_rate": "probability per token",
        "attention_restricted": "probability",
    }
    yield Grid(
        task_id=task_id,
        analyzer=_NAME,
        name="attention",
        unit="probability",
        values=mass,
        axes=[layer, head, tool],
    )
    for (name, unit), values in zip(names.items(), (mass, rate, restricted), strict=True):
        common: dict[str, Any] = {"task_id": task_id, "analyzer": _NAME, "name": name, "unit": unit}
        yield Grid(**common, values=_mean(values, 1), axes=[layer, tool], n=_count(values, 1))
        yield Grid(**common, values=_mean(values, (0, 1)), axes=[tool], n=_count(values, (0, 1)))


def _count(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    return (~np.isnan(values)).sum(axis)


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is there; NaN where nothing is."""
    count = _count(values, axis)
    return np.divide(np.nansum(values, axis), count, out=np.full(count.shape, np.nan), where=count > 0)
