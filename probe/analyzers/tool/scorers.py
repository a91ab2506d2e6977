"""Ways to score a candidate, side by side: which one is used changes the choice, and none is best everywhere.

A candidate's scores become P(tool|context) by a softmax over the candidates.

- `sum` (the default): log P(name), its token log-probabilities added up.
- `first_token`: the first token alone. Names that begin with the same token tie.
- `mean_token`, `mean_byte`: `sum` divided by the tokens of the name, closing mark included, or by the name's
  UTF-8 bytes.
- `pmi`: log P(name|context) − the mean of log P(name|content-free context): pointwise mutual information with
  the request (Holtzman et al. 2021, eq. 3), where the content-free context shows the same tools.
- `contextual_calibration`: p/p_cf, renormalized; p_cf is the mean of the content-free probabilities, W =
  diag(p_cf)⁻¹ and b = 0 (Zhao et al. 2021, section 5), for each task with its own tools. The choice is that of
  softmax(Wp + b); without that softmax the content-free context itself comes out even.
- `orders`: the mean of the probabilities over orders of the tools.
- `pmi_orders`: the log of that minus the content-free log-probability of `pmi`. This one belongs to the shown
  order, so a preference for a slot is taken from scores that no longer have it.

A scorer without its data (tokens, content-free contexts, orders) is absent. No-tool is scored in the same way
where the template lists it as a name. Where it is the complement of the call opener it has no name: log(1 −
P(opener)) stands beside tools that carry log P(opener) for `sum`, `first_token`, `pmi`,
`contextual_calibration`, `orders` and `pmi_orders`; `mean_token` and `mean_byte`, of which a probability is no
part, are given over the tools alone.

Tied candidates share a choice equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.registry import FOLDED, WILSON, Figure, Measure, measure
from probe.analyzers.rows import Grid, Row
from probe.analyzers.tool.estimates import deviation
from probe.maths.statistics import picks, softmax
from probe.prompts.labels import NO_TOOL
from probe.runs.views.choice import Choice, choices
from probe.runs.views.conditions import Scores, scores_by_task

if TYPE_CHECKING:
    from probe.runs import Run

DEFAULT = "sum"
SCORERS = (
    DEFAULT,
    "first_token",
    "mean_token",
    "mean_byte",
    "pmi",
    "contextual_calibration",
    "orders",
    "pmi_orders",
)
_NEEDS = (
    "experiment:content_free",
    "experiment:order",
)
"""Experiments that some scorers need."""
PROBABILITY_SCORER = measure(
    "tool",
    "probability_scorer",
    unit="probability",
    axes="scorer tool? span?",
    means="P(candidate) by the scorer, over all candidates, or over the tools alone where the scorer has no no-tool.",
    needs=_NEEDS,
    figure=Figure(kind="table", by="tool", card="tool"),
)


def _of_run(name: str, unit: str, means: str, interval: str, source: str | None = None) -> Measure:
    return measure(
        "tool",
        name,
        unit=unit,
        of="run",
        axes="scorer",
        means=means,
        source=source,
        interval=interval,
        needs=_NEEDS,
        figure=Figure(kind="table", by="scorer", card="choices"),
    )


ACCURACY = _of_run(
    "accuracy_scorer",
    "share of tasks",
    "Tasks in which the scorer's choice among all candidates is right.",
    WILSON,
)
ACCURACY_TOOLS = _of_run(
    "accuracy_scorer_tools",
    "share of tasks",
    "Tasks in which the scorer's choice among the tools alone is right, of those in which some tool is.",
    WILSON,
)
AGREEMENT = _of_run(
    "scorer_agreement", "share of tasks", "Tasks in which the scorer chooses what `sum` chooses.", WILSON
)
AGREEMENT_TOOLS = _of_run(
    "scorer_agreement_tools",
    "share of tasks",
    "Tasks in which the scorer chooses what `sum` chooses, among the tools alone.",
    WILSON,
)
POSITION_BIAS = _of_run(
    "position_bias_scorer",
    "probability",
    "½ Σ |P_i − e_i| over slots of the scorer's choices among the tools in the order shown; e_i is the even share.",
    FOLDED,
    "Blankenstein et al. 2025",
)
TOOL_BIAS = _of_run(
    "tool_bias_scorer",
    "probability",
    "½ Σ |P_i − e_i| over tools of the scorer's choices among the tools in the order shown; e_i is the even share.",
    FOLDED,
    "Blankenstein et al. 2025",
)
CHANCE = {
    defined: _of_run(
        f"{defined.name}_chance",
        "probability",
        f"Mean of `{defined.name}` where the places of each task are exchanged at random: what chance alone gives.",
        "95 % of the exchanges",
    )
    for defined in (POSITION_BIAS, TOOL_BIAS)
}


def measures(run: Run) -> Iterator[Row | Grid]:
    """Probabilities of every task under every scorer, then what the scorers make of the run."""
    known = choices(run)
    if not known:
        return
    free, orders = (scores_by_task(run, name) for name in ("content_free", "order"))
    tables = []
    for case in known:
        more = free.get(case.id, ()), orders.get(case.id, ())
        both = scores(case, *more), scores(case, *more, tools_only=True)
        yield _task_rows(case, *both)
        tables.append((case, *both))
    for scorer in SCORERS:
        yield from _all_candidates(scorer, [(case, table) for case, table, _ in tables])
        yield from _among_tools(scorer, [(case, table) for case, _, table in tables])


def scores(
    case: Choice,
    free: Sequence[Scores] = (),
    orders: Sequence[Scores] = (),
    *,
    tools_only: bool = False,
) -> dict[str, np.ndarray]:
    """Score of every candidate, or of the tools alone, by scorer; [candidate], nats up to a constant.

    `free` and `orders` are the task's conditions of the experiments `content_free` and `order`.
    """
    kept = slice(case.n_tools) if tools_only else slice(None)
    log_probs = case.log_probs[kept]
    by_scorer = {DEFAULT: log_probs} | _by_token(case, kept)
    log_free = np.array([condition.log_probs[kept] for condition in free])
    if free:
        by_scorer["pmi"] = log_probs - log_free.mean(0)
        by_scorer["contextual_calibration"] = log_probs - _log(softmax(log_free).mean(0))
    if orders:
        by_scorer["orders"] = _log(
            softmax(np.array([condition.log_probs[kept] for condition in orders])).mean(0)
        )
    if free and orders:
        by_scorer["pmi_orders"] = by_scorer["orders"] - log_free.mean(0)
    return by_scorer


def _by_token(case: Choice, kept: slice) -> dict[str, np.ndarray]:
    if case.name_log_probs is None:
        return {}
    tokens, spoken = case.name_log_probs[kept], case.spoken[kept]
    nameless = spoken[-1] is None
    # A complement no-tool has no token; its log-probability takes the place of the first one.
    first = [case.opener + by_token[0] for by_token in tokens[: len(tokens) - nameless]]
    by_scorer = {"first_token": np.array([*first, *case.log_probs[-1:][: int(nameless)]])}
    if not nameless:
        total = np.array([sum(by_token) for by_token in tokens])
        by_scorer["mean_token"] = total / [len(by_token) for by_token in tokens]
        by_scorer["mean_byte"] = total / [len(str(name).encode()) for name in spoken]
    return by_scorer


def _log(p: np.ndarray) -> np.ndarray:
    """Retention finite where a probability is too small for a float64."""
    return np.log(np.maximum(p, np.finfo(np.float64).tiny))


# -- rows ------------------------------------------------------------------------------------------------------


def _task_rows(case: Choice, every: Mapping[str, np.ndarray], tools: Mapping[str, np.ndarray]) -> Grid:
    listed = [scorer for scorer in SCORERS if scorer in tools]
    values = np.full((len(listed), len(case.names)), np.nan)
    for row, scorer in enumerate(listed):
        scored = every.get(scorer, tools[scorer])
        values[row, : len(scored)] = softmax(scored)
    spans = [NO_TOOL if name is None else None for name in case.names]
    return PROBABILITY_SCORER.grid(case.id, values, {"scorer": listed}, {"tool": case.names, "span": spans})


_Tables = Sequence[tuple[Choice, Mapping[str, np.ndarray]]]


def _all_candidates(scorer: str, tables: _Tables) -> Iterator[Row]:
    chosen = [
        (case, picks(table[scorer]), picks(table[DEFAULT])) for case, table in tables if scorer in table
    ]
    if chosen:
        yield ACCURACY.share([pick @ case.is_right for case, pick, _ in chosen], scorer=scorer)
        if scorer != DEFAULT:
            yield AGREEMENT.share([pick @ usual for _, pick, usual in chosen], scorer=scorer)


def _among_tools(scorer: str, tables: _Tables) -> Iterator[Row]:
    chosen = [
        (case, picks(table[scorer]), picks(table[DEFAULT])) for case, table in tables if scorer in table
    ]
    hits = [pick @ case.is_right[:-1] for case, pick, _ in chosen if case.wants_tool]
    if hits:
        yield ACCURACY_TOOLS.share(hits, scorer=scorer)
    if chosen:
        if scorer != DEFAULT:
            yield AGREEMENT_TOOLS.share([pick @ usual for _, pick, usual in chosen], scorer=scorer)
        even = [(case, pick - 1 / case.n_tools) for case, pick, _ in chosen]
        slots = [{(case.n_tools, slot): gap for slot, gap in enumerate(gaps)} for case, gaps in even]
        yield from deviation(POSITION_BIAS, CHANCE[POSITION_BIAS], slots, scorer=scorer)
        tools = [dict(zip(case.names[:-1], gaps, strict=True)) for case, gaps in even]
        yield from deviation(TOOL_BIAS, CHANCE[TOOL_BIAS], tools, scorer=scorer)
