"""Log-odds, and distances between distributions.

Distributions come as float64 log-probabilities in nats over the last axis, as `log_softmax` gives them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


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


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; −inf has no mass."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def picks(scores: np.ndarray) -> np.ndarray:
    """What is chosen, over the last axis: 1 at the maximum, shared equally where several candidates have it."""
    best = scores == scores.max(-1, keepdims=True)
    return best / best.sum(-1, keepdims=True)


def renormalized(log_probs: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[condition, candidate]: log-softmax over the candidates that are kept; −∞ for the others."""
    scores = np.where(kept & ~np.isnan(log_probs), log_probs, -np.inf)
    return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)


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


def distinct_share(tokens: Sequence[int], n: int) -> float:
    """Different runs of n tokens, of all runs of n: 1 where none is repeated. NaN where there is no run."""
    runs = [*zip(*(tokens[start:] for start in range(n)), strict=False)]
    return len(set(runs)) / len(runs) if runs else math.nan


def tv(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """Total variation ½ Σ |p − q|: 0 to 1."""
    return float(np.abs(np.exp(log_p) - np.exp(log_q)).sum() / 2)
