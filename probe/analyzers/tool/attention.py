"""The attention that the decision pays to the tools: to each whole definition, and to its name, its description and
its parameters.

Attention says where the decision's row reads, not why a tool is chosen: the most attended tool is
often not the chosen tool (`attention_agreement` says how often it is). Much of the mass lies on sinks, the first
token above all (Xiao et al. 2024, "Efficient streaming language models with attention sinks"), whose values are
small: so beside the mass stands the norm of what is read (Kobayashi et al. 2020, "Attention is not only a weight",
eq. 5), and the sinks' own mass is a measure of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.registry import MEAN, NORM_OF_READ, Figure, Measure, measure
from probe.analyzers.rows import Grid, Row, at_step
from probe.prompts.labels import SINKS, tool_of
from probe.runs.read import finished
from probe.runs.records import AgentRecord
from probe.runs.views.attention import Attention, decision_attention

if TYPE_CHECKING:
    from probe.runs import Run

_MASS, _NORM = ("attn_to_spans",), ("value_to_spans",)
_PART = " With `part` of that part of the definition alone."
_MATRIX = Figure(kind="matrix", x="tool", by="layer", card="tool")
_LIST = Figure(kind="bars", by="tool", card="tool")
_OTHER = Figure(kind="bars", by="span", card="tool")
ATTENTION = measure(
    "tool",
    "attention",
    unit="probability",
    axes="step? layer? head? tool part?",
    means="Σ_{j ∈ tool} α_j: attention mass of the decision's row on the tool's definition. Without a head it is the "
    "mean over heads, without a layer over layers as well; n counts the values averaged." + _PART,
    needs=_MASS,
    figure=_MATRIX,
)
ATTENTION_RATE = measure(
    "tool",
    "attention_rate",
    unit="probability per token",
    axes="step? layer? tool part?",
    means="`attention` divided by the tokens of the definition, mean over heads." + _PART,
    needs=_MASS,
    figure=_MATRIX,
)
ATTENTION_RESTRICTED = measure(
    "tool",
    "attention_restricted",
    unit="probability",
    axes="step? layer? tool part?",
    means="`attention` divided by the mass on all tools: the softmax over their tokens alone; mean over heads. With "
    "`part` of that part, divided by the mass on that part of all tools.",
    needs=_MASS,
    figure=_MATRIX,
)
ATTENTION_WITHOUT_SINK = measure(
    "tool",
    "attention_without_sink",
    unit="probability",
    axes="step? layer? tool part?",
    means="`attention` divided by the mass summed over all that is no sink (position 0, a learned sink); mean over "
    "heads." + _PART,
    source="Xiao et al. 2024",
    needs=_MASS,
    figure=_LIST,
)
ATTENTION_NORM = measure(
    "tool",
    "attention_norm",
    unit="residual norm",
    axes="step? layer? tool part?",
    means=f"Mean over heads of {NORM_OF_READ} The span is the tool's definition.{_PART}",
    source="Kobayashi et al. 2020, eq. 5",
    needs=_MASS + _NORM,
    figure=_LIST,
)
SINK_MASS = measure(
    "tool",
    "sink_mass",
    unit="probability",
    axes="layer? span",
    means="Attention mass on a sink: `bos` is position 0, `sink` a learned one; mean over heads.",
    source="Xiao et al. 2024",
    needs=_MASS,
    figure=_OTHER,
)
ATTENTION_ELSEWHERE = measure(
    "tool",
    "attention_elsewhere",
    unit="probability",
    axes="layer? span",
    means="Attention mass on every other label that is no tool, mean over heads.",
    needs=_MASS,
    figure=_OTHER,
)
ATTENTION_BY_POSITION = measure(
    "tool",
    "attention_by_position",
    unit="probability per token",
    of="run",
    axes="slot n_tools",
    means="Mean `attention_rate` of the tool in a slot of the list, over the tasks that show as many tools.",
    interval=MEAN,
    needs=_MASS,
    figure=Figure(kind="estimates", by="slot"),
)


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
    for task in finished(run, "agent", "replay"):
        for number, turn in enumerate(task.typed(AgentRecord).turns):
            attention = decision_attention(task, number)
            if attention is not None and attention.tools:
                yield from at_step(turn.turn, _attention(task.id, attention))
    for n_tools, rates in sorted(by_slot.items()):
        yield from _by_position(n_tools, np.array(rates))


def by_tool(attention: Attention, part: str | None = None) -> dict[Measure, np.ndarray]:
    """[layer, head, tool]: each quantity that the attention to a definition has, or to a part of it, tools in shown
    order; NaN where there is nothing to share."""
    reads = attention.reads[part]
    # Summed, not 1 − sink: a float32 sink close to 1 leaves no digits.
    rest = np.delete(attention.mass, list(attention.sinks.values()), -1).sum(-1, keepdims=True)
    quantities = {
        ATTENTION: reads.mass,
        ATTENTION_RATE: reads.mass / reads.tokens,
        # The softmax over the tools' tokens alone is their mass over its sum: the same scores, another normalizer.
        ATTENTION_RESTRICTED: _share(reads.mass, reads.mass.sum(-1, keepdims=True)),
        ATTENTION_WITHOUT_SINK: _share(reads.mass, rest),
    }
    if reads.norm is not None:
        quantities[ATTENTION_NORM] = reads.norm
    return quantities


def _attention(task_id: str, attention: Attention) -> Iterator[Grid]:
    """Attention to each tool: by layer and head for the mass alone, else by layer and overall, means over heads; then
    to each part, by layer for the mass alone."""
    quantities, tool = by_tool(attention), {"tool": list(attention.tools)}
    mass = quantities[ATTENTION]
    yield ATTENTION.grid(task_id, mass, {"layer": attention.layers}, {"head": [*range(mass.shape[1])]}, tool)
    for quantity, values in quantities.items():
        yield from _means(quantity, task_id, values, attention.layers, tool)
    for part, reads in attention.by_part.items():
        tool = {"tool": reads.tools, "part": [part] * len(reads.tools)}
        for quantity, values in by_tool(attention, part).items():
            layered, overall = _means(quantity, task_id, values, attention.layers, tool)
            yield from (layered, overall) if quantity is ATTENTION else (overall,)


def _elsewhere(task_id: str, attention: Attention) -> Iterator[Grid]:
    """Mass on the sinks, and on every other label that is no tool."""
    others = {
        label: column
        for column, label in enumerate(attention.labels)
        if label not in SINKS and tool_of(label) is None and attention.tokens[column]
    }
    for quantity, columns in ((SINK_MASS, attention.sinks), (ATTENTION_ELSEWHERE, others)):
        if columns:
            values = attention.mass[:, :, list(columns.values())]
            yield from _means(quantity, task_id, values, attention.layers, {"span": list(columns)})


def _by_position(n_tools: int, rates: np.ndarray) -> Iterator[Row]:
    """Mean rate [task, slot] by shown slot, over the tasks with this many tools."""
    for slot, values in enumerate(rates.T, 1):
        yield ATTENTION_BY_POSITION.mean(values, slot=slot, n_tools=n_tools)


def _means(
    quantity: Measure, task_id: str, values: np.ndarray, layers: list[int], last: Mapping[str, Sequence[str]]
) -> Iterator[Grid]:
    """Means of values[layer, head, …] over the heads, then over heads and layers."""
    yield quantity.grid(task_id, mean_of(values, 1), {"layer": layers}, last, n=_count(values, 1))
    yield quantity.grid(task_id, mean_of(values, (0, 1)), last, n=_count(values, (0, 1)))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where there is nothing to share."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _count(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    return (~np.isnan(values)).sum(axis)


def mean_of(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Mean of what is there; NaN where nothing is."""
    count = _count(values, axis)
    return np.divide(np.nansum(values, axis), count, out=np.full(count.shape, np.nan), where=count > 0)
