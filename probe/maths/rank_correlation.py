"""Spearman's rank correlation over clustered pairs, pooled and within clusters, each with its interval."""

from __future__ import annotations

import numpy as np

from probe.maths.intervals import Estimate, bootstrap

_BLOCK = 1 << 19  # weights of a resample held at a time


def spearman(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """Spearman's ρ (average ranks for ties) with its 95 % bootstrap interval over groups, from LEAST_RANKS groups on.

    `groups`: [value] 0-based cluster of each value. None where ρ is not defined.
    """
    value = _correlation(x, y, np.ones((1, len(x))))[0] if len(x) > 1 else np.nan
    if np.isnan(value):
        return None
    rows = max(1, _BLOCK // len(x))

    def resampled(counts: np.ndarray) -> np.ndarray:
        starts = range(0, len(counts), rows)
        return np.concatenate([_correlation(x, y, counts[i : i + rows, groups]) for i in starts])

    return Estimate(float(value), bootstrap(resampled, int(groups.max()) + 1))


def spearman_within(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> Estimate | None:
    """The correlation of ranks within groups, centred on each group's mean; else as `spearman`."""
    import pandas as pd

    ranks = pd.DataFrame({"x": x, "y": y}).groupby(groups).rank()
    ranks -= ranks.groupby(groups).transform("mean")
    sums = [np.bincount(groups, weights=ranks[a] * ranks[b]) for a, b in (("x", "y"), ("x", "x"), ("y", "y"))]
    value = _ratio(*(s.sum()[None] for s in sums))[0]
    if np.isnan(value):
        return None
    return Estimate(float(value), bootstrap(lambda counts: _ratio(*(counts @ s for s in sums)), len(sums[0])))


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[resample]: Pearson's correlation of the ranks that x and y have when value i is there weights[:, i] times."""
    n = weights.sum(1)
    a, b = (_ranks(values, weights) - ((n + 1) / 2)[:, None] for values in (x, y))
    return _ratio((weights * a * b).sum(1), (weights * a * a).sum(1), (weights * b * b).sum(1))


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[resample, value]: average ranks of a resample, from one sort of the values: cumulated weights are ranks."""
    order = np.argsort(values, kind="stable")
    new = np.concatenate([[True], np.diff(values[order]) > 0])
    tied = weights[:, order]
    if not new.all():
        tied = np.add.reduceat(tied, np.flatnonzero(new), axis=1)
    ranks = np.cumsum(tied, axis=1) - (tied - 1) / 2
    place = np.empty(len(values), dtype=np.int64)
    place[order] = np.cumsum(new) - 1
    return ranks[:, place]


def _ratio(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    size = np.sqrt(xx * yy)
    return np.divide(xy, size, out=np.full(np.shape(xy), np.nan), where=size > 0)
