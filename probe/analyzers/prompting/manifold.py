"""The task manifold: the subspace in which many-shot states of a task family lie, and who lies in it.

For each family and layer the states at the last position under the reference variant, the one with the most
examples, span a linear subspace about the mean of all bare states. Its dimension k is the one under which the
states of left-out tasks are likeliest in probabilistic PCA (Tipping and Bishop 1999, eq. 4 and 8), always below the
number of states. A task is never in the subspace that it is measured against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from probe.analyzers.prompting.estimates import estimate, mean_of
from probe.analyzers.rows import Row
from probe.prompts.labels import BASE
from probe.runs.views.prompting import Item, reference_variant, vector_groups

LEAST = 4
"""Reference states of a family, at least."""
_DRAWS = 20


@dataclass
class _States:
    """Everything at one layer, about the mean of the bare states."""

    of: Mapping[tuple[str, str], np.ndarray]
    """(task, variant) → [d_model]"""

    def stack(self, items: Sequence[Item], variant: str, without: str | None = None) -> np.ndarray:
        rows = [self.of[i.id, variant] for i in items if i.id != without and (i.id, variant) in self.of]
        return np.stack(rows) if rows else np.zeros((0, 1))


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """`manifold_alignment` by variant and layer with its controls, `manifold_dimension`, `manifold_angle`, and how
    far alignment goes with accuracy (`manifold_accuracy`)."""
    reference = reference_variant(items)
    families = {
        name: own
        for name, own in vector_groups(items).items()
        if sum(reference in item.passages for item in own) >= LEAST
    }
    if reference is None or not families:
        return
    found = {
        (item.id, variant): states
        for own in families.values()
        for item in own
        for variant in item.passages
        if (states := item.states(variant)) is not None
    }
    if not found:
        return
    count = len(next(iter(found.values())))
    layers = next(iter(families.values()))[0].layers or range(count)
    for place, layer in enumerate(layers):
        bare = np.mean([s[place] for (_, v), s in found.items() if v == BASE], axis=0, dtype=np.float64)
        states = _States({key: own[place].astype(np.float64) - bare for key, own in found.items()})
        yield from _at_layer(states, families, reference, layer)


def basis(states: np.ndarray, most: int | None = None) -> np.ndarray:
    """Orthonormal rows [k, d_model] of the leading directions of states [row, d_model], k cross-validated."""
    k = dimension(states) if most is None else most
    return np.linalg.svd(states, full_matrices=False)[2][:k]


def dimension(states: np.ndarray) -> int:
    """The k from 1 to rows − 2 with the highest probability of left-out rows in probabilistic PCA about 0."""
    rows, d_model = states.shape
    totals = np.zeros(max(rows - 2, 1))
    for out in range(rows):
        kept = np.delete(states, out, axis=0)
        _, s, v = np.linalg.svd(kept, full_matrices=False)
        spectrum, along = s**2 / len(kept), (v @ states[out]) ** 2
        for k in range(1, len(totals) + 1):
            noise = max(spectrum[k:].sum() / (d_model - k), 1e-12 * spectrum[0])
            inside = np.maximum(spectrum[:k], noise)
            rest = states[out] @ states[out] - along[:k].sum()
            totals[k - 1] -= (
                np.log(inside).sum()
                + (d_model - k) * np.log(noise)
                + (along[:k] / inside).sum()
                + rest / noise
            ) / 2
    return int(totals.argmax()) + 1


def share(state: np.ndarray, directions: np.ndarray) -> float:
    """Of the squared length of a state [d_model], what lies in the span of orthonormal rows [k, d_model]."""
    return float(np.square(directions @ state).sum() / max(state @ state, 1e-300))


def _at_layer(
    states: _States, families: Mapping[str | None, list[Item]], reference: str, layer: int
) -> Iterator[Row]:
    names = sorted(families, key=str)
    sizes = {name: dimension(states.stack(own, reference)) for name, own in families.items()}
    whole = {name: basis(states.stack(own, reference), sizes[name]) for name, own in families.items()}
    for name in names:
        n = len(states.stack(families[name], reference))
        yield estimate("manifold_dimension", sizes[name], "directions", n, None, span=name, layer=layer)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            angle = float(np.degrees(np.arccos(np.clip(_cosines(whole[one], whole[other])[0], -1, 1))))
            n = len(whole[one]) + len(whole[other])
            yield estimate("manifold_angle", angle, "degrees", n, None, span=one, variant=other, layer=layer)
    inside: dict[tuple[str, str], list[float]] = defaultdict(list)
    points: list[tuple[str, str, float, float | None]] = []
    rng = np.random.default_rng(0)
    everything = np.stack(list(states.of.values()))
    keys = list(states.of)
    for name in names:
        other = names[(names.index(name) + 1) % len(names)]
        for item in families[name]:
            own = basis(states.stack(families[name], reference, without=item.id), sizes[name])
            wrong = whole[other][: sizes[name]] if other != name else None
            pool = everything[[key[0] != item.id for key in keys]]
            drawn = [
                _orthonormal(rng.standard_normal((sizes[name], len(pool))) @ pool) for _ in range(_DRAWS)
            ]
            for variant, passage in item.passages.items():
                state = states.of.get((item.id, variant))
                if state is None or not np.any(state):
                    continue
                value = share(state, own)
                inside["manifold_alignment", variant].append(value)
                inside["manifold_alignment_random", variant].append(
                    float(np.mean([share(state, directions) for directions in drawn]))
                )
                if wrong is not None:
                    inside["manifold_alignment_other", variant].append(share(state, wrong))
                points.append((str(name), variant, value, passage.score))
    for (measure, variant), values in inside.items():
        yield mean_of(measure, values, "share", variant=variant, layer=layer)
    yield from _with_accuracy(points, layer)


def _with_accuracy(points: Sequence[tuple[str, str, float, float | None]], layer: int) -> Iterator[Row]:
    """Spearman of mean alignment and accuracy over the variants of all families; the interval resamples these."""
    cells: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for family, variant, value, score in points:
        if score is not None:
            cells[family, variant].append((value, score))
    if len(cells) < 5:
        return
    means = np.array([np.mean(own, axis=0) for own in cells.values()])
    if np.ptp(means, axis=0).min() == 0:
        return
    drawn = np.random.default_rng(0).integers(len(means), size=(500, len(means)))
    found = [_spearman(means[rows]) for rows in drawn if np.ptp(means[rows], axis=0).min() > 0]
    low, high = np.quantile(found, [0.025, 0.975])
    yield estimate(
        "manifold_accuracy",
        _spearman(means),
        "rank correlation",
        len(means),
        (float(low), float(high)),
        layer=layer,
    )


def _spearman(pairs: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(cast("Any", spearmanr(pairs[:, 0], pairs[:, 1])).statistic)


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles, descending (Björck and Golub 1973)."""
    return np.linalg.svd(one @ other.T, compute_uv=False)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    return np.linalg.qr(rows.T)[0].T
