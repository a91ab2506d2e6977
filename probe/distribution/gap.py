"""Loss as energy against free energy: −log p(token) = (E_token − F)/τ, token by token, and between two sets of texts.

E and F are in the centred gauge, so that they can be compared between positions. At τ = 1 the loss is E − F: the gap
in loss between two sets of texts is the gap in the energy of their tokens minus the gap in free energy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from probe.distribution.source import Distribution
from probe.errors import UsageError

_NAMES = (("cross_entropy", "nats"), ("energy", "logits"), ("free_energy", "logits"), ("entropy", "nats"))


def tokens(places: Iterable[Distribution], temperature: float = 1.0) -> list[dict[str, Any]]:
    """A row a token that follows: `energy` and `free_energy` (centred, logits), `cross_entropy`, `entropy` (nats)."""
    from probe.maths.distribution import boltzmann, gauge_shift

    rows = []
    for seen in places:
        if seen.token is None:
            continue
        z = seen.logits.double()
        state = boltzmann(z, temperature, "centred")
        energy = float(gauge_shift(z, "centred")) - float(z[seen.token])
        free = float(state.free_energy)
        text = {"text": seen.texts(seen.token)} if seen.texts else {}
        row = {"energy": energy, "free_energy": free, "cross_entropy": (energy - free) / temperature}
        rows.append(seen.source | {"token": seen.token} | text | row | {"entropy": float(state.entropy)})
    if not rows:
        raise UsageError("no token follows another one here: give a text of at least one token")
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over tokens with 95 % intervals over texts, None below eight; n counts texts."""
    texts = _sums(rows)
    out: dict[str, Any] = {"tokens": len(rows), "texts": len(texts)}
    for name, unit in _NAMES:
        value, low, high = _estimate([(texts, name)])
        out[name] = {"value": value, "low": low, "high": high, "n": len(texts), "unit": unit}
    return out


def gap(base: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Other minus own, of each mean, with 95 % intervals from how texts differ in both sets."""
    sets = _sums(base), _sums(other)
    out = {}
    for name, unit in _NAMES:
        value, low, high = _estimate([(sets[1], name), (sets[0], name)])
        n = len(sets[0]) + len(sets[1])
        out[name] = {"value": value, "low": low, "high": high, "n": n, "unit": unit}
    return out


def _sums(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Number of tokens and sum of each number, a mapping a text."""
    by_text: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        sums = by_text[row["task_id"]]
        sums["tokens"] += 1
        for name, _ in _NAMES:
            sums[name] += row[name]
    return list(by_text.values())


def _estimate(terms: list[tuple[list[dict[str, float]], str]]) -> tuple[float, float | None, float | None]:
    """Mean a token of the first set (minus that of the second), and its interval over texts: of two sets Welch's t on
    the linearised ratios."""
    import numpy as np

    from probe.maths.intervals import ratio_interval, welch_interval

    sums = [
        (np.array([t[name] for t in texts]), np.array([t["tokens"] for t in texts])) for texts, name in terms
    ]
    means = [float(above.sum() / below.sum()) for above, below in sums]
    interval = ratio_interval(*sums[0]) if len(sums) == 1 else welch_interval(sums[0], sums[1])
    low, high = interval or (None, None)
    return means[0] - sum(means[1:]), low, high
