"""Two numbers of each task, before and after: intervals and tests of the mean difference. All are deterministic."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from probe.maths.intervals import SEED, Interval, mean_interval

EXACT_TASKS = 13
"""Tasks up to which every exchange of signs is made; of more, EXCHANGES are drawn."""
EXCHANGES = 9999
_Z = 1.959963984540054
_BLOCK = 1 << 20  # signs held at a time


def is_right_or_wrong(first: ArrayLike, second: ArrayLike) -> bool:
    """Whether all numbers of both are 0 or 1."""
    return bool(np.isin(np.concatenate([np.asarray(first), np.asarray(second)]), (0.0, 1.0)).all())


def difference_interval(first: ArrayLike, second: ArrayLike) -> Interval | None:
    """95 % interval of the mean of second − first over tasks, [task] each.

    Where all are 0 or 1, that of Bonett and Price (2012) for paired shares: Wald's with one task more in both cells in
    which the two differ. Else Hall's t (`mean_interval`), None below eight tasks or without spread.
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if not is_right_or_wrong(before, after):
        return mean_interval(after - before)
    n = len(before) + 2
    gained, lost = ((after > before).sum() + 1) / n, ((after < before).sum() + 1) / n
    half = _Z * math.sqrt((gained + lost - (gained - lost) ** 2) / n)
    return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)


def difference_p(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p-value of no difference between two numbers of each task.

    Where all are 0 or 1, McNemar's exact test: the binomial law of the tasks that changed. Else the share of exchanges
    of the two within tasks whose mean difference is as far from 0 (Fisher 1935, section 21), all of them up to
    EXACT_TASKS tasks that differ. 1 where none differs.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    difference = difference[difference != 0]
    n = len(difference)
    if n == 0:
        return 1.0
    if is_right_or_wrong(first, second):
        import scipy.stats

        return float(scipy.stats.binomtest(int((difference > 0).sum()), n).pvalue)
    # Exchanges of rounding apart are as far from 0 as the observed one.
    least = abs(difference.sum()) * (1 - 1e-12)
    far = total = 0
    for signs in _signs(n):
        far, total = far + int((np.abs(signs @ difference) >= least).sum()), total + len(signs)
    return far / total if n <= EXACT_TASKS else (far + 1) / (total + 1)


def _signs(n: int) -> Iterator[np.ndarray]:
    """Blocks of [exchange, task] of 1 and −1: all of them, or EXCHANGES that are drawn, the same at every call."""
    if n <= EXACT_TASKS:
        yield 1.0 - 2.0 * (np.arange(1 << n)[:, None] >> np.arange(n) & 1)
        return
    generator = np.random.default_rng(SEED)
    rows = max(1, _BLOCK // n)
    for start in range(0, EXCHANGES, rows):
        yield 1.0 - 2.0 * generator.integers(2, size=(min(rows, EXCHANGES - start), n), dtype=np.int8)
