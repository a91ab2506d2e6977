"""The attention that the decision pays to the tools' descriptions.

Attention says where the decision's row reads, not why a tool is chosen: the most attended description is
often not the chosen tool (`attention_agreement` says how often it is). Much of the mass lies on sinks, the first
token above all (Xiao et al. 2024, "Efficient streaming language models with attention sinks"), whose values are
small: so beside the mass stands the norm of what is read (Kobayashi et al. 2020, "Attention is not only a weight",
eq. 5), and the sinks' own mass is a measure of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row, at_step, finished
from probe.maths.statistics import bootstrap_mean
from probe.prompts.labels import SINKS, tool_of

if TYPE_CHECKING:
    from probe.runs import Run, TaskRun

_NAME = "tool"


"""Labels of attention sinks: position 0 whatever its token, and a learned sink, which has no position."""


def measures(run: Run) -> Iterator[Row | Grid]:
    """Attention of every `tool_selection` task whose `attn_to_spans` was captured, then its means by slot.

    Of an agent that of every decision, with the turn as `step`.
    """
    by_slot: dict[int, list[np.ndarray]] = defaultdict(list)
    for task in finished(run, "tool_selection"):
        attention = decision_attention(task)
        if attention is not None and attention.tools:
            yield from _attention(task.id, attention)
            yield from _elsewhere(task.id, attention)
            columns = list(attention.tools.values())
            by_slot[len(columns)].append(
                attention.mass[:, :, columns].mean((0, 1)) / attention.tokens[columns]
            )
    for task in finished(run, "agent"):
        for number, turn in enumerate(task.record["turns"]):
            attention = decision_attention(task, number)
            if attention is not None and attention.tools:
                yield from at_step(turn["turn"], _attention(task.id, attention))
    for n_tools, rates in sorted(by_slot.items()):
        yield from _by_position(n_tools, np.array(rates))


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
    for span in task.record["spans"]:
        if span["label"] in labels:
            tokens[labels.index(span["label"])] += max(0, min(span["end"], position + 1) - span["start"])
    return Attention(list(range(len(mass))) if layers is None else layers, labels, tokens, mass, norm)


def _attention(task_id: str, found: Attention) -> Iterator[Grid]:
    """Attention to each tool: by layer and head for the mass alone, else by layer and overall, means over heads."""
    columns = list(found.tools.values())
    mass = found.mass[:, :, columns]
    # Summed, not 1 − sink: a float32 sink close to 1 leaves no digits.
    rest = np.delete(found.mass, list(found.sinks.values()), -1).sum(-1, keepdims=True)
    head: dict[str, Any] = {"head": list(range(mass.shape[1]))}
    tool, layer = {"tool": list(found.tools)}, {"layer": found.layers}
    common: dict[str, Any] = {"task_id": task_id, "analyzer": _NAME}
    yield Grid(**common, name="attention", unit="probability", values=mass, axes=[layer, head, tool])
    kinds = [
        ("attention", "probability", mass),
        ("attention_rate", "probability per token", mass / found.tokens[columns]),
        # The softmax over the tools' tokens alone is their mass over its sum: the same scores, another normalizer.
        ("attention_restricted", "probability", _share(mass, mass.sum(-1, keepdims=True))),
        ("attention_without_sink", "probability", _share(mass, rest)),
    ]
    if found.norm is not None:
        kinds.append(("attention_norm", "residual norm", found.norm[:, :, columns]))
    for name, unit, values in kinds:
        yield from _means(common | {"name": name, "unit": unit}, values, layer, tool)


def _elsewhere(task_id: str, found: Attention) -> Iterator[Grid]:
    """Mass on the sinks, and on every other label that is no tool."""
    common: dict[str, Any] = {"task_id": task_id, "analyzer": _NAME, "unit": "probability"}
    others = {
        label: column
        for column, label in enumerate(found.labels)
        if label not in SINKS and tool_of(label) is None and found.tokens[column]
    }
    for name, columns in (("sink_mass", found.sinks), ("attention_elsewhere", others)):
        if columns:
            values = found.mass[:, :, list(columns.values())]
            yield from _means(
                common | {"name": name}, values, {"layer": found.layers}, {"span": list(columns)}
            )


def _by_position(n_tools: int, rates: np.ndarray) -> Iterator[Row]:
    """Mean rate [task, slot] by shown slot, over the tasks with this many tools; the first slot is `slot:1`."""
    for slot, values in enumerate(rates.T, 1):
        low, high = bootstrap_mean(values) or (None, None)
        yield Row(
            task_id=WHOLE_RUN,
            analyzer=_NAME,
            name="attention_by_position",
            value=float(values.mean()),
            unit="probability per token",
            low=low,
            high=high,
            n=len(values),
            span=f"slot:{slot}",
            variant=f"{n_tools} tools",
        )


def _means(
    common: dict[str, Any],
    values: np.ndarray,
    layer: Mapping[str, Sequence[int]],
    last: Mapping[str, Sequence[Any]],
) -> Iterator[Grid]:
    """Means of values[layer, head, …] over the heads, then over heads and layers."""
    yield Grid(**common, values=_mean(values, 1), axes=[layer, last], n=_count(values, 1))
    yield Grid(**common, values=_mean(values, (0, 1)), axes=[last], n=_count(values, (0, 1)))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where there is nothing to share."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _count(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    return (~np.isnan(values)).sum(axis)


def _mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is there; NaN where nothing is."""
    count = _count(values, axis)
    return np.divide(np.nansum(values, axis), count, out=np.full(count.shape, np.nan), where=count > 0)
