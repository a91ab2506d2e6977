"""P(tool|context) of every task, and the shares of tasks in which the choice is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probe.analyzers.registry import Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Grid, Row, at_step, finished
from probe.analyzers.tool.attention import Attention, decision_attention
from probe.analyzers.tool.estimates import WILSON, share
from probe.maths.statistics import entropy
from probe.prompts.labels import NO_TOOL

if TYPE_CHECKING:
    from probe.runs import Run

_LIST = Figure(kind="bars", by="tool", card="tool")
_TEXT = Figure(kind="text", card="tool")
_HEADLINE = Figure(kind="estimates")
LOG_PROB = measure(
    "tool",
    "log_prob",
    unit="nats",
    axes="step? tool? span?",
    means="log P(candidate | context): the summed log-probabilities of the tokens of its name, with that of the call's "
    "opener where the template is tool-aware.",
    figure=_LIST,
)
PROBABILITY = measure(
    "tool",
    "probability",
    unit="probability",
    axes="step? tool? span?",
    means="P(candidate): the softmax of `log_prob` over all candidates, no tool included.",
    figure=_LIST,
)
CHOICE_PROBABILITY = measure(
    "tool",
    "choice_probability",
    unit="probability",
    axes="step? tool",
    means="P(tool | some tool): the softmax of `log_prob` over the tools alone.",
    figure=_LIST,
)
CANDIDATE_MASS = measure(
    "tool",
    "candidate_mass",
    unit="probability",
    axes="step?",
    means="Σ exp(`log_prob`): what all candidates together hold of the model's probability.",
    figure=_TEXT,
)
MARGIN = measure(
    "tool",
    "margin",
    unit="nats",
    axes="step?",
    means="The largest `log_prob` minus the second.",
    figure=_TEXT,
)
ENTROPY = measure(
    "tool",
    "entropy",
    unit="nats",
    axes="step?",
    means="−Σ p log p of `probability`.",
    figure=_TEXT,
)
ACCURACY = measure(
    "tool",
    "accuracy",
    unit="share of tasks",
    of="run",
    axes="kind?",
    means="Tasks whose most probable candidate is right; with kind `agent`, tasks of agents in which all that was asked "
    "for came true.",
    interval=WILSON,
    figure=_HEADLINE,
)
ACCURACY_CHOSEN_TOOL = measure(
    "tool",
    "accuracy_chosen_tool",
    unit="share of tasks",
    of="run",
    means="Tasks whose most probable tool is right, of those in which some tool is.",
    interval=WILSON,
    figure=_HEADLINE,
)
ATTENTION_AGREEMENT = measure(
    "tool",
    "attention_agreement",
    unit="share of tasks",
    of="run",
    means="Tasks in which the tool with the most attention per token is the most probable one.",
    interval=WILSON,
    needs=("attn_to_spans",),
    figure=_HEADLINE,
)


def _baseline(name: str, means: str, needs: tuple[str, ...] = ()) -> Measure:
    return measure("tool", name, unit="share of tasks", of="run", means=means, needs=needs, figure=_HEADLINE)


BASELINE_FIRST = _baseline("baseline_first", "`accuracy` of always taking the tool that is shown first.")
BASELINE_NO_TOOL = _baseline("baseline_no_tool", "`accuracy` of never calling a tool.")
BASELINE_UNIFORM = _baseline("baseline_uniform", "`accuracy` of an even guess among all candidates.")
BASELINE_FIRST_TOOL = _baseline(
    "baseline_first_tool", "`accuracy_chosen_tool` of always taking the tool that is shown first."
)
BASELINE_UNIFORM_TOOL = _baseline(
    "baseline_uniform_tool", "`accuracy_chosen_tool` of an even guess among the tools."
)
BASELINE_AGREEMENT = _baseline(
    "baseline_agreement", "`attention_agreement` of an even guess: the mean of 1/K.", ("attn_to_spans",)
)


def measures(run: Run) -> Iterator[Row | Grid]:
    """Probabilities at every decision of `tool_selection` and `agent` tasks, then the shares of the run.

    For an agent `step` is the turn, and the share of tasks done has `kind` "agent".
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
        yield share(ACCURACY, scores, kind="agent")


# -- one task ------------------------------------------------------------------------------------------------


def _probabilities(task_id: str, record: Mapping[str, Any]) -> Iterator[Row | Grid]:
    """Of one decision: the record of a tool task, or of a turn."""
    entries = record["tool_probabilities"]
    for quantity in (LOG_PROB, PROBABILITY, CHOICE_PROBABILITY):
        shown = [entry for entry in entries if quantity.name in entry]
        values = np.array([entry[quantity.name] for entry in shown], dtype=np.float64)
        tools = [entry["tool"] for entry in shown]
        axis = {"tool": tools}
        if None in tools:
            axis["span"] = [NO_TOOL if tool is None else None for tool in tools]
        yield quantity.grid(task_id, values, axis)
    yield CANDIDATE_MASS.row(task_id, record["candidate_mass"])
    ranked = sorted((entry["log_prob"] for entry in entries), reverse=True)
    if len(ranked) > 1:
        yield MARGIN.row(task_id, ranked[0] - ranked[1])
    with np.errstate(divide="ignore"):
        yield ENTROPY.row(task_id, entropy(np.log([e["probability"] for e in entries])))


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
    yield share(ACCURACY, [v.chosen in v.right for v in verdicts])
    yield _expected(BASELINE_FIRST, [v.shown[0] in v.right for v in verdicts])
    yield _expected(BASELINE_NO_TOOL, [None in v.right for v in verdicts])
    yield _expected(BASELINE_UNIFORM, [len(v.right) / (len(v.shown) + 1) for v in verdicts])
    if called:
        yield share(ACCURACY_CHOSEN_TOOL, [v.chosen_tool in v.right for v in called])
        yield _expected(BASELINE_FIRST_TOOL, [v.shown[0] in v.right for v in called])
        yield _expected(BASELINE_UNIFORM_TOOL, [len(v.right) / len(v.shown) for v in called])
    if attended:
        yield share(ATTENTION_AGREEMENT, [v.attended == v.chosen_tool for v in attended])
        yield _expected(BASELINE_AGREEMENT, [1 / len(v.shown) for v in attended])


def _expected(baseline: Measure, values: list[float] | list[bool]) -> Row:
    """A mean over the given tasks that is known exactly, so without an interval."""
    return baseline.row(WHOLE_RUN, sum(values) / len(values), n=len(values))
