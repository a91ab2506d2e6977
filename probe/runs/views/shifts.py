"""Shifts that a variant makes in the log-probabilities of the answer's first token, as vectors over the vocabulary."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item, groups

WORDS = 10
"""Tokens that are listed of each vector, at either end."""
LIKELY = 1e-4
"""Mean probability under the prompt or without it that a listed token has at least."""


class Vectors:
    """Sums over tasks of the shifts of one variant, overall and by family."""

    def __init__(self, variant: str):
        self.sums: dict[str | None, Any] = defaultdict(float)
        self.counts: dict[str | None, int] = defaultdict(int)
        self.mass: dict[str | None, Any] = defaultdict(float)
        self.variant = variant

    def add(self, family: str | None, after: np.ndarray, before: np.ndarray) -> None:
        """Log-probabilities [d_vocab] of a task under the variant, and bare."""
        shift, mass = centred(after) - centred(before), np.maximum(np.exp(after), np.exp(before))
        for key in {None, family}:
            self.sums[key] = self.sums[key] + shift
            self.mass[key] = self.mass[key] + mass
            self.counts[key] += 1

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


def pairs_of(item: Item) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(variant, log-probabilities under it, bare ones) of the variants of a task whose logits were captured, its file opened
    once."""
    before = item.log_probs(BASE)
    if before is None:
        return
    for variant in item.variants:
        after = item.log_probs(variant)
        if after is not None:
            yield variant, after, before


def vectors_of(items: Sequence[Item]) -> dict[str, Vectors]:
    """The vectors of every variant; of the tasks one is held at a time."""
    vectors: dict[str, Vectors] = {}
    for item in items:
        for variant, after, before in pairs_of(item):
            vectors.setdefault(variant, Vectors(variant)).add(item.family, after, before)
    return vectors


def listed_tokens(items: Sequence[Item]) -> list[int]:
    """Every token that is listed of some vector: what has to be turned into text."""
    tokens: set[int] = set()
    vectors = vectors_of(items)
    for variant, families in families_of(items).items():
        for family in families if variant in vectors else ():
            if vectors[variant].counts.get(family, 0) >= LEAST:
                tokens |= {token for _, _, token, _ in vectors[variant].listed(family)}
    return sorted(tokens)


def families_of(items: Sequence[Item]) -> dict[str, list[str | None]]:
    """Families that have each variant; null stands for all of them."""
    families: dict[str, list[str | None]] = defaultdict(list)
    for variant, family, _ in groups(items):
        families[variant].append(family)
    return families


def centred(log_p: np.ndarray) -> np.ndarray:
    """Log-probabilities less their mean over the vocabulary."""
    return log_p - log_p.mean()
