"""P(tool|context) of every task, and the shares of tasks in which the choice is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probe.analyzers.registry import WILSON, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Grid, Row, at_step
from probe.analyzers.tool.estimates import ORDER_STATISTICS, median
from probe.maths.statistics import entropy
from probe.prompts.labels import NO_TOOL
from probe.runs.read import finished
from probe.runs.records import AgentRecord, Decision, ReplayAgreement, ReplayRecord, ToolRecord
from probe.runs.views.attention import Attention, decision_attention
from probe.runs.views.choice import Choice

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
REPLAY_ARGMAX = measure(
    "tool",
    "replay_argmax_share",
    unit="share of tokens",
    means="Tokens that a replayed log or a run's generator emitted and that are the argmax of the model at hand.",
    figure=_TEXT,
)
REPLAY_DELTA = measure(
    "tool",
    "replay_delta_log_prob",
    unit="nats",
    means="Mean |Δ log p| of emitted tokens between a replayed log, or a run's generator, and the model at hand, where that has "
    "log-probabilities.",
    figure=_TEXT,
)
REPLAY_LARGEST_DELTA = measure(
    "tool",
    "replay_largest_delta_log_prob",
    unit="nats",
    means="The largest |Δ log p| of an emitted token between a replayed log, or a run's generator, and the model at hand.",
    figure=_TEXT,
)
CALL_ACCURACY = measure(
    "tool",
    "call_accuracy",
    unit="share of tasks",
    of="run",
    means="Tasks whose generated call is right: an acceptable tool with valid arguments, or no call where that is right. "
    "The prompt ends with the call's opener; where no tool is the complement of the opener, an opener of probability "
    "below one half counts as no call.",
    interval=WILSON,
    figure=_HEADLINE,
)
CALL_AGREEMENT = measure(
    "tool",
    "call_agreement",
    unit="share of tasks",
    of="run",
    means="Tasks whose generated call names the most probable candidate, no tool included.",
    interval=WILSON,
    figure=_HEADLINE,
)
CANDIDATE_MASS_MEDIAN = measure(
    "tool",
    "candidate_mass_median",
    unit="probability",
    of="run",
    means="The median over tasks of `candidate_mass`: near 0, the choice is a softmax over names that the model would "
    "hardly have written.",
    interval=ORDER_STATISTICS,
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
    """Probabilities at every decision of `tool_selection`, `agent` and `replay` tasks, then the shares of the run.

    For an agent `step` is the turn, and the share of tasks done has `kind` "agent".
    """
    tasks, records = [], []
    for task in finished(run, "tool_selection"):
        record = task.typed(ToolRecord)
        yield from _probabilities(task.id, record.decision)
        if (agreement := record.passage.replay_agreement) is not None:
            yield from _agreement(task.id, agreement)
        tasks.append(_AttentionToTools.of(Choice.of(record), decision_attention(task)))
        records.append(record)
    yield from _whole_run(tasks)
    yield from _generated(records)
    scores = []
    for task in finished(run, "agent", "replay"):
        record = task.typed(ReplayRecord if task.record["kind"] == "replay" else AgentRecord)
        for turn in record.turns:
            yield from at_step(turn.turn, _probabilities(task.id, turn))
        if isinstance(record, ReplayRecord):
            yield from _agreement(task.id, record.replay_agreement)
        if record.score is not None:
            scores.append(record.score == 1)
    if scores:
        yield ACCURACY.share(scores, kind="agent")


def _agreement(task_id: str, agreement: ReplayAgreement) -> Iterator[Row]:
    yield REPLAY_ARGMAX.row(task_id, agreement.argmax_share)
    if agreement.mean_delta_log_prob is not None and agreement.largest_delta_log_prob is not None:
        yield REPLAY_DELTA.row(task_id, agreement.mean_delta_log_prob)
        yield REPLAY_LARGEST_DELTA.row(task_id, agreement.largest_delta_log_prob)


# -- one task ------------------------------------------------------------------------------------------------


def _probabilities(task_id: str, decision: Decision) -> Iterator[Row | Grid]:
    entries = decision.tool_probabilities
    for quantity in (LOG_PROB, PROBABILITY, CHOICE_PROBABILITY):
        known = [
            (entry.tool, value) for entry in entries if (value := getattr(entry, quantity.name)) is not None
        ]
        values = np.array([value for _, value in known], dtype=np.float64)
        tools = [tool for tool, _ in known]
        axis = {"tool": tools}
        if None in tools:
            axis["span"] = [NO_TOOL if tool is None else None for tool in tools]
        yield quantity.grid(task_id, values, axis)
    yield CANDIDATE_MASS.row(task_id, decision.candidate_mass)
    ranked = sorted((entry.log_prob for entry in entries), reverse=True)
    if len(ranked) > 1:
        yield MARGIN.row(task_id, ranked[0] - ranked[1])
    with np.errstate(divide="ignore"):
        yield ENTROPY.row(task_id, entropy(np.log([entry.probability for entry in entries])))


# -- the run ---------------------------------------------------------------------------------------------------


class _AttentionToTools(NamedTuple):
    """A choice, and what the decision's row attends to."""

    choice: Choice
    tool: str | None
    """The tool with the most attention per token, None where attention was not captured."""

    @classmethod
    def of(cls, choice: Choice, attention: Attention | None) -> _AttentionToTools:
        if attention is None or not attention.tools:
            return cls(choice, None)
        columns = list(attention.tools.values())
        rates = attention.mass[:, :, columns].mean((0, 1)) / attention.tokens[columns]
        return cls(choice, list(attention.tools)[int(rates.argmax())])


def _whole_run(tasks: list[_AttentionToTools]) -> Iterator[Row]:
    """Shares of tasks with their intervals, beside what a choice that reads nothing would reach."""
    if not tasks:
        return
    choices = [task.choice for task in tasks]
    called = [choice for choice in choices if choice.wants_tool]
    attended = [task for task in tasks if task.tool is not None]
    yield ACCURACY.share([c.chosen in c.right for c in choices])
    yield _expected(BASELINE_FIRST, [c.tools[0] in c.right for c in choices])
    yield _expected(BASELINE_NO_TOOL, [None in c.right for c in choices])
    yield _expected(BASELINE_UNIFORM, [len(c.right) / len(c.names) for c in choices])
    if called:
        yield ACCURACY_CHOSEN_TOOL.share([c.chosen_tool in c.right for c in called])
        yield _expected(BASELINE_FIRST_TOOL, [c.tools[0] in c.right for c in called])
        yield _expected(BASELINE_UNIFORM_TOOL, [len(c.right) / c.n_tools for c in called])
    if attended:
        yield ATTENTION_AGREEMENT.share([task.tool == task.choice.chosen_tool for task in attended])
        yield _expected(BASELINE_AGREEMENT, [1 / task.choice.n_tools for task in attended])


def _generated(records: list[ToolRecord]) -> Iterator[Row]:
    """What the model wrote, beside the scored choice."""
    calls = [(r.decision, r.calls_right) for r in records]
    generated = [(decision, right) for decision, right in calls if right is not None]
    if generated:
        yield CALL_ACCURACY.share([right for _, right in generated])
        yield CALL_AGREEMENT.share([d.called == d.chosen and d.call is not None for d, _ in generated])
    if records:
        yield median(CANDIDATE_MASS_MEDIAN, [record.decision.candidate_mass for record in records])


def _expected(baseline: Measure, values: list[float] | list[bool]) -> Row:
    """A mean over the given tasks that is known exactly, so without an interval."""
    return baseline.row(WHOLE_RUN, sum(values) / len(values), n=len(values))
