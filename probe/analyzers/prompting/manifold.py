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
from itertools import combinations

import numpy as np

from probe.analyzers.prompting.bias import OTHER_FAMILY
from probe.analyzers.prompting.recovery import RANDOM
from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import BOOTSTRAP, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.rank_correlation import spearman
from probe.prompts.labels import BASE
from probe.runs.views.prompting import Item, reference_variant, vector_groups

LEAST = 4
"""Reference states of a family, at least."""
LEAST_PAIRS = 5
_DRAWS = 20

_NEEDS = ("resid_post", f"{LEAST} tasks")
MANIFOLD_ALIGNMENT = measure(
    NAME,
    "manifold_alignment",
    unit="share",
    of="run",
    axes="variant control? layer",
    means="Share of a state's squared length that lies in the family's subspace, the task's own state left out of it; of "
    f"`base` too. Controls: `random`, the mean over {_DRAWS} random subspaces of that size within the span of all states; "
    "`other_family`, another family's subspace, at most as large.",
    interval=BOOTSTRAP,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="variant", card="bias"),
)
MANIFOLD_DIMENSION = measure(
    NAME,
    "manifold_dimension",
    unit="directions",
    of="run",
    axes="family? layer",
    means="Dimension of the family's subspace, cross-validated; n counts its states.",
    source="Tipping and Bishop 1999, eq. 4 and 8",
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="family"),
)
MANIFOLD_ANGLE = measure(
    NAME,
    "manifold_angle",
    unit="degrees",
    of="run",
    axes="family? other_family? layer",
    means="Smallest principal angle between the subspaces of two families; n counts their dimensions.",
    source="Björck and Golub 1973",
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="family"),
)
MANIFOLD_ACCURACY = measure(
    NAME,
    "manifold_accuracy",
    unit="rank correlation",
    of="run",
    axes="layer",
    means="Spearman's correlation of mean `manifold_alignment` and accuracy over the pairs of family and variant, which n "
    "counts.",
    interval="95 % bootstrap over pairs of family and variant",
    needs=(*_NEEDS, f"{LEAST_PAIRS} pairs"),
    figure=Figure(kind="curve", x="layer"),
)


@dataclass
class _States:
    """Everything at one layer, about the mean of the bare states."""

    of: Mapping[tuple[str, str], np.ndarray]
    """(task, variant) → [d_model]"""

    def stack(self, items: Sequence[Item], variant: str, without: str | None = None) -> np.ndarray:
        rows = [self.of[i.id, variant] for i in items if i.id != without and (i.id, variant) in self.of]
        return np.stack(rows) if rows else np.zeros((0, 1))


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """By layer: alignment of every variant with its controls, dimensions and angles, and how far alignment goes with
    accuracy."""
    reference = reference_variant(items)
    families = {
        name: members
        for name, members in vector_groups(items).items()
        if sum(reference in item.passages for item in members) >= LEAST
    }
    if reference is None or not families:
        return
    captured = {
        (item.id, variant): states
        for members in families.values()
        for item in members
        for variant in item.passages
        if (states := item.states(variant)) is not None
    }
    if not captured:
        return
    count = len(next(iter(captured.values())))
    layers = next(iter(families.values()))[0].layers or range(count)
    for index, layer in enumerate(layers):
        bare = np.mean([s[index] for (_, v), s in captured.items() if v == BASE], axis=0, dtype=np.float64)
        states = _States({key: s[index].astype(np.float64) - bare for key, s in captured.items()})
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
    stacks = {name: states.stack(members, reference) for name, members in families.items()}
    sizes = {name: dimension(stack) for name, stack in stacks.items()}
    whole = {name: basis(stack, sizes[name]) for name, stack in stacks.items()}
    for name in names:
        yield MANIFOLD_DIMENSION.row(WHOLE_RUN, sizes[name], n=len(stacks[name]), family=name, layer=layer)
    for first, second in combinations(names, 2):
        cosine = _cosines(whole[first], whole[second])[0]
        angle, n = np.degrees(np.arccos(np.clip(cosine, -1, 1))), len(whole[first]) + len(whole[second])
        yield MANIFOLD_ANGLE.row(WHOLE_RUN, angle, n=n, family=first, other_family=second, layer=layer)
    inside: dict[tuple[str | None, str], list[float]] = defaultdict(list)
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    rng = np.random.default_rng(0)
    everything = np.stack(list(states.of.values()))
    keys = list(states.of)
    for name in names:
        other = names[(names.index(name) + 1) % len(names)]
        for item in families[name]:
            subspace = basis(states.stack(families[name], reference, without=item.id), sizes[name])
            pool = everything[[key[0] != item.id for key in keys]]
            drawn = [
                _orthonormal(rng.standard_normal((sizes[name], len(pool))) @ pool) for _ in range(_DRAWS)
            ]
            for variant, passage in item.passages.items():
                state = states.of.get((item.id, variant))
                if state is None or not np.any(state):
                    continue
                value = share(state, subspace)
                inside[None, variant].append(value)
                at_random = np.mean([share(state, directions) for directions in drawn])
                inside[RANDOM, variant].append(float(at_random))
                if other != name:
                    inside[OTHER_FAMILY, variant].append(share(state, whole[other][: sizes[name]]))
                if passage.score is not None:
                    points[str(name), variant].append((value, passage.score))
    for (control, variant), values in inside.items():
        yield MANIFOLD_ALIGNMENT.mean(values, variant=variant, control=control, layer=layer)
    yield from _with_accuracy([np.mean(pairs, axis=0) for pairs in points.values()], layer)


def _with_accuracy(means: Sequence[np.ndarray], layer: int) -> Iterator[Row]:
    """Over pairs of family and variant, each a mean (alignment, accuracy)."""
    if len(means) < LEAST_PAIRS:
        return
    alignment, accuracy = np.transpose(means)
    estimate = spearman(alignment, accuracy, np.arange(len(means)))
    if estimate is not None:
        yield MANIFOLD_ACCURACY.row(
            WHOLE_RUN, estimate.value, n=len(means), interval=estimate.interval, layer=layer
        )


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles, descending (Björck and Golub 1973)."""
    return np.linalg.svd(first @ second.T, compute_uv=False)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    return np.linalg.qr(rows.T)[0].T
