"""Intervals for estimates, log-odds, and distances between distributions. Every function is deterministic.

There is one bootstrap: percentiles over `RESAMPLES` resamples of the clusters (tasks, as a rule) with one seed.

Distributions come as float64 log-probabilities in nats over the last axis, as `log_softmax` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1999
SEED = 0
_BLOCK = 1 << 22  # counts held at a time


def wilson(share: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """95 % score interval of a share of n tasks (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_difference(first: float, n_first: int, second: float, n_second: int) -> tuple[float, float]:
    """95 % interval of a difference of two independent shares, from their score intervals (Newcombe 1998, method
    10)."""
    low, high = wilson(first, n_first)
    other_low, other_high = wilson(second, n_second)
    gap = first - second
    return (
        gap - math.hypot(first - low, other_high - second),
        gap + math.hypot(high - first, second - other_low),
    )


class Estimate(NamedTuple):
    """A number with its 95 % interval; None where there is none."""

    value: float
    interval: tuple[float, float] | None = None


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> tuple[float, float] | None:
    """95 % percentile interval (Efron 1979) of a statistic of n clusters; see `replicates`.

    Resamples in which it is not defined (NaN) are left out. None for fewer than two clusters, or where no resample
    has a number.
    """
    values = replicates(statistic, n) if n > 1 else np.empty(0)
    values = values[~np.isnan(values)]
    return percentiles(values) if len(values) else None


def replicates(statistic: Callable[[np.ndarray], np.ndarray], n: int) -> np.ndarray:
    """[resample]: a statistic of n clusters, drawn n at a time with replacement, the same at every call.

    `statistic` takes how often each cluster was drawn, [resample, cluster] float64 with rows that sum to n, and
    gives a number for each resample; it is called with some of the resamples at a time.
    """
    return np.concatenate([statistic(counts) for counts in _resampled(n)])


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 95 % in the middle."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(values: ArrayLike) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over tasks; None for fewer than two.

    Too narrow for few tasks, as every percentile interval is. By simulation it holds the mean of a normal law in 92 %
    of samples of 20 tasks and 94 % of samples of 60, of an exponential law in 90 % and 94 %, a share of 0.9 in 88 %
    and 95 % (shares have `wilson`). `n` belongs beside it.
    """
    data = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda counts: counts @ data / len(data), len(data))


def bootstrap_ratio(above: ArrayLike, below: ArrayLike) -> tuple[float, float] | None:
    """95 % bootstrap interval of Σ above / Σ below over tasks, of resamples whose Σ below is positive."""
    parts, wholes = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)

    def ratio(counts: np.ndarray) -> np.ndarray:
        whole = counts @ wholes
        return np.divide(counts @ parts, whole, out=np.full(len(whole), np.nan), where=whole > 0)

    return bootstrap(ratio, len(parts))


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


def log_odds(log_probs: ArrayLike, target: ArrayLike) -> np.ndarray:
    """log Σ_target p − log Σ_others p over the last axis, nats; `target` is a mask that broadcasts.

    NaN among the log-probabilities is an absent candidate; the result is NaN where either side has none. The
    others are summed and not had as 1 − p, so that the odds stay exact where p is nearly 1.
    """
    scores, mask = np.broadcast_arrays(
        np.asarray(log_probs, dtype=np.float64), np.asarray(target, dtype=bool)
    )
    scores = np.where(np.isnan(scores), -np.inf, scores)
    sides = [np.logaddexp.reduce(np.where(side, scores, -np.inf), axis=-1) for side in (mask, ~mask)]
    with np.errstate(invalid="ignore"):
        odds = sides[0] - sides[1]
    return np.where(np.isfinite(odds), odds, np.nan)


def log_complement(log_p: float) -> float:
    """log(1 − p) from log p, nats; p is a float32 and 1 only in rounding, so that the result is finite."""
    return math.log(-math.expm1(min(log_p, -1e-9)))


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """Log-probabilities in float64, shifted by the maximum before the exponential."""
    scores = np.asarray(logits, dtype=np.float64)
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def entropy(log_p: np.ndarray) -> float:
    """−Σ p log p, nats; 0 log 0 is 0."""
    p = np.exp(log_p)
    return float(-np.sum(p * np.where(p > 0, log_p, 0.0)))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p‖q) = Σ p log(p/q), nats; infinite where p has mass that q has not."""
    p = np.exp(log_p)
    support = p > 0
    return max(0.0, float(np.sum(p[support] * (log_p[support] - log_q[support]))))


def js(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Jensen–Shannon divergence ½KL(p‖m) + ½KL(q‖m), m = ½(p+q), nats: 0 to ln 2. Not its square root."""
    log_m = np.logaddexp(log_p, log_q) - math.log(2)
    return (kl(log_p, log_m) + kl(log_q, log_m)) / 2


def tv(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Total variation ½ Σ |p − q|: 0 to 1."""
    return float(np.abs(np.exp(log_p) - np.exp(log_q)).sum() / 2)
