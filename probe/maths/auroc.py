"""AUROC: of pairs within tasks, how often a target outranks another candidate; of tasks, how often one that is positive
outranks one that is not."""

from __future__ import annotations

import numpy as np

from probe.maths.intervals import Estimate, Interval, share_interval

LEAST_GROUP = 5
"""Tasks of a kind below which the AUROC between two kinds has no interval."""
_Z2 = 1.959963984540054**2


def pair_wins(n_tools: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[row, head]: how many other tools of its task each tool outranks, ties ½. `n_tools` [task]."""
    out = np.empty(scores.shape)
    starts = np.concatenate([[0], np.cumsum(n_tools)])
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows, columns = scores[start:stop, None], scores[None, start:stop]
        out[start:stop] = (rows > columns).sum(1) + ((rows == columns).sum(1) - 1) / 2
    return out


def pooled_auroc(wins: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, list[Interval | None]]:
    """Σ wins / Σ pairs [head] of wins [task, head], and the intervals that hold all heads together."""
    intervals = [share_interval(column, pairs, family=wins.shape[1]) for column in wins.T]
    return wins.sum(0) / pairs.sum(), intervals


def mann_whitney(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """[column]: pairs of a positive and another row that the positive outranks, ties ½; both [row, column]."""
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=0)
    n = positive.sum(0)
    return (ranks * positive).sum(0) - n * (n + 1) / 2


def auroc(scores: np.ndarray, positive: np.ndarray) -> Estimate | None:
    """P(a positive has a higher score than another), ties ½, over independent tasks; [task] each. None where all are of a kind.

    Its interval is that of `auroc_interval`, widened where the placements of the tasks vary more (DeLong et al. 1988) than
    is assumed there, as they do where the two kinds are spread unlike.
    """
    from scipy.stats import rankdata

    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return None
    ranks = rankdata(scores)
    inside = [(ranks[kind] - rankdata(scores[kind])) / size for kind, size in ((positive, n), (~positive, m))]
    value = float(inside[0].mean())
    widening = 1.0
    if min(m, n) > 1 and (expected := _variance(value, m, n)) > 0:
        widening = max(1.0, float(inside[0].var(ddof=1) / m + inside[1].var(ddof=1) / n) / expected)
    return Estimate(value, auroc_interval(value, m, n, widening))


def _variance(area: float, m: int, n: int) -> float:
    """Variance of an AUROC between m and n tasks of exponential laws, with the mean of m and n in the terms of pairs that
    share a task."""
    half = (m + n) / 2 - 1
    return area * (1 - area) * (1 + half * (1 - area) / (2 - area) + half * area / (1 + area)) / (m * n)


def auroc_interval(value: float, n_positive: int, n_other: int, widening: float = 1.0) -> Interval | None:
    """95 % interval of an AUROC of independent tasks (Newcombe 2006, part 2, method 5).

    The ends are where the distance to the estimate is 1.96 of the standard errors that hold there, so that an AUROC of 1
    has an interval too. `widening` multiplies the variance. None below LEAST_GROUP tasks of either kind.
    """
    from scipy.optimize import root_scalar

    if min(n_positive, n_other) < LEAST_GROUP:
        return None

    def beyond(area: float) -> float:
        """Squared distance from the estimate less that of 1.96 standard errors."""
        return (area - value) ** 2 - _Z2 * widening * _variance(area, n_positive, n_other)

    # At 0 and 1 both sides vanish: the other root is looked for.
    low = 0.0 if value <= 0 else root_scalar(beyond, bracket=(0, min(value, 1 - 1e-9))).root
    high = 1.0 if value >= 1 else root_scalar(beyond, bracket=(max(value, 1e-9), 1)).root
    return float(low), float(high)
