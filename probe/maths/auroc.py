"""AUROC over pairs within tasks: how often a target outranks another candidate of its task."""

from __future__ import annotations

import numpy as np

from probe.maths.statistics import replicates


def pair_wins(n_tools: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[row, head]: how many other tools of its task each tool outranks, ties ½. `n_tools` [task]."""
    out = np.empty(scores.shape)
    starts = np.concatenate([[0], np.cumsum(n_tools)])
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows, columns = scores[start:stop, None], scores[None, start:stop]
        out[start:stop] = (rows > columns).sum(1) + ((rows == columns).sum(1) - 1) / 2
    return out


def pooled_auroc(wins: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ wins / Σ pairs of wins [task, head], and its 95 % bootstrap interval over tasks: each [head]."""
    resampled = replicates(lambda counts: (counts @ wins) / (counts @ pairs)[:, None], len(pairs))
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return wins.sum(0) / pairs.sum(), low, high
