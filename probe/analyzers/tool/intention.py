"""P(action | state) = Σ_I P(action | I) P(I | state): the choice of a tool after an intention was stated.

The intention is written inside the same context and the action scored after it, so the sum over all intentions
is the law of total probability. Drawn intentions, I ~ P(I | state), give an unbiased mean of the conditional
vectors P(· | I) (not of drawn actions: Rao–Blackwell, whose variance is never larger). Enumerated intentions
give the exact sum over a set that holds `intention_mass` of the probability. `variant` says which: "drawn" or
"enumerated". Both answer another prompt than the direct choice does; `p_action_gap` says how far apart they are.

An interval from draws knows nothing of an intention that was never drawn: `intention_distinct` belongs beside it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probe.analyzers.rows import WHOLE_RUN, Grid, Row
from probe.analyzers.tool.conditions import Choice, read_conditions
from probe.maths.statistics import bootstrap_mean, js, log_softmax, wilson

if TYPE_CHECKING:
    from probe.runs import Run

DRAWN, ENUMERATED = "drawn", "enumerated"


class Estimate(NamedTuple):
    """A number with its 95 % interval, both None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


def measures(run: Run) -> Iterator[Row | Grid]:
    """Marginalised choices of every task that has intentions, then those of the run."""
    found = read_conditions(run, ["intention"])
    if found is None:
        return
    details = [json.loads(text) for text in found.facts["detail"]]
    texts = np.array([detail["text"] for detail in details], dtype=object)
    kinds = np.array([detail["kind"] for detail in details])
    weights = found.facts["weight"].to_numpy(dtype=np.float64, na_value=np.nan)
    verdicts: dict[str, list[_Verdict]] = defaultdict(list)
    for number, task in enumerate(found.tasks):
        n = len(task.names)
        direct = log_softmax(found.base[number, :n])
        for kind in (DRAWN, ENUMERATED):
            rows = np.flatnonzero((found.task == number) & (kinds == kind))
            rows = rows[~np.isnan(found.log_probs[rows, :n]).any(1)]
            if kind == ENUMERATED:
                rows = rows[np.unique(texts[rows].astype(str), return_index=True)[1]]
            if not len(rows) or (kind == ENUMERATED and np.isnan(weights[rows]).any()):
                continue
            conditional = np.exp(log_softmax(found.log_probs[rows, :n]))
            measured = _drawn if kind == DRAWN else _enumerated
            rest, verdict = measured(task, direct, conditional, weights[rows], texts[rows])
            verdicts[kind].append(verdict)
            yield from rest
    for kind, those in verdicts.items():
        yield from _whole_run(kind, those)


# -- estimators ----------------------------------------------------------------------------------------------------


def average(conditional: np.ndarray) -> list[Estimate]:
    """[intention, action] → by action, the mean over drawn intentions with Student's interval within [0, 1].

    The standard error is sd/√N; one draw has no interval.
    """
    n = len(conditional)
    mean = conditional.mean(0)
    if n < 2:
        return [Estimate(float(value)) for value in mean]
    half = _student(n) * conditional.std(0, ddof=1) / np.sqrt(n)
    return [
        Estimate(float(value), max(0.0, float(value - width)), min(1.0, float(value + width)))
        for value, width in zip(mean, half, strict=True)
    ]


def mutual_information(conditional: np.ndarray) -> Estimate:
    """I(I; A) = H(mean) − mean H of N drawn intentions' [intention, action] distributions, nats.

    H(mean) of few draws is too small, by about Σ_a Var(p̄_a)/2p̄_a, so the plain value is too small as well; see
    `corrected`.
    """
    own = _entropy(conditional)
    return corrected(lambda weights: _entropy(weights @ conditional) - weights @ own, len(conditional))


def gap(conditional: np.ndarray, direct: np.ndarray) -> Estimate:
    """Jensen–Shannon divergence between the mean of drawn [intention, action] and the direct distribution, nats.

    Noise in the mean makes the plain value too large; see `corrected`.
    """

    def divergence(weights: np.ndarray) -> np.ndarray:
        mean = weights @ conditional
        return _entropy((mean + direct) / 2) - (_entropy(mean) + _entropy(direct)) / 2

    return corrected(divergence, len(conditional))


def corrected(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> Estimate:
    """A statistic of the mean of n draws without its bias of order 1/n, by the jackknife (Quenouille 1956).

    `statistic` takes weights of the draws, [.., draw] with sum 1. The interval is Student's over the n pseudo-values
    (Tukey 1958): for 8 to 20 draws it covers more nearly 95 % than the bootstrap does. Nothing is cut at 0, so
    that a mean over tasks stays unbiased. One draw gives the plain value without an interval.
    """
    plain = float(statistic(np.full(n, 1 / n)))
    if n < 2:
        return Estimate(plain)
    pseudo = n * plain - (n - 1) * statistic((1 - np.eye(n)) / (n - 1))
    value, half = float(pseudo.mean()), float(_student(n) * pseudo.std(ddof=1) / np.sqrt(n))
    return Estimate(value, value - half, value + half)


def _student(n: int) -> float:
    import scipy.stats

    return float(scipy.stats.t.ppf(0.975, n - 1))


def _entropy(p: np.ndarray) -> np.ndarray:
    """Over the last axis, nats; 0 log 0 is 0."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


# -- one task ------------------------------------------------------------------------------------------------------


class _Verdict(NamedTuple):
    """What one task says about the run."""

    right: bool
    direct_right: bool
    same: bool
    """The marginalised and the direct choice agree."""
    gap: float
    information: float


def _drawn(
    task: Choice, direct: np.ndarray, conditional: np.ndarray, weights: np.ndarray, texts: np.ndarray
) -> tuple[list[Row], _Verdict]:
    n, distinct = len(conditional), len(set(texts.tolist()))
    information, apart = mutual_information(conditional), gap(conditional, np.exp(direct))
    rows = [
        *_by_candidate(task, average(conditional), n, DRAWN),
        _row(task.id, "p_action_gap", apart, "nats", n, DRAWN),
        _row(task.id, "intention_information", information, "nats", n, DRAWN),
        _row(task.id, "intention_distinct", Estimate(distinct), "intentions", n, DRAWN),
    ]
    if not np.isnan(weights).any():
        # −log P(I | state) of a draw has the entropy as its mean, whatever the number of possible intentions.
        half = _student(n) * weights.std(ddof=1) / np.sqrt(n) if n > 1 else None
        value = float(-weights.mean())
        found = Estimate(value) if half is None else Estimate(value, float(value - half), float(value + half))
        rows.append(_row(task.id, "intention_entropy", found, "nats", n, DRAWN))
    return rows, _verdict(task, direct, conditional.mean(0), apart.value, information.value)


def _enumerated(
    task: Choice, direct: np.ndarray, conditional: np.ndarray, weights: np.ndarray, texts: np.ndarray
) -> tuple[list[Row], _Verdict]:
    """The sum over the enumerated set, exact within it: no interval. Each text counts once."""
    n = len(conditional)
    share = np.exp(log_softmax(weights))
    p = share @ conditional
    information = float(_entropy(p) - share @ _entropy(conditional))
    with np.errstate(divide="ignore"):
        apart = js(np.log(p), direct)
    numbers = {
        "p_action_gap": (apart, "nats"),
        "intention_information": (information, "nats"),
        "intention_entropy": (float(_entropy(share)), "nats"),
        "intention_mass": (float(np.exp(weights).sum()), "probability"),
        "intention_distinct": (n, "intentions"),
    }
    rows = _by_candidate(task, [Estimate(float(value)) for value in p], n, ENUMERATED)
    rows += [_row(task.id, name, Estimate(x), unit, n, ENUMERATED) for name, (x, unit) in numbers.items()]
    return rows, _verdict(task, direct, p, apart, information)


def _verdict(task: Choice, direct: np.ndarray, p: np.ndarray, apart: float, information: float) -> _Verdict:
    chosen, before = task.names[int(p.argmax())], task.names[int(direct.argmax())]
    return _Verdict(chosen in task.right, before in task.right, chosen == before, apart, information)


def _by_candidate(task: Choice, found: list[Estimate], n: int, kind: str) -> list[Row]:
    from probe.prompts.labels import NO_TOOL

    return [
        _row(
            task.id,
            "p_action_given_state",
            estimate,
            "probability",
            n,
            kind,
            tool=name,
            span=NO_TOOL if name is None else None,
        )
        for name, estimate in zip(task.names, found, strict=True)
    ]


# -- the run -------------------------------------------------------------------------------------------------------


def _whole_run(kind: str, verdicts: list[_Verdict]) -> Iterator[Row]:
    """Shares of tasks: the marginalised choice is right, the direct one is on the same tasks, both agree."""
    n = len(verdicts)
    shares = {
        "p_action_accuracy": [v.right for v in verdicts],
        "p_action_accuracy_direct": [v.direct_right for v in verdicts],
        "p_action_agreement": [v.same for v in verdicts],
    }
    for name, hits in shares.items():
        share = sum(hits) / n
        yield _row(WHOLE_RUN, name, Estimate(share, *wilson(share, n)), "share of tasks", n, kind)
    means = {
        "p_action_gap": [v.gap for v in verdicts],
        "intention_information": [v.information for v in verdicts],
    }
    for name, values in means.items():
        low, high = bootstrap_mean(values) or (None, None)
        yield _row(WHOLE_RUN, name, Estimate(float(np.mean(values)), low, high), "nats", n, kind)


def _row(
    task_id: str,
    name: str,
    found: Estimate,
    unit: str,
    n: int,
    kind: str,
    tool: str | None = None,
    span: str | None = None,
) -> Row:
    return Row(
        task_id=task_id,
        analyzer="tool",
        name=name,
        value=found.value,
        unit=unit,
        n=n,
        low=found.low,
        high=found.high,
        span=span,
        tool=tool,
        variant=kind,
    )
