"""Does one vector explain the shift? The mean over inputs of the change of vocabulary-centred log-probabilities.

b_i = c(log p(·|prompt, x_i)) − c(log p(·|x_i)), c taking off the mean over the vocabulary, which makes log-probabilities
and logits the same. The claim that a prompt adds one vector to every input's logits is b_i = b; R² is the share of
Σ‖b_i‖² that the vector explains: 1 where one vector explains all, 0 where as much as no vector, below 0 where less.

The vector of all such inputs is not known, and a mean of n − 1 others is off by their noise: leaving one out, R² is too
small by (1 − R²)/(n − 1). The mean of ⟨b_i, b_j⟩ over pairs of two tasks by that of ‖b_i‖² is not, so that R² is that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import LEAST as LEAST_TASKS
from probe.maths.intervals import Estimate, jackknifed, ratio_interval
from probe.runs.views.prompting import LEAST, Item
from probe.runs.views.shifts import LIKELY, WORDS, Vectors, centred, families_of, pairs_of, vectors_of

if TYPE_CHECKING:
    import pandas

OTHER_FAMILY = "other_family"
"""`control` of what another family of tasks is used for in the own one's place."""

_R2 = "R² = 1 − Σ‖b_i − b‖² / Σ‖b_i‖² of the changes b_i of centred log-probabilities, without the noise of b, the mean of"
_INTERVAL = f"95 % Student's t over jackknife pseudo-values, from {LEAST_TASKS} tasks on"
_NEEDS = ("logits", f"{LEAST} tasks")
BIAS_R2 = measure(
    NAME,
    "bias_r2",
    unit="R²",
    of="run",
    axes="variant family?",
    means=f"{_R2} all tasks; with `family`, of its tasks alone.",
    interval=_INTERVAL,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="variant", card="bias"),
)
BIAS_R2_FAMILY = measure(
    NAME,
    "bias_r2_family",
    unit="R²",
    of="run",
    axes="variant control?",
    means=f"{_R2} task i's family; control `other_family`: of another family.",
    interval=_INTERVAL,
    needs=_NEEDS,
    figure=Figure(kind="estimates", by="variant", card="bias"),
)


def _listed(end: str, verb: str) -> Measure:
    return measure(
        NAME,
        f"bias_{end}",
        unit="nats",
        of="run",
        axes="variant family? rank token",
        means=f"What the mean vector b̄ says: the {WORDS} tokens that it {verb} most, among those with a mean probability "
        f"of {LIKELY:g} with or without the prompt.",
        needs=_NEEDS,
        figure=Figure(kind="table", by="token", card="bias"),
    )


ENDS = {"promoted": _listed("promoted", "raises"), "demoted": _listed("demoted", "lowers")}
"""End of a list of tokens → its measure."""


def measures(
    items: Sequence[Item], table: pandas.DataFrame, known: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """R² of every variant, with its control, and the tokens that each vector moves; `known` are `token_texts` of the run."""
    texts = {int(token): text for token, text in (known or {}).items()}
    texts |= {} if table.empty else _texts(table)
    vectors, families = vectors_of(items), families_of(items)
    named = {
        variant: [name for name in families[variant] if name is not None and of.counts[name] >= LEAST]
        for variant, of in vectors.items()
    }
    entries: dict[str, list[_ShiftProducts]] = {variant: [] for variant in vectors}
    for item in items:
        for variant, after, before in pairs_of(item):
            shift, sums = centred(after) - centred(before), vectors[variant].sums
            products = np.array([shift @ sums[name] for name in (None, *named[variant])])
            entries[variant].append(_ShiftProducts(products, float(shift @ shift), item.family))
    for variant in families:
        if variant in vectors:
            yield from _r2(variant, entries[variant], named[variant])
            for family in families[variant]:
                if vectors[variant].counts.get(family, 0) >= LEAST:
                    yield from _tokens(vectors[variant], family, texts)


def explained(defined: Measure, errors: ArrayLike, sizes: ArrayLike, **place: str | int | None) -> Row:
    """The row of 1 − Σ errors / Σ sizes over tasks, with its interval."""
    error, size = np.asarray(errors, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    value = 1 - error.sum() / size.sum()
    return defined.row(WHOLE_RUN, value, n=len(size), interval=ratio_interval(size - error, size), **place)


@dataclass(frozen=True)
class Products:
    """What R² is made of: products of shifts, of which every task has one, and their sums by family."""

    with_sums: np.ndarray
    """[task, family]: ⟨b_i, Σ_j b_j⟩ with the sum over the tasks of each family."""
    sizes: np.ndarray
    """[task]: ‖b_i‖²."""
    family: np.ndarray
    """[task]: index of its family."""

    def within(self) -> Estimate:
        """R² of the vector of a task's own family."""
        return self._r2(lambda n, sums, squares: (np.diag(sums) - squares) / (n - 1))

    def between(self) -> Estimate:
        """R² of the vector of the next family, the first behind the last."""

        def explained(n: np.ndarray, sums: np.ndarray, squares: np.ndarray) -> np.ndarray:
            following = np.roll(np.arange(len(n)), -1)
            between = sums[np.arange(len(n)), following] / n[following]
            lengths = (np.diag(sums) - squares) / (n * (n - 1))
            return 2 * between - n * lengths[following]

        return self._r2(explained)

    def of(self, family: int) -> Products:
        """Of the tasks of one family alone."""
        rows = self.family == family
        return Products(
            self.with_sums[rows][:, [family]], self.sizes[rows], np.zeros(int(rows.sum()), dtype=int)
        )

    def _r2(self, explained: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        """`explained` takes the tasks of each family, the products of their sums [family, family] and their squares,
        and gives what of the squares the vectors explain."""
        one_hot = np.eye(self.with_sums.shape[1])[self.family]
        sums = one_hot.T @ self.with_sums

        def value(out: int | None) -> float:
            n, squares, products = one_hot.sum(0), self.sizes @ one_hot, sums
            if out is not None:
                at, row = one_hot[out], self.with_sums[out]
                n, squares = n - at, squares - self.sizes[out] * at
                products = sums - np.outer(at, row) - np.outer(row, at)
                products = products + self.sizes[out] * np.outer(at, at)
            total = float(squares.sum())  # 0 where one task is left, and it moves nothing
            return float(explained(n, products, squares).sum()) / total if total else math.nan

        plain, interval = value(None), None
        if one_hot.sum(0).min() > 2:
            interval = jackknifed(plain, np.array([value(out) for out in range(len(self.sizes))])).interval
        return Estimate(plain, interval)


class _ShiftProducts(NamedTuple):
    """What R² needs of a task."""

    products: np.ndarray
    """[1 + family]: of its shift with the sum over all tasks, then over those of each family."""
    size: float
    """Of its shift with itself."""
    family: str | None


def _r2(variant: str, entries: Sequence[_ShiftProducts], named: Sequence[str]) -> Iterator[Row]:
    """R² of the vector of all tasks; of the task's own family; of another family's, which is the control."""
    if len(entries) >= LEAST and sum(size for _, size, _ in entries) > 0:
        sizes = np.array([size for _, size, _ in entries])
        whole = Products(np.array([p[:1] for p, _, _ in entries]), sizes, np.zeros(len(entries), dtype=int))
        yield _row(BIAS_R2, whole.within(), len(entries), variant=variant)
    inside = [entry for entry in entries if entry[2] in named]
    if not inside or sum(size for _, size, _ in inside) == 0:
        return
    at = np.array([named.index(name) for _, _, name in inside if name is not None])
    products = Products(np.array([p[1:] for p, _, _ in inside]), np.array([s for _, s, _ in inside]), at)
    for index, family in enumerate(named):
        if products.sizes[at == index].sum() > 0:
            of_family = products.of(index)
            yield _row(BIAS_R2, of_family.within(), len(of_family.sizes), variant=variant, family=family)
    yield _row(BIAS_R2_FAMILY, products.within(), len(inside), variant=variant)
    if len(named) > 1:
        place = {"variant": variant, "control": OTHER_FAMILY}
        yield _row(BIAS_R2_FAMILY, products.between(), len(inside), **place)


def _row(defined: Measure, estimate: Estimate, n: int, **place: str | None) -> Row:
    return defined.row(WHOLE_RUN, estimate.value, n=n, interval=estimate.interval, **place)


def _tokens(vectors: Vectors, family: str | None, texts: Mapping[int, str]) -> Iterator[Row]:
    for end, rank, token, value in vectors.listed(family):
        place = {"variant": vectors.variant, "family": family, "rank": rank}
        text = texts.get(token, f"token {token}")
        yield ENDS[end].row(WHOLE_RUN, value, n=vectors.counts[family], token=text, **place)


def _texts(table: pandas.DataFrame) -> dict[int, str]:
    rows = table[table.experiment == "text"]
    return {int(token): text for token, text in zip(rows.token, rows.text, strict=True)}
