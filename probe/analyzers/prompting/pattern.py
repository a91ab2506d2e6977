"""The activation pattern of a prompt: the difference that it makes to the residual stream at the last position.

Δh_l(x) = h_l(prompt, x) − h_l(x). If prompting is a bias by its activation pattern, the differences of different
inputs point the same way within a task family, and less so across families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from probe.analyzers.prompting.estimates import estimate
from probe.analyzers.rows import Row
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, groups

_DRAWS = 1000


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """By variant, family and layer: `pattern_cosine`, mean cosine of the Δh of two tasks, and `pattern_norm`,
    ‖Δh‖ / ‖h(base)‖; over all families also `pattern_cosine_shuffled`, of tasks of different families."""
    for variant, family, own in groups(items):
        found = [
            (item, after - before, before)
            for item in own
            if (after := item.states(variant)) is not None and (before := item.states(BASE)) is not None
        ]
        if len(found) < LEAST:
            continue
        same = _same_family(own=[item for item, _, _ in found])
        for place, layer in enumerate(_layers(found[0][0], len(found[0][1]))):
            steps = np.stack([step[place] for _, step, _ in found]).astype(np.float64)
            lengths = np.linalg.norm(steps, axis=1)
            bases = np.linalg.norm([before[place] for _, _, before in found], axis=1)
            where = {"variant": variant, "span": family, "layer": layer}
            if (bases > 0).all():
                shares = lengths / bases
                yield estimate(
                    "pattern_norm", float(shares.mean()), "share", len(shares), _mean(shares), **where
                )
            if not (lengths > 0).all():
                continue  # prompts that end in the same token differ in nothing yet
            cosines = (steps / lengths[:, None]) @ (steps / lengths[:, None]).T
            for name, kept in (("pattern_cosine", same), ("pattern_cosine_shuffled", ~same)):
                if family is not None and name != "pattern_cosine":
                    continue
                yield from _pairs(name, cosines, kept, where)


def _layers(item: Item, count: int) -> Sequence[int]:
    return item.layers or range(count)


def _same_family(own: Sequence[Item]) -> np.ndarray:
    families = np.array([str(item.family) for item in own])
    return families[:, None] == families[None, :]


def _pairs(name: str, values: np.ndarray, kept: np.ndarray, where: dict) -> Iterator[Row]:
    """Mean over the kept pairs of two tasks; the interval resamples tasks, pairs of a task with itself left out."""
    kept = kept & ~np.eye(len(values), dtype=bool)
    if not kept.any():
        return
    weights = np.random.default_rng(0).multinomial(len(values), np.full(len(values), 1 / len(values)), _DRAWS)
    sums = np.einsum("di,ij,dj->d", weights, np.where(kept, values, 0), weights, optimize=True)
    counts = np.einsum("di,ij,dj->d", weights, kept.astype(float), weights, optimize=True)
    low, high = np.quantile((sums[counts > 0] / counts[counts > 0]), [0.025, 0.975])
    yield estimate(
        name, float(values[kept].mean()), "cosine", len(values), (float(low), float(high)), **where
    )


def _mean(values: np.ndarray) -> tuple[float, float]:
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
