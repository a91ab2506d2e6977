"""What the order of the tools does to the choice, and the choice that is left when orders are averaged out.

From the experiment `order`: all orders of a task, or distinct ones drawn at random. Slots are counted from 1, and
P(slot) and P(tool) are over the tools alone (no-tool has no slot).

A row with `experiment` "order" averages the orders of each task. Without it the tasks are taken as they are shown: slots
and tools are then compared across tasks, each in its one order, so a bias is the model's only where the right tool is
equally often in every slot and equally often each tool. As a task's right tool earns its probability, only tasks whose
tools are equivalent have 0 as what an unbiased model reaches for `tool_bias`. With `n_tools` a row is over the tasks
that show as many; else tasks with different numbers are kept apart and their δ averaged by number of tasks, and for
tools the even share is the mean of 1/K over the tasks (see `deviation`). With a random few orders a tool that is liked
lends its probability to the slots in which it was drawn more often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.registry import FOLDED, SHARE, WILSON, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.analyzers.tool.estimates import EXCHANGES, deviation, half_sum
from probe.maths.intervals import LEAST, folded_interval
from probe.maths.statistics import picks, softmax
from probe.prompts.labels import NO_TOOL
from probe.runs.views.choice import Choice, choices
from probe.runs.views.conditions import Scores, scores_by_task

if TYPE_CHECKING:
    from probe.runs import Run

ORDER = "order"
_NEEDS = ("experiment:order",)
_TABLE = Figure(kind="table", by="experiment", card="choices")
_DELTA = "δ of BiasBusters, Blankenstein et al. 2025"

PROBABILITY_ORDERS = measure(
    "tool",
    "probability_orders",
    unit="probability",
    axes="tool? span?",
    means="P(candidate) averaged over n orders of the tools: all of them, or distinct ones drawn at random.",
    interval=f"95 % Student's t for a finite population, from {LEAST} orders on; none where all are there",
    needs=_NEEDS,
    figure=Figure(kind="bars", by="tool", card="tool"),
)


def _bias(name: str, of: str, means: str) -> Measure:
    return measure(
        "tool",
        name,
        unit="probability",
        of=of,
        axes="experiment? n_tools?",
        means=means,
        source=_DELTA,
        interval=FOLDED + "; of a task over its orders, none where all are there",
        figure=_TABLE,
    )


def _bias_chance(name: str) -> Measure:
    return measure(
        "tool",
        f"{name}_chance",
        unit="probability",
        of="run",
        axes="experiment? n_tools?",
        means=f"Mean of `{name}` where the places of each task are exchanged at random, {EXCHANGES} times: what chance alone "
        "gives.",
        interval="95 % of the exchanges",
        figure=_TABLE,
    )


POSITION_BIAS = _bias(
    "position_bias",
    "task run",
    "½ Σ |P_i − e_i| over slots of the mean probability among the tools, of a task over its orders, of the run over "
    "tasks; e_i is the even share. Never negative, so too large for few orders or tasks: its interval, of what all such tasks would show, may lie below it; compare it with `position_bias_chance`.",
)
POSITION_BIAS_CHOICE = _bias(
    "position_bias_choice",
    "run",
    "½ Σ |P_i − e_i| over slots of the shares of choices; e_i is the even share.",
)
TOOL_BIAS = _bias("tool_bias", "task run", "As `position_bias`, over tools.")
TOOL_BIAS_CHOICE = _bias("tool_bias_choice", "run", "As `position_bias_choice`, over tools.")
CHANCE = {
    defined: _bias_chance(defined.name)
    for defined in (POSITION_BIAS, POSITION_BIAS_CHOICE, TOOL_BIAS, TOOL_BIAS_CHOICE)
}
"""Bias → what of it is chance."""
SLOT_PROBABILITY = measure(
    "tool",
    "slot_probability",
    unit="probability",
    of="task run",
    axes="experiment? n_tools slot",
    means="P(slot), the mean probability among the tools of the one that stands in the slot: of a task over its n orders, "
    "of the run over tasks.",
    interval=SHARE + "; none of a task",
    figure=Figure(kind="bars", by="slot", card="tool"),
)


def _first_slot(name: str, unit: str, means: str, interval: str | None, axes: str = "") -> Measure:
    return measure(
        "tool",
        name,
        unit=unit,
        of="run",
        axes=axes or "experiment? n_tools?",
        means=means,
        interval=interval,
        figure=_TABLE,
    )


SLOT_RATE = _first_slot(
    "slot_rate",
    "share of choices",
    "How often the tool in the slot is the choice among the tools.",
    SHARE,
    "experiment? n_tools slot",
)
FIRST_SLOT_PROBABILITY = _first_slot(
    "first_slot_probability",
    "probability",
    "Mean probability, among the tools, of the one shown first.",
    SHARE,
)
FIRST_SLOT_RATE = _first_slot(
    "first_slot_rate",
    "share of choices",
    "How often the tool shown first is the choice among the tools.",
    SHARE,
)
BASELINE_FIRST_SLOT = _first_slot(
    "baseline_first_slot", "share of choices", "Mean of 1/K, the even share.", None
)


def _of_orders(name: str, means: str, interval: str = WILSON) -> Measure:
    return measure(
        "tool",
        name,
        unit="share of tasks",
        of="run",
        means=means,
        interval=interval,
        needs=_NEEDS,
        figure=_TABLE,
    )


_TOOLS = " Among the tools alone, of the tasks in which some tool is right."
FLIP_RATE = _of_orders(
    "flip_rate",
    "Tasks in which two orders differ in their choice; a lower bound where orders are drawn.",
)
FLIP_RATE_TOOLS = _of_orders(
    "flip_rate_tools", "Tasks in which two orders differ in their choice among the tools alone."
)
ACCURACY_ORDERS = _of_orders(
    "accuracy_orders", "Tasks in which the choice by the averaged probabilities is right."
)
ACCURACY_ORDERS_TOOLS = _of_orders("accuracy_orders_tools", "As `accuracy_orders`." + _TOOLS)
ACCURACY_MEAN_ORDER = _of_orders(
    "accuracy_mean_order", "Mean over tasks of the share of orders with a right choice.", SHARE
)
ACCURACY_MEAN_ORDER_TOOLS = _of_orders(
    "accuracy_mean_order_tools", "As `accuracy_mean_order`." + _TOOLS, SHARE
)


@dataclass(frozen=True)
class Orders:
    """One task under several orders of its tools."""

    case: Choice
    log_probs: np.ndarray
    """[order, candidate], in the order of the case's names."""
    slots: np.ndarray
    """[order, tool]: where each tool stood, from 0."""

    @classmethod
    def of(cls, case: Choice, conditions: Sequence[Scores]) -> Orders:
        """Orders given twice count once. Raises ValueError for what is no order of the task's tools."""
        tools = case.names[:-1]
        distinct = {tuple(condition.detail): condition.log_probs for condition in conditions}
        for order in distinct:
            if sorted(order) != sorted(map(str, tools)):
                raise ValueError(f"interventions: {case.id}: {list(order)} is no order of its tools")
        slots = [[order.index(tool) for tool in tools] for order in distinct]
        return cls(case, np.stack(list(distinct.values())), np.array(slots))

    @classmethod
    def shown(cls, case: Choice) -> Orders:
        """The one order of the task itself."""
        return cls(case, case.log_probs[None], np.arange(case.n_tools)[None])

    @property
    def n(self) -> int:
        return len(self.slots)

    @property
    def is_complete(self) -> bool:
        """Whether these are all orders, so that a mean over them is exact."""
        return self.n == math.factorial(self.case.n_tools)

    def by_slot(self, of_tools: np.ndarray) -> np.ndarray:
        """[order, tool] as [order, slot]."""
        out = np.empty_like(of_tools)
        np.put_along_axis(out, self.slots, of_tools, axis=1)
        return out


def measures(run: Run) -> Iterator[Row | Grid]:
    """Tasks under orders, then the run under orders and as shown."""
    known = choices(run)
    if not known:
        return
    by_task = scores_by_task(run, ORDER)
    ordered = [Orders.of(case, by_task[case.id]) for case in known if case.id in by_task]
    for orders in ordered:
        yield from _probability(orders)
    for orders in ordered:
        yield from _task_biases(orders)
    if ordered:
        yield from _choices(ordered)
        yield from _biases(ordered, experiment=ORDER)
    yield from _biases([Orders.shown(case) for case in known])


# -- one task --------------------------------------------------------------------------------------------------


def _probability(orders: Orders) -> Iterator[Row]:
    from scipy.stats import t

    p = softmax(orders.log_probs)
    average, n = p.mean(0), orders.n
    half = None
    if not orders.is_complete and n >= LEAST:
        left_out = 1 - n / math.factorial(orders.case.n_tools)
        half = t.ppf(0.975, n - 1) * p.std(0, ddof=1) * math.sqrt(left_out / n)
    for index, name in enumerate(orders.case.names):
        value, interval = float(average[index]), None
        if half is not None:
            interval = max(0.0, float(value - half[index])), min(1.0, float(value + half[index]))
        span = NO_TOOL if name is None else None
        yield PROBABILITY_ORDERS.row(orders.case.id, value, n=n, interval=interval, tool=name, span=span)


def _task_biases(orders: Orders) -> Iterator[Row | Grid]:
    count = orders.case.n_tools
    of_tools = softmax(orders.log_probs[:, :-1])
    of_slots = orders.by_slot(of_tools)
    for bias, p in ((POSITION_BIAS, of_slots), (TOOL_BIAS, of_tools)):
        gaps, interval = p - 1 / count, None
        if not orders.is_complete:
            interval = folded_interval(gaps, half_sum)
        value = float(half_sum(gaps.mean(0)))
        yield bias.row(orders.case.id, value, n=orders.n, interval=interval, experiment=ORDER)
    slots = {"slot": [*range(1, count + 1)], "n_tools": [count] * count, "experiment": [ORDER] * count}
    yield SLOT_PROBABILITY.grid(orders.case.id, of_slots.mean(0), slots, n=orders.n)


# -- the run ---------------------------------------------------------------------------------------------------


def _choices(ordered: Sequence[Orders]) -> Iterator[Row]:
    called = [orders for orders in ordered if orders.case.wants_tool]
    of_all = (slice(None), ordered, FLIP_RATE, ACCURACY_ORDERS, ACCURACY_MEAN_ORDER)
    of_tools = (slice(-1), called, FLIP_RATE_TOOLS, ACCURACY_ORDERS_TOOLS, ACCURACY_MEAN_ORDER_TOOLS)
    for kept, judged, flip_rate, accuracy, accuracy_mean in (of_all, of_tools):
        yield flip_rate.share([_flips(orders.log_probs[:, kept]) for orders in ordered])
        if judged:
            right = [orders.case.is_right[kept] for orders in judged]
            scores = [orders.log_probs[:, kept] for orders in judged]
            averaged = [picks(softmax(s).mean(0)) @ hit for s, hit in zip(scores, right, strict=True)]
            yield accuracy.share(averaged)
            yield accuracy_mean.share([(picks(s) @ hit).mean() for s, hit in zip(scores, right, strict=True)])


def _flips(scores: np.ndarray) -> bool:
    """Whether no candidate is the choice in every order."""
    return not (scores == scores.max(-1, keepdims=True)).all(0).any()


@dataclass(frozen=True)
class _Share:
    """What one task gives to its slots and tools, by probability and by choice, averaged over its orders."""

    case: Choice
    slot_p: np.ndarray
    slot_choice: np.ndarray
    tool_p: np.ndarray
    tool_choice: np.ndarray

    @classmethod
    def of(cls, orders: Orders) -> _Share:
        scores = orders.log_probs[:, :-1]
        p, choice = softmax(scores), picks(scores)
        averages = (orders.by_slot(p), orders.by_slot(choice), p, choice)
        return cls(orders.case, *(table.mean(0) for table in averages))

    def gaps(self, name: str) -> Mapping[Any, float]:
        """Share minus even share by place."""
        count = self.case.n_tools
        places = [(count, slot) for slot in range(count)] if name.startswith("slot") else self.case.names[:-1]
        return dict(zip(places, getattr(self, name) - 1 / count, strict=True))


def _biases(ordered: Sequence[Orders], **place: str) -> Iterator[Row]:
    shares = [_Share.of(orders) for orders in ordered]
    yield from _bias_rows(shares, **place)
    for count in sorted({of_task.case.n_tools for of_task in shares}):
        same = [of_task for of_task in shares if of_task.case.n_tools == count]
        yield from _bias_rows(same, **place, n_tools=count)
        for slot in range(count):
            at = {**place, "n_tools": count, "slot": slot + 1}
            yield SLOT_PROBABILITY.share([of_task.slot_p[slot] for of_task in same], **at)
            yield SLOT_RATE.share([of_task.slot_choice[slot] for of_task in same], **at)


def _bias_rows(shares: Sequence[_Share], **place: Any) -> Iterator[Row]:
    for bias, kind in (
        (POSITION_BIAS, "slot_p"),
        (POSITION_BIAS_CHOICE, "slot_choice"),
        (TOOL_BIAS, "tool_p"),
        (TOOL_BIAS_CHOICE, "tool_choice"),
    ):
        yield from deviation(bias, CHANCE[bias], [of_task.gaps(kind) for of_task in shares], **place)
    yield FIRST_SLOT_PROBABILITY.share([of_task.slot_p[0] for of_task in shares], **place)
    yield FIRST_SLOT_RATE.share([of_task.slot_choice[0] for of_task in shares], **place)
    even = float(np.mean([1 / of_task.case.n_tools for of_task in shares]))
    yield BASELINE_FIRST_SLOT.row(WHOLE_RUN, even, n=len(shares), **place)
