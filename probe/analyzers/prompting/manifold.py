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
from itertools import combinations, permutations

import numpy as np

from probe.analyzers.prompting.bias import OTHER_FAMILY
from probe.analyzers.prompting.recovery import RANDOM
from probe.analyzers.prompting.shift import NAME
from probe.analyzers.prompting.spread import wordings
from probe.analyzers.registry import SHARE, Figure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import SEED
from probe.prompts.labels import BASE
from probe.runs.views.prompting import Item, reference_variant, vector_groups

LEAST = 4
"""Reference states of a family, at least."""
LEAST_FAMILIES = 4
"""Families: of fewer no exchange is rare."""
EXCHANGES = 1999
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
    interval=SHARE,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="variant", card="bias"),
)
MANIFOLD_ACROSS = measure(
    NAME,
    "manifold_alignment_across",
    unit="share",
    of="run",
    axes="wording control? layer",
    means="Share of a state's squared length, under one wording, that lies in the subspace of the family's states under another one, "
    "of other tasks: the subspace has neither its template nor its examples. Mean over pairs of wordings, then over tasks. "
    "Control `other_family`: another family's subspace, as large.",
    interval=SHARE,
    needs=_NEEDS,
    figure=Figure(kind="curve", x="layer", by="wording"),
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
    means="Rank correlation, within variants, of a family's mean `manifold_alignment` with its accuracy; the variant that "
    "spans the subspaces is left out, for it lies in them by construction. n counts pairs of family and variant, but "
    "the families are the sample: too few for an interval.",
    needs=(*_NEEDS, f"{LEAST_FAMILIES} families"),
    figure=Figure(kind="curve", x="layer"),
)
MANIFOLD_ACCURACY_P = measure(
    NAME,
    "manifold_accuracy_p",
    unit="p-value",
    of="run",
    axes="layer",
    means="Share of exchanges of the families' accuracies, the same in every variant, in which `manifold_accuracy` is as far "
    "from 0 in some layer: corrected for the layers.",
    source="Westfall and Young 1993",
    needs=(*_NEEDS, f"{LEAST_FAMILIES} families"),
    figure=Figure(kind="curve", x="layer"),
)


_Points = dict[tuple[str, str], list[tuple[float, float]]]
"""(family, variant) → (alignment, score) of each task."""


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
    points: dict[int, dict[tuple[str, str], np.ndarray]] = {}
    for index, layer in enumerate(layers):
        bare = np.mean([s[index] for (_, v), s in captured.items() if v == BASE], axis=0, dtype=np.float64)
        states = _States({key: s[index].astype(np.float64) - bare for key, s in captured.items()})
        by_pair: _Points = defaultdict(list)
        yield from _at_layer(states, families, reference, layer, by_pair)
        for wording, names in wordings(items).items():
            for control, values in across(states, families, names).items():
                yield MANIFOLD_ACROSS.share(values, wording=wording, control=control, layer=layer)
        points[layer] = {key: np.mean(pairs, axis=0) for key, pairs in by_pair.items() if key[1] != reference}
    yield from with_accuracy(points)


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
    states: _States,
    families: Mapping[str | None, list[Item]],
    reference: str,
    layer: int,
    points: _Points,
) -> Iterator[Row]:
    """Rows of one layer; (alignment, score) of every task goes into `points`."""
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
        yield MANIFOLD_ALIGNMENT.share(values, variant=variant, control=control, layer=layer)


def across(
    states: _States, families: Mapping[str | None, list[Item]], names: Sequence[str]
) -> dict[str | None, list[float]]:
    """Control → [task]: `manifold_alignment_across` of the wordings `names` at one layer."""
    out: dict[str | None, list[float]] = defaultdict(list)
    order = sorted(families, key=str)
    size = {
        (family, name): dimension(states.stack(families[family], name))
        for family in order
        for name in names
        if len(states.stack(families[family], name)) >= LEAST
    }
    for number, family in enumerate(order):
        other = order[(number + 1) % len(order)]
        for item in families[family]:
            shares: dict[str | None, list[float]] = defaultdict(list)
            for spanning in names:
                seen = [
                    states.of[item.id, name]
                    for name in names
                    if name != spanning and (item.id, name) in states.of
                ]
                if (family, spanning) not in size or not seen:
                    continue
                k = size[family, spanning]
                subspaces: dict[str | None, np.ndarray] = {
                    None: basis(states.stack(families[family], spanning, without=item.id), k)
                }
                if other != family and (other, spanning) in size:
                    subspaces[OTHER_FAMILY] = basis(states.stack(families[other], spanning), k)
                for control, subspace in subspaces.items():
                    shares[control] += [share(state, subspace) for state in seen]
            for control, values in shares.items():
                out[control].append(float(np.mean(values)))
    return out


def with_accuracy(points: Mapping[int, Mapping[tuple[str, str], np.ndarray]]) -> Iterator[Row]:
    """How far alignment goes with accuracy: by layer, the mean (alignment, accuracy) of each (family, variant).

    Of the variants that every family has. A family is easy or hard under all of them, so that the families are exchanged
    as wholes.
    """
    from scipy.stats import rankdata

    pairs = next(iter(points.values()))
    families = sorted({family for family, _ in pairs})
    names = sorted({variant for _, variant in pairs})
    names = [name for name in names if all((f, name) in of for f in families for of in points.values())]
    if len(families) < LEAST_FAMILIES or not names:
        return
    table = np.array([[[of[f, name] for f in families] for name in names] for of in points.values()])
    ranks = rankdata(table, axis=2)
    ranks -= ranks.mean(2, keepdims=True)
    alignment, accuracy = ranks[..., 0], ranks[0, ..., 1]
    size = np.sqrt(np.square(alignment).sum((1, 2)) * np.square(accuracy).sum())
    exchanged = np.stack([accuracy[:, order] for order in _orders(len(families))])
    with np.errstate(invalid="ignore"):
        rho = np.einsum("lvf,vf->l", alignment, accuracy) / size
        null = np.nanmax(np.abs(np.einsum("lvf,pvf->pl", alignment, exchanged) / size), axis=1, initial=0.0)
    n = len(families) * len(names)
    for layer, value in zip(points, rho, strict=True):
        if np.isfinite(value):
            yield MANIFOLD_ACCURACY.row(WHOLE_RUN, value, n=n, layer=layer)
            yield MANIFOLD_ACCURACY_P.row(
                WHOLE_RUN, np.mean(null >= abs(value) - 1e-9), n=len(null), layer=layer
            )


def _orders(n: int) -> list[Sequence[int]]:
    """Orders of n families, the first as they are: all where they are few."""
    if n <= 6:
        return list(permutations(range(n)))
    generator = np.random.default_rng(SEED)
    return [range(n), *(generator.permutation(n).tolist() for _ in range(EXCHANGES))]


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles, descending (Björck and Golub 1973)."""
    return np.linalg.svd(first @ second.T, compute_uv=False)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    return np.linalg.qr(rows.T)[0].T
