"""Rows of estimates over prompting tasks, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from probe.analyzers.rows import Row
from probe.maths.statistics import bootstrap_mean, bootstrap_ratio

NAME = "prompting"


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """1 − Σ parts / Σ wholes, and its 95 % interval: a percentile bootstrap over tasks of both sums."""
    part, whole = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    value = 1 - part.sum() / whole.sum()
    interval = bootstrap_ratio(whole - part, whole)
    return float(value), interval


def estimate(
    name: str,
    value: float,
    unit: str,
    n: int,
    interval: tuple[float, float] | None,
    **columns: Any,
) -> Row:
    """A measure over tasks of a run."""
    low, high = interval or (None, None)
    return Row(
        task_id="", analyzer=NAME, name=name, value=value, unit=unit, low=low, high=high, n=n, **columns
    )


def mean_of(name: str, values: Sequence[float], unit: str, **columns: Any) -> Row:
    """The mean over tasks with its bootstrap interval."""
    finite = bootstrap_mean(values) if np.isfinite(values).all() else None
    return estimate(name, float(np.mean(values)), unit, len(values), finite, **columns)
