"""How much depends on the wording: accuracy over variants that say the same (Sclar et al. 2024, FormatSpread).

Variants whose names are alike up to the last full stop are wordings of one: `template.1`, `template.2`, or
`order.a`, `order.b`. A choice that flips among them is no property of the task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from probe.analyzers.prompting.estimates import estimate
from probe.analyzers.rows import Row
from probe.runs.views.prompting import Item

_DRAWS = 1000


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """By group of wordings (`variant`): `accuracy_spread`, highest − lowest accuracy, `accuracy_worst`,
    `accuracy_best`, and `choice_agreement`, the share of pairs of wordings that choose alike."""
    for group, names in _groups(items).items():
        whole = [item for item in items if all(name in item.passages for name in names)]
        scores = [[item.passages[name].score for name in names] for item in whole]
        kept = np.array([row for row in scores if None not in row], dtype=np.float64)
        if len(kept):
            yield from _accuracies(group, kept)
        choices = [[item.passages[name].chosen for name in names] for item in whole]
        shares = np.array([_agreement(row) for row in choices if None not in row])
        if len(shares):
            drawn = np.random.default_rng(0).integers(len(shares), size=(_DRAWS, len(shares)))
            low, high = np.quantile(shares[drawn].mean(1), [0.025, 0.975])
            yield estimate(
                "choice_agreement",
                float(shares.mean()),
                "share of pairs",
                len(shares),
                (float(low), float(high)),
                variant=group,
            )


def _groups(items: Sequence[Item]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for variant in item.variants:
            stem, dot, _ = variant.rpartition(".")
            if dot:
                found[stem].add(variant)
    return {stem: sorted(names) for stem, names in sorted(found.items()) if len(names) > 1}


def _accuracies(group: str, scores: np.ndarray) -> Iterator[Row]:
    """scores is [task, wording]. The spread of few tasks is too large by chance alone: `accuracy_spread_chance` is
    its mean where each task's wordings are exchanged at random."""
    rng = np.random.default_rng(0)
    drawn = scores[rng.integers(len(scores), size=(_DRAWS, len(scores)))].mean(1)
    exchanged = rng.permuted(np.broadcast_to(scores, (_DRAWS, *scores.shape)), axis=2).mean(1)
    means = scores.mean(0)
    for name, value, values in (
        ("accuracy_spread", np.ptp(means), np.ptp(drawn, axis=1)),
        ("accuracy_worst", means.min(), drawn.min(1)),
        ("accuracy_best", means.max(), drawn.max(1)),
        ("accuracy_spread_chance", np.ptp(exchanged, axis=1).mean(), np.ptp(exchanged, axis=1)),
    ):
        low, high = np.quantile(values, [0.025, 0.975])
        yield estimate(
            name, float(value), "share of tasks", len(scores), (float(low), float(high)), variant=group
        )


def _agreement(choices: Sequence[str | None]) -> float:
    pairs = [(a, b) for index, a in enumerate(choices) for b in choices[index + 1 :]]
    return sum(a == b for a, b in pairs) / len(pairs)
