"""95 % intervals of what is estimated over tasks, or over draws. Every function is deterministic.

Two numbers of a task are not independent, so the unit is the task: ratios, shares and correlations are over clusters.
Each kind of estimate has the interval that came nearest to holding its true value in 95 % of simulated samples of the
sizes at which it is given: most hold it in 93 to 97 %, some in 89 to 93 % (docs/intervals.md names them, tests/coverage.py
simulates). Below those sizes there is none, and None stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Interval = tuple[float, float]
LEAST = 8
"""Tasks or draws below which a mean has no interval."""
LEAST_RANKS = 20
"""Tasks below which a rank correlation has none."""
LEAST_FOLDED = 20
"""Tasks below which a number that cannot be negative, and is lifted by noise, has none."""
RESAMPLES = 1999
SEED = 0
_Z = 1.959963984540054
_BLOCK = 1 << 22  # counts held at a time
_FLAT = 1e-9  # relative spread below which values are one number but for rounding


class Estimate(NamedTuple):
    """A number with its 95 % interval; None where there is none."""

    value: float
    interval: Interval | None = None


# -- shares --------------------------------------------------------------------------------------------------------


def wilson(share: float, n: float, z: float = _Z) -> Interval:
    """95 % score interval of a share of n tasks (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The ends of 0 and 1 are exact; rounding alone would leave 1e-17.
    return 0.0 if share == 0 else max(0.0, centre - half), 1.0 if share == 1 else min(1.0, centre + half)


def share_difference(first: float, n_first: int, second: float, n_second: int) -> Interval:
    """95 % interval of a difference of two independent shares, from their score intervals (Newcombe 1998, method
    10)."""
    low, high = wilson(first, n_first)
    other_low, other_high = wilson(second, n_second)
    gap = first - second
    return (
        gap - math.hypot(first - low, other_high - second),
        gap + math.hypot(high - first, second - other_low),
    )


def share_ratio(hits: float, n: float, other_hits: float, n_other: float) -> Interval | None:
    """95 % interval of a ratio of two independent shares, log-normal (Katz et al. 1978); None without a hit on either side."""
    if hits <= 0 or other_hits <= 0:
        return None
    ratio = hits / n / (other_hits / n_other)
    half = _Z * math.sqrt(max(0.0, 1 / hits - 1 / n + 1 / other_hits - 1 / n_other))
    return ratio * math.exp(-half), ratio * math.exp(half)


def share_interval(parts: ArrayLike, wholes: ArrayLike | None = None, family: int = 1) -> Interval | None:
    """Interval of Σ parts / Σ wholes, a share of what the tasks hold: 0 ≤ parts ≤ wholes, by task; wholes are 1 if absent.

    Wilson's with the number of tasks where each is a hit or none, else with the number of independent hits that would
    vary as much, corrected for the degrees of freedom (Korn and Graubard 1998); None then below LEAST tasks. With
    `family` it is one of so many that hold their shares all together (Bonferroni).
    """
    hits = np.asarray(parts, dtype=np.float64)
    n = len(hits)
    sizes = np.ones(n) if wholes is None else np.asarray(wholes, dtype=np.float64)
    total = sizes.sum()
    if total <= 0:
        return None
    share = float(min(1.0, max(0.0, hits.sum() / total)))
    z = _normal(family)
    if (sizes == sizes[0]).all() and np.isin(hits, (0.0, sizes[0])).all():
        return wilson(share, n, z)
    if n < LEAST:
        return None
    variance = np.square(hits - share * sizes).sum() / total**2 * n / (n - 1)
    if variance <= _FLAT**2 or not 0 < share < 1:
        return wilson(share, n, z)
    return wilson(share, share * (1 - share) / variance * (z / _student(n, family)) ** 2, z)


# -- means and ratios ----------------------------------------------------------------------------------------------


def mean_interval(values: ArrayLike, family: int = 1) -> Interval | None:
    """Interval of a mean over tasks: Student's t behind a transformation that takes off skewness (Hall 1992).

    None below LEAST tasks, for values that are not finite, and for values without spread, which tell nothing of it.
    With `family` it is one of so many that hold their means all together (Bonferroni).
    """
    data = np.asarray(values, dtype=np.float64)
    return ratio_interval(data, np.ones(len(data)), family)


def ratio_interval(above: ArrayLike, below: ArrayLike, family: int = 1) -> Interval | None:
    """Interval of Σ above / Σ below over tasks, as that of a mean of the linearised ratio; see `mean_interval`."""
    parts, wholes = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    n = len(parts)
    if n < LEAST or not (np.isfinite(parts).all() and np.isfinite(wholes).all()) or wholes.sum() == 0:
        return None
    value = parts.sum() / wholes.sum()
    # Residuals of the jackknife: a task that weighs much draws the ratio to itself.
    weight = 1 - wholes / wholes.sum()
    if (weight <= 0).any():
        return None
    return _hall(float(value), (parts - value * wholes) / wholes.mean() / weight * (1 - 1 / n), family)


def welch_interval(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> Interval | None:
    """Interval of a difference of two independent ratios Σ above / Σ below, given as (above, below): Welch's t (1947)
    on the linearised ratios. None where either has fewer than LEAST."""
    import scipy.stats

    if min(len(first[0]), len(second[0])) < LEAST:
        return None
    gap, squares = 0.0, []
    for sign, (above, below) in zip((1, -1), (first, second), strict=True):
        value, n = above.sum() / below.sum(), len(above)
        gap += sign * float(value)
        squares.append((float(((above - value * below) / below.mean()).var(ddof=1)) / n, n - 1))
    error = sum(square for square, _ in squares)
    if error == 0:
        return None
    freedom = error**2 / sum(square**2 / df for square, df in squares)
    half = float(scipy.stats.t.ppf(0.975, freedom)) * math.sqrt(error)
    return gap - half, gap + half


def _hall(value: float, residuals: np.ndarray, family: int) -> Interval | None:
    """Interval of an estimate whose error is the mean of such residuals."""
    n = len(residuals)
    largest = float(np.abs(residuals).max())
    if largest <= _FLAT * abs(value):
        return None
    # In units of the largest: powers of what a confident model leaves, 1e-128, are 0.
    residuals = residuals / largest
    spread = math.sqrt(float(np.square(residuals).sum()) / (n - 1))
    skew = float(np.mean(residuals**3)) / spread**3
    spread *= largest

    def error(quantile: float) -> float:
        """(estimate − truth) / spread, from g(T) = T + γT²/3 + γ²T³/27 + γ/6n, which is nearly normal."""
        shifted = quantile / math.sqrt(n) - skew / (6 * n)
        return 3 / skew * (float(np.cbrt(1 + skew * shifted)) - 1) if abs(skew) > 1e-6 else shifted

    half = _student(n, family)
    return value - spread * error(half), value - spread * error(-half)


def jackknife(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> Estimate:
    """A statistic of n tasks or draws without its bias of order 1/n (Quenouille 1956), with Student's interval over
    the pseudo-values (Tukey 1958), none below LEAST.

    `statistic` takes weights [.., n] that sum to 1. It is left without 1 of the n at a time, never with one twice: a
    mean over pairs keeps its meaning. Nothing is cut at 0, so that a mean over tasks stays unbiased.
    """
    plain = float(statistic(np.full(n, 1 / n)))
    return jackknifed(plain, statistic((1 - np.eye(n)) / (n - 1))) if n > 1 else Estimate(plain)


def jackknifed(plain: float, left_out: np.ndarray) -> Estimate:
    """The same of a statistic that is `plain` over all n tasks, and left_out [n] without each of them: for many tasks, where
    weights [n, n] would be gigabytes."""
    n = len(left_out)
    if n < 2:
        return Estimate(plain)
    pseudo = n * plain - (n - 1) * left_out
    value, spread = float(pseudo.mean()), float(pseudo.std(ddof=1))
    if n < LEAST or spread <= _FLAT * np.abs(pseudo).max():
        return Estimate(value)
    half = _student(n) * spread / math.sqrt(n)
    return Estimate(value, (value - half, value + half))


# -- folded statistics ---------------------------------------------------------------------------------------------


def folded_interval(gaps: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
    """Interval of statistic(mean over tasks of `gaps` [task, place]) that cannot be negative and is 0 at 0, such as Σ|·|.

    Noise alone makes such a number large, so resampling about the estimate never holds 0. Here the truth is any multiple
    λ ≥ 0 of the estimated vector: the interval holds each whose noise (resampled residuals) gives the observed number
    within its middle 95 %, a test turned into an interval. It begins at 0 where noise alone gives as much, and may lie
    below the number. None below LEAST_FOLDED tasks. `statistic` takes [.., place] and grows with λ.
    """
    n = len(gaps)
    if n < LEAST_FOLDED:
        return None
    mean = gaps.mean(0)
    value = float(statistic(mean))
    centred = gaps - mean
    if np.abs(centred).max() <= _FLAT * max(1.0, float(np.abs(mean).max())):
        return None
    noise = replicates(lambda counts: counts @ centred, n) / math.sqrt(n * (n - 1)) * _student(n) / _Z
    if value <= _FLAT:
        return 0.0, float(np.quantile(statistic(noise), 0.975))

    def multiple(level: float) -> float:
        """The λ whose quantile is the observed number; 0 where that of noise alone is beyond it."""
        low, high = 0.0, 4.0
        if np.quantile(statistic(noise), level) >= value:
            return 0.0
        for _ in range(14):
            middle = (low + high) / 2
            below = np.quantile(statistic(noise + middle * mean), level) < value
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2

    return multiple(0.975) * value, (multiple(0.025) or 1.0) * value


# -- resampling ----------------------------------------------------------------------------------------------------


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, least: int = LEAST_RANKS
) -> Interval | None:
    """95 % percentile interval (Efron 1979) of a statistic of n clusters; see `replicates`.

    Resamples in which it is not defined (NaN) are left out. None for fewer than `least` clusters, or where no resample
    has a number.
    """
    values = replicates(statistic, n) if n >= max(2, least) else np.empty(0)
    values = values[~np.isnan(values)]
    return percentiles(values) if len(values) else None


def replicates(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> np.ndarray:
    """[resample, …]: a statistic of n clusters, drawn n at a time with replacement, the same at every call.

    `statistic` takes how often each cluster was drawn, [resample, cluster] float64 with rows that sum to n, and
    gives a number for each resample; it is called with some of the resamples at a time.
    """
    return np.concatenate([statistic(counts) for counts in _resampled(n)])


def percentiles(values: np.ndarray) -> Interval:
    """The 95 % in the middle."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resampled(n: int) -> Iterator[np.ndarray]:
    """Blocks of [resample, cluster] counts, `RESAMPLES` rows in all."""
    rows = max(1, _BLOCK // n)
    if rows >= RESAMPLES:
        yield _kept(n)
        return
    generator = np.random.default_rng(SEED)
    for start in range(0, RESAMPLES, rows):
        yield _draw(generator, n, min(rows, RESAMPLES - start))


@lru_cache(
    maxsize=2
)  # an analyzer has dozens of measures over the same tasks, and drawing takes most of the time
def _kept(n: int) -> np.ndarray:
    counts = _draw(np.random.default_rng(SEED), n, RESAMPLES)
    counts.flags.writeable = False
    return counts


def _draw(generator: np.random.Generator, n: int, rows: int) -> np.ndarray:
    drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


# -- quantiles -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _student(n: int, family: int = 1) -> float:
    import scipy.stats

    return float(scipy.stats.t.ppf(1 - 0.025 / family, n - 1))


@lru_cache(maxsize=16)
def _normal(family: int) -> float:
    if family == 1:
        return _Z
    import scipy.stats

    return float(scipy.stats.norm.ppf(1 - 0.025 / family))
