"""Selective choice: what is risked where only the surest choices are accepted (Geifman and El-Yaniv 2017).

Choices are accepted from the surest on; the risk at coverage k/n is the share of wrong ones among the first k. Of choices
that are alike sure any may come first, so the risk is its mean over their orders.
"""

from __future__ import annotations

import numpy as np

from probe.maths.intervals import LEAST_RANKS, Interval, percentiles, replicates

_BLOCK = 1 << 20  # weights of a resample held at a time


def risk_curve(confidence: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """[k − 1]: share of wrong choices among the k surest, k = 1 … n."""
    sizes, errors = _levels(confidence, wrong, np.ones((1, len(wrong))))
    share = np.repeat(errors[0] / sizes[0], sizes[0].astype(int))
    return np.cumsum(share) / np.arange(1, len(wrong) + 1)


def risk_area(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """AURC: the mean over k of `risk_curve`; in a random order it is the share of wrong choices."""
    return float(_areas(confidence, wrong, np.ones((1, len(wrong))))[0])


def lowest_area(wrong: np.ndarray) -> float:
    """AURC where every right choice comes before every wrong one: the least that is possible."""
    n, errors = len(wrong), float(wrong.sum())
    return float(_lowest(np.array([errors]), n)[0])


def area_gain(confidence: np.ndarray, wrong: np.ndarray) -> float:
    """(random − AURC) / (random − lowest): 1 in the best order, 0 in a random one. NaN where all are right or all wrong."""
    return float(_gains(confidence, wrong, np.ones((1, len(wrong))))[0])


def area_intervals(
    confidence: np.ndarray, wrong: np.ndarray, widening: float = 1.0
) -> tuple[Interval | None, Interval | None]:
    """Bootstrap intervals over tasks of `risk_area` and `area_gain`, stretched about the estimate where `widening` (of the
    variance) is above 1. None below LEAST_RANKS tasks, or where no resample has a number."""
    n = len(wrong)
    if n < LEAST_RANKS:
        return None, None
    rows = max(1, _BLOCK // n)

    def both(counts: np.ndarray) -> np.ndarray:
        parts = [counts[start : start + rows] for start in range(0, len(counts), rows)]
        return np.concatenate(
            [np.column_stack([_areas(confidence, wrong, p), _gains(confidence, wrong, p)]) for p in parts]
        )

    drawn, stretch = replicates(both, n), np.sqrt(widening)
    out: list[Interval | None] = []
    for values, value, bounds in zip(
        drawn.T,
        (risk_area(confidence, wrong), area_gain(confidence, wrong)),
        ((0, 1), (-np.inf, 1)),
        strict=True,
    ):
        kept = values[~np.isnan(values)]
        if not len(kept) or np.isnan(value):
            out.append(None)
            continue
        low, high = percentiles(kept)
        out.append(
            (
                max(bounds[0], value - stretch * (value - low)),
                min(bounds[1], value + stretch * (high - value)),
            )
        )
    return out[0], out[1]


def _levels(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[resample, level], from the surest on: how many choices a level of confidence has, and how many of them are wrong."""
    order = np.argsort(-confidence, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(confidence[order]) != 0]))
    counts = weights[:, order]
    return (
        np.add.reduceat(counts, starts, axis=1),
        np.add.reduceat(counts * wrong[order], starts, axis=1),
    )


def _areas(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[resample]: AURC. Within a level of g choices, e of them wrong, after N with E wrong, the risk at N + j is
    (E + j e/g) / (N + j): its sum over j is e + (E − N e/g) (H(N + g) − H(N)), with H the harmonic numbers."""
    n = weights.shape[1]
    sizes, errors = _levels(confidence, wrong, weights)
    before, failed = np.cumsum(sizes, 1) - sizes, np.cumsum(errors, 1) - errors
    share = np.divide(errors, sizes, out=np.zeros_like(errors), where=sizes > 0)
    harmonic = _harmonic(n)
    spread = harmonic[(before + sizes).astype(int)] - harmonic[before.astype(int)]
    return (errors + (failed - before * share) * spread).sum(1) / n


def _gains(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> np.ndarray:
    n = weights.shape[1]
    errors = weights @ wrong.astype(float)
    room = errors / n - _lowest(errors, n)
    gained = errors / n - _areas(confidence, wrong, weights)
    return np.divide(gained, room, out=np.full(len(room), np.nan), where=room > 0)


def _lowest(errors: np.ndarray, n: int) -> np.ndarray:
    """[resample]: the mean over k > n − errors of (k − (n − errors)) / k."""
    harmonic, right = _harmonic(n), n - errors
    return (errors - right * (harmonic[n] - harmonic[right.astype(int)])) / n


def _harmonic(n: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])
