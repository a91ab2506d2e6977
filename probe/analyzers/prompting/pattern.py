"""The activation pattern of a prompt: the difference that it makes to the residual stream at the last position.

Δh_l(x) = h_l(prompt, x) − h_l(x). If prompting is a bias by its activation pattern, the differences of different
inputs point the same way within a task family, and less so across families.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from probe.analyzers.prompting.bias import OTHER_FAMILY
from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import MEAN, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import LEAST as LEAST_TASKS
from probe.maths.intervals import Estimate, jackknifed
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, PromptStates, groups

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


def measures(items: Sequence[Item], states: PromptStates) -> Iterator[Row]:
    """By variant, family and layer."""
    places = []
    for variant, family, members in groups(items):
        known = [m for m in members if {(m.id, variant), (m.id, BASE)} <= states.rows.keys()]
        if len(known) >= LEAST:
            after, before = ([states.rows[item.id, name] for item in known] for name in (variant, BASE))
            named = np.unique([str(item.family) for item in known], return_inverse=True)[1]
            places.append(_VariantGroup(variant, family, np.array(after), np.array(before), named, []))
    for index, layer in enumerate(states.layers if places else ()):
        of_layer = states.layer(index)
        for group in places:
            group.rows.extend(_at_layer(group, of_layer, layer))
    for group in places:
        yield from group.rows


class _VariantGroup(NamedTuple):
    """Tasks under one variant, of all families or of one."""

    variant: str
    family: str | None
    after: np.ndarray
    """[task]: row of the state under the variant."""
    before: np.ndarray
    """[task]: row of the bare state."""
    named: np.ndarray
    """[task]: number of its family."""
    rows: list[Row]


def _at_layer(group: _VariantGroup, states: np.ndarray, layer: int) -> Iterator[Row]:
    before = states[group.before]
    steps = (states[group.after] - before).astype(np.float64)
    lengths, bases = np.linalg.norm(steps, axis=1), np.linalg.norm(before, axis=1)
    place = {"variant": group.variant, "family": group.family, "layer": layer}
    if (bases > 0).all():
        yield PATTERN_NORM.mean(lengths / bases, **place)
    if not (lengths > 0).all():
        return  # prompts that end in the same token differ in nothing yet
    units = steps / lengths[:, None]
    same, other = cosine_sums(units, group.named)
    yield from _pairs(*same, **place)
    if group.family is None:
        yield from _pairs(*other, control=OTHER_FAMILY, **place)


def cosine_sums(
    units: np.ndarray, family: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(Σ cosines, number) [task] of each task with the others of its family, and with those of other families.

    units [task, d_model] of length 1, family [task] its number. By sums of the families: pairs are as many as tasks squared.
    """
    counts = np.bincount(family)
    sums = np.stack([units[family == number].sum(0) for number in range(len(counts))])
    inside, every = np.einsum("td,td->t", units, sums[family]), units @ sums.sum(0)
    itself = np.square(units).sum(1)
    return (inside - itself, counts[family] - 1), (every - inside, len(units) - counts[family])


def _pairs(sums: np.ndarray, counts: np.ndarray, **place: str | int | None) -> Iterator[Row]:
    """Mean over pairs of two tasks."""
    if counts.any():
        value, interval = pair_mean(sums, counts)
        yield PATTERN_COSINE.row(WHOLE_RUN, value, n=len(sums), interval=interval, **place)


def pair_mean(sums: np.ndarray, counts: np.ndarray) -> Estimate:
    """Mean over pairs of two tasks, from each task's sum over its partners and their number [task]; the interval leaves out
    tasks, for a task that is drawn twice would be a pair with itself."""
    total, pairs = sums.sum(), counts.sum()
    value = float(total / pairs)
    left = pairs - 2 * counts
    without = np.divide(total - 2 * sums, left, out=np.full(len(sums), np.nan), where=left > 0)
    return Estimate(value, jackknifed(value, without).interval if np.isfinite(without).all() else None)
