"""The output distributions of a run: against τ, their nuclei, their energies and their heat capacity.

Curves are means over the first captured decision of a few tasks, computed from their whole rows of logits; dots are
every decision whose measures the page holds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from probe.report.found import Estimate, Row, estimate, short

if TYPE_CHECKING:
    from torch import Tensor

    from probe.runs import Run

SHOWN = frozenset(("entropy", "nucleus_size", "nucleus_follows_entropy", "k_too_small", "k_too_large"))
OF_A_TASK = SHOWN | {"log_partition", "energy_mean", "free_energy", "token_energy", "temperature"}
"""Of a single task, what the card shows and what is one of many numbers of a decision."""
DECISIONS = 16
"""Distributions that curves are the mean of."""
DOTS = 200
P = "0.9"
BINS = 40
_TAUS = [2 ** (at / 2) for at in range(-6, 7)]


def card(run: Run, whole: list[Row], by_task: dict[str, list[Row]]) -> dict[str, Any] | None:
    """`curves`: by name, [x, mean, low, high]; `energies`: densities by bin; `dots`: [entropy, size, task, step].

    None where nothing was measured: no logits were captured, or the run is not analyzed.
    """
    rows = [row for row in whole if row["analyzer"] == "distribution"]
    if not rows:
        return None
    logits = _first_decisions(run)
    found = {
        "n": len(logits),
        "d_vocab": len(logits[0]) if logits else 0,
        "p": P,
        "follows": _one(rows, "nucleus_follows_entropy", f"p={P}"),
        "fixed": _fixed(rows),
        **_dots(by_task),
    }
    return found | (_drawn(logits) if logits else {"curves": {}, "energies": None})


def _first_decisions(run: Run) -> list[Tensor]:
    from probe.analyzers.distribution import KINDS, decisions
    from probe.analyzers.rows import finished

    firsts = (next(iter(decisions(task)), None) for task in finished(run, *KINDS))
    usable = (one.logits.double() for one in firsts if one is not None and bool(one.logits.max().isfinite()))
    return list(islice(usable, DECISIONS))


def _drawn(logits: list[Tensor]) -> dict[str, Any]:
    from probe.maths.distribution import boltzmann, heat_capacity_peak

    by_tau: dict[str, list[list[Any]]] = {"entropy": [], "top1": [], "heat_capacity": []}
    for tau in _TAUS:
        states = [boltzmann(z, tau) for z in logits]
        highest = [
            math.exp(float(z.max()) / tau - float(s.log_partition))
            for z, s in zip(logits, states, strict=True)
        ]
        by_tau["entropy"].append(_mean(tau, [float(state.entropy) for state in states]))
        by_tau["top1"].append(_mean(tau, highest))
        by_tau["heat_capacity"].append(_mean(tau, [float(state.heat_capacity) for state in states]))
    peaks = [peak[0] for z in logits if (peak := heat_capacity_peak(z))]
    curves = by_tau | {"nucleus": _nucleus(logits)}
    return {"curves": curves, "energies": _energies(logits), "peak": _mean(0, peaks)[1:] if peaks else None}


def _mean(x: float, values: list[float]) -> list[float | None]:
    from probe.maths.statistics import bootstrap_mean

    low, high = bootstrap_mean(values, resamples=999) or (None, None)
    return [short(number) for number in (x, sum(values) / len(values), low, high)]


def _nucleus(logits: list[Tensor]) -> list[list[float | None]]:
    """Mass of the k most probable tokens, for k = 1, 2, 4, … and the whole vocabulary."""
    masses = [z.softmax(-1).sort(descending=True).values.cumsum(-1) for z in logits]
    size = min(len(mass) for mass in masses)
    at = [2**power for power in range(size.bit_length()) if 2**power < size] + [size]
    return [_mean(k, [min(1.0, float(mass[k - 1])) for mass in masses]) for k in at]


def _energies(logits: list[Tensor]) -> dict[str, Any]:
    """Density per logit of E = −z in the centred gauge, of all tokens and weighted by their probability."""
    import numpy as np

    rows = []
    for z in logits:
        kept = z[z.isfinite()]
        rows.append((kept.mean() - kept).numpy())
    low, high = min(float(e.min()) for e in rows), max(float(e.max()) for e in rows)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    every = np.mean([np.histogram(e, edges, density=True)[0] for e in rows], axis=0)
    weights = [np.exp(e.min() - e) for e in rows]
    pairs = zip(rows, weights, strict=True)
    likely = np.mean([np.histogram(e, edges, weights=w, density=True)[0] for e, w in pairs], axis=0)
    middles = (edges[:-1] + edges[1:]) / 2
    return {
        "all": [[short(float(x)), short(float(y))] for x, y in zip(middles, every, strict=True)],
        "weighted": [[short(float(x)), short(float(y))] for x, y in zip(middles, likely, strict=True)],
    }


def _one(rows: list[Row], name: str, variant: str) -> Estimate | None:
    return next((estimate(row) for row in rows if (row["name"], row["variant"]) == (name, variant)), None)


def _fixed(rows: list[Row]) -> list[dict[str, Any]]:
    out = []
    for row in rows:
        if row["name"] == "k_too_small" and row["variant"].endswith(f"/p={P}"):
            k = int(row["variant"].split("/")[0].removeprefix("k="))
            out.append(
                {"k": k, "too_small": estimate(row), "too_large": _one(rows, "k_too_large", row["variant"])}
            )
    return out


def _dots(by_task: dict[str, list[Row]]) -> dict[str, Any]:
    """Entropy and nucleus size of decisions, the first `DOTS` of them; `decisions` counts all."""
    dots: dict[tuple[str, str, int], dict[str, float]] = defaultdict(dict)
    for task_id, rows in by_task.items():
        for row in rows:
            if row["analyzer"] != "distribution" or row["step"] is None:
                continue
            *passage, detail = (row["variant"] or "").split("/")
            if row["name"] == "nucleus_size" and detail == f"p={P}":
                dots[task_id, "/".join(passage), row["step"]]["size"] = row["value"]
            elif row["name"] == "entropy" and detail != "sampled":
                dots[task_id, row["variant"] or "", row["step"]]["entropy"] = row["value"]
    there = [
        [short(one["entropy"]), one["size"], " ".join(filter(None, (task, passage))), step]
        for (task, passage, step), one in dots.items()
        if len(one) == 2
    ]
    return {"dots": there[:DOTS], "decisions": len(there)}
