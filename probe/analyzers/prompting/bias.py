"""Does one vector explain the shift? The mean over inputs of the change of vocabulary-centred log-probabilities.

b_i = c(log p(·|prompt, x_i)) − c(log p(·|x_i)), c taking off the mean over the vocabulary, which makes log-probabilities
and logits the same. The claim that a prompt adds one vector to every input's logits is b_i = b; its test is
leave-one-out: R² = 1 − Σ‖b_i − b̄₋ᵢ‖² / Σ‖b_i‖², 1 where one vector explains all, 0 where it explains as much
as no vector, below 0 where less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.prompting.estimates import estimate, ratio
from probe.analyzers.rows import Row
from probe.prompts.labels import BASE
from probe.runs.views.prompting import LEAST, Item
from probe.runs.views.shifts import Vectors, centred, families_of

if TYPE_CHECKING:
    import pandas


def measures(items: Sequence[Item], table: pandas.DataFrame) -> Iterator[Row]:
    """`bias_r2` by variant (one vector) and by family, controls, and the tokens that each vector moves."""
    named = {} if table.empty else _texts(table)
    for variant, families in families_of(items).items():
        vectors = Vectors(variant, [item for item in items if variant in item.passages])
        yield from _explained(vectors, families)
        for family in families:
            if vectors.counts.get(family, 0) >= LEAST:
                yield from _tokens(vectors, family, named)


def _explained(vectors: Vectors, families: Sequence[str | None]) -> Iterator[Row]:
    """R² of the vector of all tasks; of the own family's; of another family's, which is the control."""
    errors: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    sizes: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    own_families = [family for family in families if family is not None]
    for item in vectors.items:
        after, before = item.log_probs(vectors.variant), item.log_probs(BASE)
        assert after is not None and before is not None
        shift = centred(after) - centred(before)
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
