"""Intervals for estimates, and distances between distributions. Every function is deterministic.

Distributions come as float64 log-probabilities in nats over the last axis, as `log_softmax` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_BLOCK = 1 << 22  # numbers drawn at a time


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


def bootstrap_mean(
    values: Sequence[float], *, resamples: int = 9999, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of the mean (Efron 1979); None for fewer than two values.

    Too narrow for a handful of values, as every percentile interval is; `n` belongs beside it.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return None
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(data))
    means = [
        data[generator.integers(len(data), size=(min(rows, resamples - start), len(data)))].mean(1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


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
