"""The task manifold: the subspace in which many-shot states of a task family lie, and who lies in it.

For each family and layer the states at the last position under the reference variant, the one with the most
examples, span a linear subspace about the mean of all bare states. Its dimension k is the one under which the
states of left-out tasks are likeliest in probabilistic PCA (Tipping and Bishop 1999, eq. 4 and 8), always below the
number of states and d_model. A task is never in the subspace that it is measured against.

Up to FITS tasks are left out one at a time, more of them in so many parts, and at most SPANNING tasks of a family, drawn once,
span its subspace: a subspace takes as long as its states squared, and each task needs one without it. So a family is factored
FITS + 1 times at most, a wording and layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from probe.runs.views.prompting import Item, PromptStates, reference_variant, vector_groups

LEAST = 4
"""Reference states of a family, at least."""
LEAST_FAMILIES = 4
"""Families: of fewer no exchange is rare."""
FITS = 32
"""Fits of a subspace without some of its tasks."""
SPANNING = 256
"""Tasks of a family that span its subspace, at most."""
POOL = 1024
"""States that random subspaces are drawn from, at most."""
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
    f"`base` too. At most {SPANNING} tasks span it. Controls: `random`, the mean over {_DRAWS} random subspaces of that size within the "
    f"span of all states of other tasks, of {POOL:,} of them where they are more; "
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
    f"of at most {SPANNING} other tasks: the subspace has neither its template nor its examples. Mean over pairs of wordings, then over tasks. "
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
    means=f"Dimension of the family's subspace, cross-validated with at most {FITS} parts; n counts the states that span it, of at "
    f"most {SPANNING} tasks, drawn once.",
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

    def spanned(self, items: Sequence[Item], variant: str) -> _Spanned:
        """The states of these tasks under a variant, as what spans a subspace."""
        ids = [item.id for item in items if (item.id, variant) in self.of]
        ids = [ids[place] for place in _spread(len(ids), SPANNING)]
        rows = [self.of[task, variant] for task in ids]
        return _Spanned(np.stack(rows) if rows else np.zeros((0, 1)), ids)


class _Spanned:
    """States [row, d_model] of one family under one variant, and the subspaces that they span, all and without some."""

    def __init__(self, states: np.ndarray, ids: Sequence[str]):
        self.states = states
        self._part = dict(zip(ids, parts(len(ids)).tolist(), strict=True))
        self._directions: dict[int | None, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.states)

    @cached_property
    def size(self) -> int:
        k, directions = _dimension(self.states)
        self._directions |= {part: v[:k].copy() for part, v in directions.items()}
        return k

    def part_of(self, task: str) -> int | None:
        """The part with which a task is left out; None of one that spans nothing."""
        return self._part.get(task)

    def basis(self, size: int, part: int | None = None) -> np.ndarray:
        """Orthonormal rows [size, d_model], of all states or, of at most the size of all, of the states without a part."""
        if part is None and part not in self._directions:
            self._directions[part] = _factors(self.states)[1]
        elif part not in self._directions:
            _ = self.size  # keeps those of every part
        return self._directions[part][:size]


def parts(n: int) -> np.ndarray:
    """[row]: the part with which each of n rows is left out: its own, or one of FITS."""
    return np.arange(n) % FITS


def _spread(n: int, most: int) -> np.ndarray:
    """Places of at most so many of n, ascending. Drawn, for what lies at even steps may be all of one variant."""
    return np.sort(np.random.default_rng(SEED).permutation(n)[:most])


def measures(items: Sequence[Item], captured: PromptStates) -> Iterator[Row]:
    """By layer: alignment of every variant with its controls, dimensions and angles, and how far alignment goes with
    accuracy."""
    reference = reference_variant(items)
    families = {
        name: members
        for name, members in vector_groups(items).items()
        if sum(reference in item.outcomes for item in members) >= LEAST
    }
    if reference is None or not families:
        return
    rows = {
        (item.id, variant): captured.rows[item.id, variant]
        for members in families.values()
        for item in members
        for variant in item.outcomes
        if (item.id, variant) in captured.rows
    }
    if not rows:
        return
    bare = np.array([row for (_, variant), row in rows.items() if variant == BASE])
    alike = wordings(items)
    points: dict[int, dict[tuple[str, str], np.ndarray]] = {}
    for index, layer in enumerate(captured.layers):
        of_layer = captured.layer(index)
        mean = of_layer[bare].mean(0, dtype=np.float64)
        states = _States({key: of_layer[row].astype(np.float64) - mean for key, row in rows.items()})
        by_pair: _Points = defaultdict(list)
        yield from _at_layer(states, families, reference, layer, by_pair)
        for wording, names in alike.items():
            for control, values in across(states, families, names).items():
                yield MANIFOLD_ACROSS.share(values, wording=wording, control=control, layer=layer)
        points[layer] = {key: np.mean(pairs, axis=0) for key, pairs in by_pair.items() if key[1] != reference}
    yield from with_accuracy(points)


def basis(states: np.ndarray, most: int | None = None) -> np.ndarray:
    """Orthonormal rows [k, d_model] of the leading directions of states [row, d_model], k cross-validated."""
    k = dimension(states) if most is None else most
    return _factors(states)[1][:k]


def _factors(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values, descending, and directions [k, d_model] of states [row, d_model]."""
    return np.linalg.svd(states, full_matrices=False)[1:]


def dimension(states: np.ndarray) -> int:
    """The k below the number of rows and of features with the highest probability of left-out rows in probabilistic PCA
    about 0, rows left out as `parts` has them."""
    return _dimension(states)[0]


def _dimension(states: np.ndarray) -> tuple[int, dict[int, np.ndarray]]:
    """The same, and the directions [k, d_model] of the rows without each part."""
    rows, d_model = states.shape
    part = parts(rows)
    n_kept = rows - np.bincount(part).max()
    totals = np.zeros(max(min(n_kept, d_model) - 1, 1))
    k = np.arange(1, len(totals) + 1)
    directions: dict[int, np.ndarray] = {}
    for out in range(int(part.max()) + 1):
        left_out, kept = states[part == out], states[part != out]
        s, v = _factors(kept)
        directions[out] = v
        spectrum = s**2 / len(kept)
        least = 1e-12 * spectrum[0]
        tail = np.append(np.cumsum(spectrum[::-1])[::-1][1:], 0)[k - 1]
        noise = np.maximum(tail / (d_model - k), least)
        inside = np.maximum(spectrum, least)
        along = np.square(left_out @ v.T).sum(0)
        rest = np.square(left_out).sum() - np.cumsum(along)[k - 1]
        determinant = np.cumsum(np.log(inside))[k - 1] + (d_model - k) * np.log(noise)
        totals -= (len(left_out) * determinant + np.cumsum(along / inside)[k - 1] + rest / noise) / 2
    # Where states repeat each other many k are equal but for rounding: the least of them.
    return int((totals >= totals.max() - 1e-9 * abs(totals.max())).argmax()) + 1, directions


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
    spanned = {name: states.spanned(members, reference) for name, members in families.items()}
    sizes = {name: of.size for name, of in spanned.items()}
    whole = {name: of.basis(sizes[name]) for name, of in spanned.items()}
    for name in names:
        yield MANIFOLD_DIMENSION.row(WHOLE_RUN, sizes[name], n=len(spanned[name]), family=name, layer=layer)
    for first, second in combinations(names, 2):
        cosine = _cosines(whole[first], whole[second])[0]
        angle, n = np.degrees(np.arccos(np.clip(cosine, -1, 1))), len(whole[first]) + len(whole[second])
        yield MANIFOLD_ANGLE.row(WHOLE_RUN, angle, n=n, family=first, other_family=second, layer=layer)
    inside: dict[tuple[str | None, str], list[float]] = defaultdict(list)
    rng = np.random.default_rng(0)
    keys = list(states.of)
    for name in names:
        other = names[(names.index(name) + 1) % len(names)]
        by_part: dict[int, list[Item]] = defaultdict(list)
        for item, part in zip(families[name], parts(len(families[name])).tolist(), strict=True):
            by_part[part].append(item)
        for members in by_part.values():
            pool = _pool(states, keys, {item.id for item in members})
            drawn = [
                _orthonormal(rng.standard_normal((sizes[name], len(pool))) @ pool) for _ in range(_DRAWS)
            ]
            for item in members:
                subspace = spanned[name].basis(sizes[name], spanned[name].part_of(item.id))
                for variant, outcome in item.outcomes.items():
                    state = states.of.get((item.id, variant))
                    if state is None or not np.any(state):
                        continue
                    value = share(state, subspace)
                    inside[None, variant].append(value)
                    at_random = np.mean([share(state, directions) for directions in drawn])
                    inside[RANDOM, variant].append(float(at_random))
                    if other != name:
                        inside[OTHER_FAMILY, variant].append(share(state, whole[other][: sizes[name]]))
                    if outcome.score is not None:
                        points[str(name), variant].append((value, outcome.score))
    for (control, variant), values in inside.items():
        yield MANIFOLD_ALIGNMENT.share(values, variant=variant, control=control, layer=layer)


def across(
    states: _States, families: Mapping[str | None, list[Item]], names: Sequence[str]
) -> dict[str | None, list[float]]:
    """Control → [task]: `manifold_alignment_across` of the wordings `names` at one layer."""
    out: dict[str | None, list[float]] = defaultdict(list)
    order = sorted(families, key=str)
    spans = {(family, name): states.spanned(families[family], name) for family in order for name in names}
    spans = {place: of for place, of in spans.items() if len(of) >= LEAST}
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
                if (family, spanning) not in spans or not seen:
                    continue
                span = spans[family, spanning]
                subspaces: dict[str | None, np.ndarray] = {None: span.basis(span.size, span.part_of(item.id))}
                if other != family and (other, spanning) in spans:
                    subspaces[OTHER_FAMILY] = spans[other, spanning].basis(span.size)
                for control, subspace in subspaces.items():
                    shares[control] += [share(state, subspace) for state in seen]
            for control, values in shares.items():
                out[control].append(float(np.mean(values)))
    return out


def _pool(states: _States, keys: Sequence[tuple[str, str]], without: set[str]) -> np.ndarray:
    """States of other tasks than some, of which random subspaces are drawn."""
    kept = [key for key in keys if key[0] not in without]
    return np.stack([states.of[kept[place]] for place in _spread(len(kept), POOL)])


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
