"""AUROC: of pairs within tasks, how often a target outranks another candidate; of tasks, how often one that is positive
outranks one that is not."""

from __future__ import annotations

import numpy as np

from probe.maths.intervals import Interval, share_interval

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


def auroc_interval(value: float, n_positive: int, n_other: int, widening: float = 1.0) -> Interval | None:
    """95 % interval of an AUROC of independent tasks (Newcombe 2006, part 2, method 5).

    The ends are where the distance to the estimate is 1.96 of the standard errors that hold there, so that an AUROC of 1
    has an interval too. `widening` multiplies the variance. None below LEAST_GROUP tasks of either kind.
    """
    from scipy.optimize import root_scalar

    if min(n_positive, n_other) < LEAST_GROUP:
        return None
    half = (n_positive + n_other) / 2 - 1

    def beyond(area: float) -> float:
        """Squared distance from the estimate less that of 1.96 standard errors."""
        shape = 1 + half * (1 - area) / (2 - area) + half * area / (1 + area)
        return (area - value) ** 2 - _Z2 * widening * area * (1 - area) * shape / (n_positive * n_other)

    # At 0 and 1 both sides vanish: the other root is looked for.
    low = 0.0 if value <= 0 else root_scalar(beyond, bracket=(0, min(value, 1 - 1e-9))).root
    high = 1.0 if value >= 1 else root_scalar(beyond, bracket=(max(value, 1e-9), 1)).root
    return float(low), float(high)
