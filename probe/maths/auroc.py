"""AUROC over pairs within tasks: how often a target outranks another candidate of its task."""

from __future__ import annotations

import numpy as np

DRAWS = 1000
"""Resamples of tasks."""


def pair_wins(n_tools: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[row, head]: how many other tools of its task each tool outranks, ties ½. `n_tools` [task]."""
    out = np.empty(scores.shape)
    starts = np.concatenate([[0], np.cumsum(n_tools)])
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows, columns = scores[start:stop, None], scores[None, start:stop]
        out[start:stop] = (rows > columns).sum(1) + ((rows == columns).sum(1) - 1) / 2
    return out


def pooled_auroc(
    wins: np.ndarray, pairs: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ wins / Σ pairs of wins [task, head], and its percentile interval over resampled tasks: each [head]."""
    counts = np.random.default_rng(seed).multinomial(
        len(pairs), np.full(len(pairs), 1 / len(pairs)), size=draws
    )
    low, high = np.quantile((counts @ wins) / (counts @ pairs)[:, None], [0.025, 0.975], axis=0)
    return wins.sum(0) / pairs.sum(), low, high
