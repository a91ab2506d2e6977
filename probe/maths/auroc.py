"""AUROC over pairs within tasks: how often a target outranks another candidate of its task."""

from __future__ import annotations

import numpy as np

from probe.maths.intervals import Interval, share_interval


def pair_wins(n_tools: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[row, head]: how many other tools of its task each tool outranks, ties ½. `n_tools` [task]."""
    out = np.empty(scores.shape)
    starts = np.concatenate([[0], np.cumsum(n_tools)])
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows, columns = scores[start:stop, None], scores[None, start:stop]
        out[start:stop] = (rows > columns).sum(1) + ((rows == columns).sum(1) - 1) / 2
    return out


def pooled_auroc(wins: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, list[Interval | None]]:
    """Σ wins / Σ pairs [head] of wins [task, head], and the intervals that hold all heads together."""
    intervals = [share_interval(column, pairs, family=wins.shape[1]) for column in wins.T]
    return wins.sum(0) / pairs.sum(), intervals
