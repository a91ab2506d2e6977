"""Rows over all tasks of a run: shares, means and deviations from an even choice, each with its interval.

Intervals of means and deviations are bootstraps over tasks. A deviation is never negative, so that of few tasks is too
large, and so are both ends of its interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from probe.analyzers.registry import Measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.statistics import bootstrap

ORDER_STATISTICS = "at least 95 %, between two order statistics; six tasks are the fewest"


def median(measure: Measure, values: ArrayLike, **place: Any) -> Row:
    """Median over tasks with the binomial interval between two of its order statistics (Conover 1999, section 3.2)."""
    from scipy.stats import quantile_test

    data = np.asarray(values, dtype=np.float64)
    low, high = quantile_test(data, q=0, p=0.5).confidence_interval(0.95)
    interval = None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
    return measure.row(WHOLE_RUN, np.median(data), n=len(data), interval=interval, **place)


def deviation(measure: Measure, tasks: Iterable[Mapping[Any, float]], **place: Any) -> Row:
    """½ Σ_i |P_i − e_i| of the mean over tasks: δ of BiasBusters (Blankenstein et al. 2025) where e_i = 1/K.

    A task is its share of the choice minus the even share, P − 1/K, by place (a slot, a tool); places that a
    task does not show are left out. With places that differ between tasks e_i is the mean even share, so δ is
    the mean of the groups' δ, weighted by their tasks, where groups share no place.
    """
    from scipy.sparse import coo_array

    tasks = list(tasks)
    places = {key: column for column, key in enumerate(dict.fromkeys(key for t in tasks for key in t))}
    entries = [(row, places[key], gap) for row, task in enumerate(tasks) for key, gap in task.items()]
    rows, columns, gaps = zip(*entries, strict=True)
    table = coo_array((gaps, (rows, columns)), shape=(len(tasks), len(places))).tocsr()
    value = np.abs(table.sum(0)).sum() / len(tasks) / 2
    interval = bootstrap(lambda counts: np.abs(table.T @ counts.T).sum(0) / len(tasks) / 2, len(tasks))
    return measure.row(WHOLE_RUN, value, n=len(tasks), interval=interval, **place)
