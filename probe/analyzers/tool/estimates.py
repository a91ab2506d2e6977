"""Rows over all tasks of a run: shares, means and deviations from an even choice, each with its interval.

A deviation is never negative, so that of few tasks is too large: its interval begins at 0 where noise alone gives as
much, and beside it stands what exchanging the places within each task gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from probe.analyzers.registry import Measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import LEAST_FOLDED, SEED, folded_interval, percentiles

EXCHANGES = 999
ORDER_STATISTICS = "at least 95 %, between two order statistics; six tasks are the fewest"


def median(measure: Measure, values: ArrayLike, **place: Any) -> Row:
    """Median over tasks with the binomial interval between two of its order statistics (Conover 1999, section 3.2)."""
    from scipy.stats import quantile_test

    data = np.asarray(values, dtype=np.float64)
    low, high = quantile_test(data, q=0, p=0.5).confidence_interval(0.95)
    interval = None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
    return measure.row(WHOLE_RUN, np.median(data), n=len(data), interval=interval, **place)


def half_sum(mean: np.ndarray) -> np.ndarray:
    """½ Σ_i |·| over the last axis."""
    return np.abs(mean).sum(-1) / 2


def deviation(
    measure: Measure, chance: Measure, tasks: Iterable[Mapping[Any, float]], **place: Any
) -> Iterator[Row]:
    """½ Σ_i |P_i − e_i| of the mean over tasks: δ of BiasBusters (Blankenstein et al. 2025) where e_i = 1/K; and the
    row of `chance`, the same where each task's places are exchanged at random.

    A task is its share of the choice minus the even share, P − 1/K, by place (a slot, a tool); places that a
    task does not show are left out. With places that differ between tasks e_i is the mean even share, so δ is
    the mean of the groups' δ, weighted by their tasks, where groups share no place.
    """
    tasks = list(tasks)
    column = {key: index for index, key in enumerate(dict.fromkeys(key for t in tasks for key in t))}
    gaps = np.zeros((len(tasks), len(column)))
    for row, task in enumerate(tasks):
        for key, gap in task.items():
            gaps[row, column[key]] = gap
    n = len(tasks)
    value = float(half_sum(gaps.mean(0)))
    yield measure.row(WHOLE_RUN, value, n=n, interval=folded_interval(gaps, half_sum), **place)
    if n >= LEAST_FOLDED:
        exchanged = _exchanged([[column[key] for key in task] for task in tasks], gaps)
        yield chance.row(WHOLE_RUN, exchanged.mean(), n=n, interval=percentiles(exchanged), **place)


def _exchanged(shown: Sequence[Sequence[int]], gaps: np.ndarray) -> np.ndarray:
    """[exchange]: the deviation where the gaps of each task are exchanged among the places that it shows."""
    generator = np.random.default_rng(SEED)
    sums = np.zeros((EXCHANGES, gaps.shape[1]))
    for places, of_task in zip(shown, gaps, strict=True):
        sums[:, places] += generator.permuted(np.tile(of_task[places], (EXCHANGES, 1)), axis=1)
    return half_sum(sums / len(gaps))
