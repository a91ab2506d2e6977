"""What the order of the tools does to the choice, and the choice that is left when orders are averaged out.

From the experiment `order`: all orders of a task, or distinct ones drawn at random. Slots are counted from 1, and
P(slot) and P(tool) are over the tools alone (no-tool has no slot).

Per task: `probability_orders`, P(candidate) averaged over the orders; exact where all orders are there, else with
a t interval (finite population). `slot_probability`, `variant` "K:slot". `position_bias` and `tool_bias`, `variant`
"orders": ½ Σ |P_i − 1/K| over slots and over tools (δ_pos and δ_API of BiasBusters, Blankenstein et al. 2025), with
a bootstrap interval over orders where these are not all. With a random few orders a tool that is liked lends
its probability to the slots in which it was drawn more often.

Of the run, with the orders averaged within each task:

- `flip_rate`, `flip_rate_tools`: share of tasks in which two orders differ in their choice (a lower bound where
  orders are drawn).
- `accuracy_orders`, `accuracy_orders_tools`: of the choice by the averaged probabilities;
  `accuracy_mean_order`, `accuracy_mean_order_tools`: mean over tasks of the share of orders with a right choice.
- `position_bias`, `tool_bias` by probability and `position_bias_choice`, `tool_bias_choice` by choice, of the means
  over tasks; `first_slot_probability`, `first_slot_rate`, and `baseline_first_slot` (mean of 1/K); `slot_probability`
  and `slot_rate` with `variant` "orders:K:slot". `variant` "orders" is over all tasks that have orders, "orders:K"
  over those that show K tools.

The same with `variant` "shown", "shown:K" from the tasks as they are: K slots, or tools, are then compared
across tasks, each in its one order, so a bias is the model's only where the right tool is equally often in every slot
and equally often each tool. As a task's right tool earns its probability, only tasks whose tools are equivalent have
0 as what an unbiased model reaches for `tool_bias`. Tasks of different K are kept apart and their δ
averaged by number of tasks; for tools, the even share is the mean of 1/K over the tasks (see `deviation`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.rows import Grid, Row
from probe.analyzers.tool.cases import (
    Case,
    Condition,
    cases,
    conditions,
    picks,
    softmax,
)
from probe.analyzers.tool.estimates import deviation, mean, share, whole
from probe.maths.statistics import bootstrap
from probe.prompts.labels import NO_TOOL

if TYPE_CHECKING:
    from probe.runs import Run


@dataclass(frozen=True)
class Orders:
    """One task under several orders of its tools."""

    case: Case
    log_probs: np.ndarray
    """[order, candidate], in the order of the case's names."""
    slots: np.ndarray
    """[order, tool]: where each tool stood, from 0."""

    @classmethod
    def of(cls, case: Case, found: Sequence[Condition]) -> Orders:
        """Orders given twice count once. Raises ValueError for what is no order of the task's tools."""
        tools = case.names[:-1]
        distinct = {tuple(condition.detail): condition.log_probs for condition in found}
        for order in distinct:
            if sorted(order) != sorted(map(str, tools)):
                raise ValueError(f"interventions: {case.id}: {list(order)} is no order of its tools")
        slots = [[order.index(tool) for tool in tools] for order in distinct]
        return cls(case, np.stack(list(distinct.values())), np.array(slots))

    @classmethod
    def shown(cls, case: Case) -> Orders:
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
    known = cases(run)
    if not known:
        return
    found = conditions(run.interventions(), "order", known)
    ordered = [Orders.of(case, found[case.id]) for case in known if case.id in found]
    for orders in ordered:
        yield from _probability(orders)
    for orders in ordered:
        yield from _task_biases(orders)
    if ordered:
        yield from _choices(ordered)
        yield from _biases("orders", ordered)
    yield from _biases("shown", [Orders.shown(case) for case in known])


# -- one task --------------------------------------------------------------------------------------------------


def _probability(orders: Orders) -> Iterator[Row]:
    from scipy.stats import t

    p = softmax(orders.log_probs)
    average, n = p.mean(0), orders.n
    half = None
    if not orders.is_complete and n > 1:
        left_out = 1 - n / math.factorial(orders.case.n_tools)
        half = t.ppf(0.975, n - 1) * p.std(0, ddof=1) * math.sqrt(left_out / n)
    for index, name in enumerate(orders.case.names):
        value = float(average[index])
        low, high = (None, None) if half is None else (value - half[index], value + half[index])
        yield Row(
            task_id=orders.case.id,
            analyzer="tool",
            name="probability_orders",
            value=value,
            unit="probability",
            n=n,
            low=None if low is None else max(0.0, float(low)),
            high=None if high is None else min(1.0, float(high)),
            tool=name,
            span=NO_TOOL if name is None else None,
        )


def _task_biases(orders: Orders) -> Iterator[Row | Grid]:
    count = orders.case.n_tools
    of_tools = softmax(orders.log_probs[:, :-1])
    of_slots = orders.by_slot(of_tools)
    common: dict[str, Any] = {"task_id": orders.case.id, "analyzer": "tool", "unit": "probability"}
    for name, p in (("position_bias", of_slots), ("tool_bias", of_tools)):
        gaps = p - 1 / count
        interval = None
        if not orders.is_complete:
            interval = bootstrap(lambda drawn, g=gaps: np.abs(drawn @ g).sum(1) / len(g) / 2, orders.n)
        low, high = interval or (None, None)
        value = float(np.abs(p.mean(0) - 1 / count).sum() / 2)
        yield Row(**common, name=name, value=value, n=orders.n, low=low, high=high, variant="orders")
    slots = {"variant": [f"{count}:{slot}" for slot in range(1, count + 1)]}
    yield Grid(**common, name="slot_probability", values=of_slots.mean(0), axes=[slots], n=orders.n)


# -- the run ---------------------------------------------------------------------------------------------------


def _choices(ordered: Sequence[Orders]) -> Iterator[Row]:
    called = [orders for orders in ordered if orders.case.wants_tool]
    for suffix, kept, judged in (("", slice(None), ordered), ("_tools", slice(-1), called)):
        yield share(f"flip_rate{suffix}", [_flips(orders.log_probs[:, kept]) for orders in ordered])
        if judged:
            right = [orders.case.is_right[kept] for orders in judged]
            scores = [orders.log_probs[:, kept] for orders in judged]
            averaged = [picks(softmax(s).mean(0)) @ hit for s, hit in zip(scores, right, strict=True)]
            yield share(f"accuracy_orders{suffix}", averaged)
            each = [(picks(s) @ hit).mean() for s, hit in zip(scores, right, strict=True)]
            yield mean(f"accuracy_mean_order{suffix}", each, "share of tasks")


def _flips(scores: np.ndarray) -> bool:
    """Whether no candidate is the choice in every order."""
    return not (scores == scores.max(-1, keepdims=True)).all(0).any()


@dataclass(frozen=True)
class _Share:
    """What one task gives to its slots and tools, by probability and by choice, averaged over its orders."""

    case: Case
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


def _biases(source: str, ordered: Sequence[Orders]) -> Iterator[Row]:
    shares = [_Share.of(orders) for orders in ordered]
    yield from _bias_rows(source, shares)
    for count in sorted({found.case.n_tools for found in shares}):
        same = [found for found in shares if found.case.n_tools == count]
        yield from _bias_rows(f"{source}:{count}", same)
        for slot in range(count):
            variant = f"{source}:{count}:{slot + 1}"
            slot_p = [found.slot_p[slot] for found in same]
            yield mean("slot_probability", slot_p, "probability", variant=variant)
            slot_choice = [found.slot_choice[slot] for found in same]
            yield mean("slot_rate", slot_choice, "share of choices", variant=variant)


def _bias_rows(variant: str, shares: Sequence[_Share]) -> Iterator[Row]:
    for name, kind in (
        ("position_bias", "slot_p"),
        ("position_bias_choice", "slot_choice"),
        ("tool_bias", "tool_p"),
        ("tool_bias_choice", "tool_choice"),
    ):
        yield deviation(name, [found.gaps(kind) for found in shares], variant=variant)
    first_p, first_choice = ([getattr(s, kind)[0] for s in shares] for kind in ("slot_p", "slot_choice"))
    yield mean("first_slot_probability", first_p, "probability", variant=variant)
    yield mean("first_slot_rate", first_choice, "share of choices", variant=variant)
    even = float(np.mean([1 / found.case.n_tools for found in shares]))
    yield whole("baseline_first_slot", even, "share of choices", len(shares), variant=variant)
