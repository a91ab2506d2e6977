"""Does one vector explain the shift? The mean over inputs of the change of vocabulary-centred log-probabilities.

b_i = c(log p(·|prompt, x_i)) − c(log p(·|x_i)), c taking off the mean over the vocabulary, which makes log-probabilities
and logits the same. The claim that a prompt adds one vector to every input's logits is b_i = b; its test is
leave-one-out: R² = 1 − Σ‖b_i − b̄₋ᵢ‖² / Σ‖b_i‖², 1 where one vector explains all, 0 where it explains as much
as no vector, below 0 where less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from probe.analyzers.prompting.states import LEAST, Item, estimate, groups, ratio
from probe.analyzers.rows import Row
from probe.prompts.labels import BASE

if TYPE_CHECKING:
    import pandas

WORDS = 10
"""Tokens that are listed of each vector, at either end."""
LIKELY = 1e-4
"""Mean probability under the prompt or without it that a listed token has at least."""


class Vectors:
    """Sums over tasks of the shifts of one variant, overall and by family: one pass holds one task's at a time."""

    def __init__(self, variant: str, items: Sequence[Item]):
        self.items: list[Item] = []
        self.sums: dict[str | None, Any] = defaultdict(float)
        self.counts: dict[str | None, int] = defaultdict(int)
        self.mass: dict[str | None, Any] = defaultdict(float)
        self.variant = variant
        for item in items:
            pair = item.log_probs(variant), item.log_probs(BASE)
            if pair[0] is None or pair[1] is None:
                continue
            self.items.append(item)
            shift, mass = _centred(pair[0]) - _centred(pair[1]), np.maximum(np.exp(pair[0]), np.exp(pair[1]))
            for key in {None, item.family}:
                self.sums[key] = self.sums[key] + shift
                self.mass[key] = self.mass[key] + mass
                self.counts[key] += 1

    def left_out(self, key: str | None, shift: np.ndarray, own: bool) -> np.ndarray | None:
        """The mean of the other tasks' shifts; None for too few."""
        count = self.counts[key] - own
        return (self.sums[key] - own * shift) / count if count >= LEAST - 1 else None

    def listed(self, key: str | None) -> list[tuple[str, int, int, float]]:
        """(`promoted` or `demoted`, rank, token, mean shift in nats) of likely tokens, strongest first."""
        mean = self.sums[key] / self.counts[key]
        likely = np.flatnonzero(self.mass[key] / self.counts[key] >= LIKELY)
        order = likely[np.argsort(-mean[likely], kind="stable")]
        up = [
            ("promoted", rank, int(t), float(mean[t]))
            for rank, t in enumerate(order[:WORDS], 1)
            if mean[t] > 0
        ]
        down = order[::-1][:WORDS]
        return up + [
            ("demoted", rank, int(t), float(mean[t])) for rank, t in enumerate(down, 1) if mean[t] < 0
        ]


def measures(items: Sequence[Item], table: pandas.DataFrame) -> Iterator[Row]:
    """`bias_r2` by variant (one vector) and by family, controls, and the tokens that each vector moves."""
    named = {} if table.empty else _texts(table)
    for variant, families in _families(items).items():
        vectors = Vectors(variant, [item for item in items if variant in item.passages])
        yield from _explained(vectors, families)
        for family in families:
            if vectors.counts.get(family, 0) >= LEAST:
                yield from _tokens(vectors, family, named)


def listed_tokens(items: Sequence[Item]) -> list[int]:
    """Every token that is listed of some vector: what has to be turned into text."""
    found: set[int] = set()
    for variant, families in _families(items).items():
        vectors = Vectors(variant, [item for item in items if variant in item.passages])
        for family in families:
            if vectors.counts.get(family, 0) >= LEAST:
                found |= {token for _, _, token, _ in vectors.listed(family)}
    return sorted(found)


def _families(items: Sequence[Item]) -> dict[str, list[str | None]]:
    found: dict[str, list[str | None]] = defaultdict(list)
    for variant, family, _ in groups(items):
        found[variant].append(family)
    return found


def _explained(vectors: Vectors, families: Sequence[str | None]) -> Iterator[Row]:
    """R² of the vector of all tasks; of the own family's; of another family's, which is the control."""
    errors: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    sizes: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    own_families = [family for family in families if family is not None]
    for item in vectors.items:
        after, before = item.log_probs(vectors.variant), item.log_probs(BASE)
        assert after is not None and before is not None
        shift = _centred(after) - _centred(before)
        size = float(shift @ shift)
        asked: list[tuple[str, str | None, np.ndarray | None]] = []
        asked.append(("bias_r2", None, vectors.left_out(None, shift, True)))
        if item.family in own_families:
            own = vectors.left_out(item.family, shift, True)
            place = own_families.index(item.family)
            other = own_families[(place + 1) % len(own_families)]
            wrong = vectors.left_out(other, shift, False) if other != item.family else None
            asked += [("bias_r2", item.family, own), ("bias_r2_family", None, own)]
            asked.append(("bias_r2_shuffled", None, wrong))
        for name, family, vector in asked:
            if vector is not None:
                errors[name, family].append(float(np.square(shift - vector).sum()))
                sizes[name, family].append(size)
    for (name, family), own in errors.items():
        if sum(sizes[name, family]) > 0:
            value, interval = ratio(own, sizes[name, family])
            yield estimate(name, value, "R²", len(own), interval, variant=vectors.variant, span=family)


def _tokens(vectors: Vectors, family: str | None, named: Mapping[int, str]) -> Iterator[Row]:
    for end, rank, token, value in vectors.listed(family):
        yield estimate(
            f"bias_{end}",
            value,
            "nats",
            vectors.counts[family],
            None,
            variant=vectors.variant,
            span=family,
            step=rank,
            tool=named.get(token, f"token {token}"),
        )


def _texts(table: pandas.DataFrame) -> dict[int, str]:
    rows = table[table.experiment == "text"]
    return {int(token): text for token, text in zip(rows.token, rows.text, strict=True)}


def _centred(log_p: np.ndarray) -> np.ndarray:
    return log_p - log_p.mean()
