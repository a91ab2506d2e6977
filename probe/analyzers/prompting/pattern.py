"""The activation pattern of a prompt: the difference that it makes to the residual stream at the last position.

Δh_l(x) = h_l(prompt, x) − h_l(x). If prompting is a bias by its activation pattern, the differences of different
inputs point the same way within a task family, and less so across families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from probe.analyzers.prompting.bias import OTHER_FAMILY
from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import MEAN, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import LEAST as LEAST_TASKS
from probe.maths.intervals import Estimate, jackknife
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, groups

_NEEDS = ("resid_post", f"{LEAST} tasks")
PATTERN_NORM = measure(
    NAME,
    "pattern_norm",
    unit="share",
    of="run",
    axes="variant family? layer",
    means="Mean of ‖Δh‖ / ‖h(base)‖ over tasks.",
    interval=MEAN,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="variant"),
)
PATTERN_COSINE = measure(
    NAME,
    "pattern_cosine",
    unit="cosine",
    of="run",
    axes="variant family? control? layer",
    means="Mean cosine of the Δh of two tasks of a family; control `other_family`: of two tasks of different families.",
    interval=f"95 % Student's t over jackknife pseudo-values, from {LEAST_TASKS} tasks on",
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="variant"),
)


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """By variant, family and layer."""
    for variant, family, members in groups(items):
        states = [
            (item, after - before, before)
            for item in members
            if (after := item.states(variant)) is not None and (before := item.states(BASE)) is not None
        ]
        if len(states) < LEAST:
            continue
        families = np.array([str(item.family) for item, _, _ in states])
        same = families[:, None] == families[None, :]
        for index, layer in enumerate(states[0][0].layers or range(len(states[0][1]))):
            steps = np.stack([step[index] for _, step, _ in states]).astype(np.float64)
            lengths = np.linalg.norm(steps, axis=1)
            bases = np.linalg.norm([before[index] for _, _, before in states], axis=1)
            place = {"variant": variant, "family": family, "layer": layer}
            if (bases > 0).all():
                yield PATTERN_NORM.mean(lengths / bases, **place)
            if not (lengths > 0).all():
                continue  # prompts that end in the same token differ in nothing yet
            cosines = (steps / lengths[:, None]) @ (steps / lengths[:, None]).T
            yield from _pairs(cosines, same, **place)
            if family is None:
                yield from _pairs(cosines, ~same, control=OTHER_FAMILY, **place)


def _pairs(values: np.ndarray, kept: np.ndarray, **place: str | int | None) -> Iterator[Row]:
    """Mean over the kept pairs of two tasks."""
    kept = kept & ~np.eye(len(values), dtype=bool)
    if kept.any():
        value, interval = pair_mean(values, kept)
        yield PATTERN_COSINE.row(WHOLE_RUN, value, n=len(values), interval=interval, **place)


def pair_mean(values: np.ndarray, kept: np.ndarray) -> Estimate:
    """Mean of values [task, task] over the kept pairs, none of a task with itself; the interval leaves out tasks, for a
    task that is drawn twice would be a pair with itself."""
    summed, counted = np.where(kept, values, 0), kept.astype(np.float64)

    def mean(weights: np.ndarray) -> np.ndarray:
        sums, pairs = ((weights @ part * weights).sum(-1) for part in (summed, counted))
        return np.divide(sums, pairs, out=np.full(np.shape(pairs), np.nan), where=pairs > 0)

    estimate = jackknife(mean, len(values))
    held = estimate.interval if np.isfinite(estimate.value) else None
    return Estimate(float(values[kept].mean()), held)
