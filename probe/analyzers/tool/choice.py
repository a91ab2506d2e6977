"""P(tool|context) of every task, and the shares of tasks in which the choice is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row, at_step, finished
from probe.analyzers.tool.attention import Attention, decision_attention
from probe.maths.statistics import entropy, wilson
from probe.prompts.labels import NO_TOOL

if TYPE_CHECKING:
    from probe.runs import Run

_NAME = "tool"


def measures(run: Run) -> Iterator[Row | Grid]:
    """Probabilities at every decision of `tool_selection` and `agent` tasks, then the shares of the run.

    For an agent `step` is the turn, and the share of tasks done has `variant` "agent".
    """
    verdicts = []
    for task in finished(run, "tool_selection"):
        yield from _probabilities(task.id, task.record)
        verdicts.append(_Verdict.of(task.record, decision_attention(task)))
    yield from _whole_run(verdicts)
    scores = []
    for task in finished(run, "agent"):
        for turn in task.record["turns"]:
            yield from at_step(turn["turn"], _probabilities(task.id, turn))
        if "score" in task.record:
            scores.append(task.record["score"] == 1)
    if scores:
        yield replace(_share("accuracy", scores), variant="agent")


# -- one task ------------------------------------------------------------------------------------------------


def _probabilities(task_id: str, record: Mapping[str, Any]) -> Iterator[Row | Grid]:
    """Of one decision: the record of a tool task, or of a turn."""
    entries = record["tool_probabilities"]
    names = [entry["tool"] for entry in entries]
    axis = {"tool": names, "span": [NO_TOOL if name is None else None for name in names]}
    for name, unit in (
        ("log_prob", "nats"),
        ("probability", "probability"),
        ("choice_probability", "probability"),
    ):
        values = np.array([entry.get(name, np.nan) for entry in entries], dtype=np.float64)
        yield Grid(task_id=task_id, analyzer=_NAME, name=name, unit=unit, values=values, axes=[axis])
    yield _row(task_id, "candidate_mass", record["candidate_mass"], "probability")
    ranked = sorted((entry["log_prob"] for entry in entries), reverse=True)
    if len(ranked) > 1:
        yield _row(task_id, "margin", ranked[0] - ranked[1], "nats")
    with np.errstate(divide="ignore"):
        yield _row(task_id, "entropy", entropy(np.log([e["probability"] for e in entries])), "nats")


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


def _whole_run(verdicts: list[_Verdict]) -> Iterator[Row]:
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


def _share(name: str, hits: list[bool]) -> Row:
    share = sum(hits) / len(hits)
    low, high = wilson(share, len(hits))
    return Row(
        task_id=WHOLE_RUN,
        analyzer=_NAME,
        name=name,
        value=share,
        unit="share of tasks",
        low=low,
        high=high,
        n=len(hits),
    )


def _expected(name: str, values: list[float] | list[bool]) -> Row:
    """A mean over the given tasks that is known exactly, so without an interval."""
    return Row(
        task_id=WHOLE_RUN,
        analyzer=_NAME,
        name=name,
        value=sum(values) / len(values),
        unit="share of tasks",
        n=len(values),
    )


def _row(task_id: str, name: str, value: float, unit: str) -> Row:
    return Row(task_id=task_id, analyzer=_NAME, name=name, value=float(value), unit=unit, n=1)
