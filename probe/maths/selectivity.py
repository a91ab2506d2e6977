"""Which features are more active in the tasks of one kind than in the others, and whether in more than shuffled labels would be."""

from __future__ import annotations

import numpy as np

DRAWS = 999
"""Shufflings of the labels."""
_BLOCK = 1 << 24
"""Numbers of a block of products: 128 MB."""


def standardized_wins(activity: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and z [label, feature] of activity [task, feature] by membership [task, label], bool.

    AUROC: P(a member is more active than another task), ties ½. z: the same less ½, in standard deviations of tasks
    whose labels are shuffled (Mann and Whitney 1947, with the exact variance under ties). 0.5 and 0 where all or none are
    members, or all are equally active.
    """
    ranks = _centred_ranks(activity)
    wins, n, others = _wins(ranks, member), member.sum(0)[:, None], (~member).sum(0)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        area = np.where(n * others > 0, 0.5 + wins / (n * others), 0.5)
    return area, _standardized(wins, ranks, member)


def max_p(activity: np.ndarray, member: np.ndarray, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """One-sided p-values [label, feature] of `standardized_wins`, corrected for all features and labels at once: the share
    of shufflings of the tasks' labels whose largest z is as large (maxT; Westfall and Young 1993)."""
    ranks = _centred_ranks(activity)
    z = _standardized(_wins(ranks, member), ranks, member)
    generator = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(1, z.size))
    most = []
    for start in range(0, draws, step):
        shuffled = [member[generator.permutation(len(member))] for _ in range(min(step, draws - start))]
        every = _wins(ranks, np.concatenate(shuffled, axis=1))
        scaled = _standardized(every, ranks, np.concatenate(shuffled, axis=1))
        most.append(scaled.reshape(len(shuffled), -1).max(1))
    largest = np.sort(np.concatenate(most))
    # Rounding apart from the observed one is as large.
    return (1 + draws - np.searchsorted(largest, z - 1e-9)) / (1 + draws)


def _centred_ranks(activity: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(activity, axis=0) - (len(activity) + 1) / 2


def _wins(ranks: np.ndarray, member: np.ndarray) -> np.ndarray:
    """[label, feature]: pairs that a member wins, less half of them."""
    return member.T.astype(np.float64) @ ranks


def _standardized(wins: np.ndarray, ranks: np.ndarray, member: np.ndarray) -> np.ndarray:
    n, total = member.sum(0), len(member)
    variance = (n * (total - n))[:, None] / (total * max(1, total - 1)) * np.square(ranks).sum(0)
    return np.divide(wins, np.sqrt(variance), out=np.zeros_like(wins), where=variance > 0)
