"""P(tool|context), and the attention that the decision pays to the tools' descriptions.

Attention says where the decision's row reads, not why a tool is chosen: the most attended description is
often not the chosen tool (`attention_agreement` says how often it is).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.bfcl import bfcl_accuracy
from probe.analyzers.measure import WHOLE_RUN, Grid, Measure, finished
from probe.analyzers.statistics import entropy, wilson

if TYPE_CHECKING:
    from probe.store import Run, TaskRun

_NAME = "tool"
NO_TOOL = "no_tool"
"""`span` of the rows about calling no tool, whose `tool` is null."""


def measures(run: Run) -> Iterator[Measure | Grid]:
    """Measures of every `tool_selection` task, then those of the run."""
    verdicts = []
    for task in finished(run, "tool_selection"):
        yield from _probabilities(task)
        attention = decision_attention(task)
        if attention is not None and attention.tools:
            yield from _attention(task.id, attention)
        verdicts.append(_Verdict.of(task.record, attention))
    yield from _whole_run(verdicts)
    yield from bfcl_accuracy(run)


# -- one task ------------------------------------------------------------------------------------------------


def _probabilities(task: TaskRun) -> Iterator[Measure | Grid]:
    record = task.record
    entries = record["tool_probabilities"]
    names = [entry["tool"] for entry in entries]
    axis = {"tool": names, "span": [NO_TOOL if name is None else None for name in names]}
    for name, unit in (
        ("log_prob", "nats"),
        ("probability", "probability"),
        ("choice_probability", "probability"),
    ):
        values = np.array([entry.get(name, np.nan) for entry in entries], dtype=np.float64)
        yield Grid(task_id=task.id, analyzer=_NAME, name=name, unit=unit, values=values, axes=[axis])
    yield _row(task.id, "candidate_mass", record["candidate_mass"], "probability")
    ranked = sorted((entry["log_prob"] for entry in entries), reverse=True)
    if len(ranked) > 1:
        yield _row(task.id, "margin", ranked[0] - ranked[1], "nats")
    with np.errstate(divide="ignore"):
        yield _row(task.id, "entropy", entropy(np.log([e["probability"] for e in entries])), "nats")


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


# -- the run ---------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """What one task says about the run."""

    shown: list[str]
    right: tuple[str | None, ...]
    """The acceptable choices."""
    chosen: str | None
    chosen_tool: str
    attended: str | None
    """The tool with the most attention per token, where attention was captured."""

    @classmethod
    def of(cls, record: dict[str, Any], attention: Attention | None) -> _Verdict:
        target = record["target"] or None
        right: tuple[str | None, ...] = tuple(target) if isinstance(target, list) else (target,)
        shown = [entry["tool"] for entry in record["tool_probabilities"] if entry["tool"] is not None]
        attended = None
        if attention is not None and attention.tools:
            columns = list(attention.tools.values())
            rates = attention.mass[:, :, columns].mean((0, 1)) / attention.tokens[columns]
            attended = list(attention.tools)[int(rates.argmax())]
        return cls(shown, right, record["chosen"], record["chosen_tool"], attended)


def _whole_run(verdicts: list[_Verdict]) -> Iterator[Measure]:
    """Shares of tasks with their intervals, beside what a choice that reads nothing would reach."""
    if not verdicts:
        return
    called = [v for v in verdicts if v.right != (None,)]
    attended = [v for v in verdicts if v.attended is not None]
    yield _share("accuracy", [v.chosen in v.right for v in verdicts])
    yield _expected("baseline_first", [v.shown[0] in v.right for v in verdicts])
    yield _expected("baseline_no_tool", [None in v.right for v in verdicts])
    yield _expected("baseline_uniform", [len(v.right) / (len(v.shown) + 1) for v in verdicts])
    if called:
        yield _share("accuracy_chosen_tool", [v.chosen_tool in v.right for v in called])
        yield _expected("baseline_first_tool", [v.shown[0] in v.right for v in called])
        yield _expected("baseline_uniform_tool", [len(v.right) / len(v.shown) for v in called])
    if attended:
        yield _share("attention_agreement", [v.attended == v.chosen_tool for v in attended])
        yield _expected("baseline_agreement", [1 / len(v.shown) for v in attended])


def _share(name: str, hits: list[bool]) -> Measure:
    share = sum(hits) / len(hits)
    low, high = wilson(share, len(hits))
    return Measure(
        task_id=WHOLE_RUN,
        analyzer=_NAME,
        name=name,
        value=share,
        unit="share of tasks",
        low=low,
        high=high,
        n=len(hits),
    )


def _expected(name: str, values: list[float] | list[bool]) -> Measure:
    """A mean over the given tasks that is known exactly, so without an interval."""
    return Measure(
        task_id=WHOLE_RUN,
        analyzer=_NAME,
        name=name,
        value=sum(values) / len(values),
        unit="share of tasks",
        n=len(values),
    )


def _row(task_id: str, name: str, value: float, unit: str) -> Measure:
    return Measure(task_id=task_id, analyzer=_NAME, name=name, value=float(value), unit=unit, n=1)
