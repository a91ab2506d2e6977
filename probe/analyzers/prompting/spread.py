"""How much depends on the wording: accuracy over variants that say the same (Sclar et al. 2024, FormatSpread).

Variants whose names are alike up to the last full stop are wordings of one: `template.1`, `template.2`, or
`order.a`, `order.b`. A choice that flips among them is no property of the task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from probe.analyzers.prompting.shift import NAME
from probe.analyzers.registry import FOLDED, SHARE, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.intervals import RESAMPLES, SEED, folded_interval, percentiles
from probe.runs.views.prompting import Item


def _spread(
    name: str, unit: str, means: str, interval: str | None = None, source: str | None = None
) -> Measure:
    return measure(
        NAME,
        name,
        unit=unit,
        of="run",
        axes="wording",
        means=means,
        source=source,
        interval=interval,
        figure=Figure(kind="estimates", by="wording"),
    )


ACCURACY_SPREAD = _spread(
    "accuracy_spread",
    "share of tasks",
    "Highest less lowest accuracy over the wordings: never negative, so too large for few tasks.",
    FOLDED,
    source="Sclar et al. 2024, FormatSpread",
)
ACCURACY_SPREAD_CHANCE = _spread(
    "accuracy_spread_chance",
    "share of tasks",
    "Mean of `accuracy_spread` where the wordings of each task are exchanged at random: of few tasks, some spread is "
    f"chance; {RESAMPLES:,} exchanges.",
    interval="95 % of the exchanges",
)
_OF_EACH = "chosen by it, so without an interval: `accuracy` of the variant has one."
ACCURACY_WORST = _spread("accuracy_worst", "share of tasks", f"Lowest accuracy over the wordings, {_OF_EACH}")
ACCURACY_BEST = _spread("accuracy_best", "share of tasks", f"Highest accuracy over the wordings, {_OF_EACH}")
CHOICE_AGREEMENT = _spread(
    "choice_agreement",
    "share of pairs",
    "Share of pairs of wordings that choose alike, mean over tasks.",
    SHARE,
)


def measures(items: Sequence[Item]) -> Iterator[Row]:
    """Of each group of wordings, over the tasks that have all of them."""
    for wording, names in wordings(items).items():
        whole = [item for item in items if all(name in item.outcomes for name in names)]
        scores = [[item.outcomes[name].score for name in names] for item in whole]
        scored = np.array([row for row in scores if None not in row], dtype=np.float64)
        if len(scored):
            yield from _accuracies(wording, scored)
        choices = [[item.outcomes[name].chosen for name in names] for item in whole]
        shares = [_agreement(row) for row in choices if None not in row]
        if shares:
            yield CHOICE_AGREEMENT.share(shares, wording=wording)


def wordings(items: Sequence[Item]) -> dict[str, list[str]]:
    """Wording → names of its variants, two or more."""
    wordings: dict[str, set[str]] = defaultdict(set)
    for item in items:
        for variant in item.variants:
            stem, dot, _ = variant.rpartition(".")
            if dot:
                wordings[stem].add(variant)
    return {stem: sorted(names) for stem, names in sorted(wordings.items()) if len(names) > 1}


def _accuracies(wording: str, scores: np.ndarray) -> Iterator[Row]:
    """scores is [task, wording]."""
    n = len(scores)
    means = scores.mean(0)
    interval = folded_interval(scores, lambda shares: np.ptp(shares, axis=-1))
    yield ACCURACY_SPREAD.row(WHOLE_RUN, np.ptp(means), n=n, interval=interval, wording=wording)
    for defined, value in ((ACCURACY_WORST, means.min()), (ACCURACY_BEST, means.max())):
        yield defined.row(WHOLE_RUN, value, n=n, wording=wording)
    generator = np.random.default_rng(SEED)
    exchanged = np.array([np.ptp(generator.permuted(scores, axis=1).mean(0)) for _ in range(RESAMPLES)])
    interval = percentiles(exchanged)
    yield ACCURACY_SPREAD_CHANCE.row(WHOLE_RUN, exchanged.mean(), n=n, interval=interval, wording=wording)


def _agreement(choices: Sequence[str | None]) -> float:
    pairs = [(a, b) for index, a in enumerate(choices) for b in choices[index + 1 :]]
    return sum(a == b for a, b in pairs) / len(pairs)
