"""What is fitted to foretell errors, each on other tasks than it is tested on: a linear probe whose layer is chosen, the
best of all signals, and the probability of an error that a signal stands for.

Held-out scores come from five fits with five centres, so an AUROC counts pairs of tasks of one fold alone. Those fits share
tasks, so it varies more than that of as many new tasks: twice as much where nothing can be foretold, since each pair of folds
enters twice. Permuted labels, which go through the whole procedure, say how much more; intervals are widened by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from probe.analyzers.foresight.signals import PROBE, DecisionStates
from probe.maths.auroc import auroc_interval, mann_whitney
from probe.maths.folds import FOLDS
from probe.maths.intervals import Interval
from probe.maths.ridge import FoldRidge

LEAST_KIND = 10
"""Right choices, and wrong ones, below which nothing is fitted: two a fold."""
PERMUTATIONS = 99


@dataclass(frozen=True)
class Split:
    """Folds of tasks, and their labels beside permuted ones."""

    folds: np.ndarray
    """[task]"""
    labels: np.ndarray
    """[task, 1 + permutation], float32: 1 where the choice is wrong; then labels exchanged within folds."""
    pairs: np.ndarray
    """[fold]: pairs of a wrong and a right choice."""

    @classmethod
    def of(cls, wrong: np.ndarray, permutations: int = PERMUTATIONS) -> Split | None:
        """Folds with equally many wrong choices, at random, the same each time. None where there are too few of a kind."""
        if min(wrong.sum(), (~wrong).sum()) < LEAST_KIND:
            return None
        generator = np.random.default_rng(0)
        folds = np.zeros(len(wrong), dtype=int)
        start = 0
        for kind in (wrong, ~wrong):
            members = generator.permutation(np.flatnonzero(kind))
            folds[members] = (np.arange(len(members)) + start) % FOLDS
            start += len(members)
        labels = np.tile(wrong[:, None].astype(np.float32), 1 + permutations)
        for fold in range(FOLDS):
            labels[folds == fold, 1:] = generator.permuted(labels[folds == fold, 1:], axis=0)
        counts = [(wrong[folds == fold].sum(), (~wrong[folds == fold]).sum()) for fold in range(FOLDS)]
        return cls(folds, labels, np.array([a * b for a, b in counts]))

    def wins(self, scores: np.ndarray, fold: int) -> np.ndarray:
        """[label set]: pairs of the fold in which the wrong choice has the higher score; scores [task of the fold, …]."""
        return mann_whitney(
            np.broadcast_to(scores, (len(scores), self.labels.shape[1])), self.labels[self.folds == fold]
        )


@dataclass(frozen=True)
class HeldOut:
    """Scores of tasks by what was fitted on other folds."""

    wins: np.ndarray
    """[fold, label set]"""
    scores: np.ndarray
    """[task]: by the true labels; higher where an error is expected. Comparable within a fold alone."""
    known: np.ndarray
    """[fold, task]: scores of the tasks of the other folds, from fits without the fold and without the task's own."""
    selecting: np.ndarray
    """[fold, label set]: AUROC within the other folds of what was chosen on them."""
    chosen: list[int | str]
    """[fold]: the layer, or the signal, that was chosen on the other folds."""

    def estimate(self, split: Split) -> tuple[float, Interval | None, float]:
        """AUROC, its interval, and the share of label sets (the true one counted) that reach it."""
        areas = self.wins.sum(0) / split.pairs.sum()
        wrong = split.labels[:, 0] > 0
        reached = float((areas >= areas[0]).mean())
        return float(areas[0]), auroc_interval(areas[0], *_counts(wrong), self.widening(split)), reached

    def widening(self, split: Split) -> float:
        """How much more the AUROC of permuted labels varies than that of as many new tasks; at least 1."""
        areas = self.wins[:, 1:].sum(0) / split.pairs.sum()
        m, n = _counts(split.labels[:, 0] > 0)
        plain = (m + n + 1) / (12 * m * n)
        return max(1.0, float(np.square(areas - 0.5).mean()) / plain)


def _counts(wrong: np.ndarray) -> tuple[int, int]:
    return int(wrong.sum()), int((~wrong).sum())


@dataclass(frozen=True)
class ProbeFit:
    """The linear probe of every layer, cross-validated, and with the layer that was chosen on the other folds."""

    layers: list[int]
    by_layer: list[HeldOut]
    """[layer]: without any choice; `known` and `selecting` are empty."""
    nested: HeldOut

    @property
    def best_layer(self) -> int:
        """The layer of the highest AUROC over all folds: to be tested on other tasks only."""
        return self.layers[int(np.argmax([held.wins[:, 0].sum() for held in self.by_layer]))]


def fit_probe(states: DecisionStates, split: Split) -> ProbeFit:
    """The probe of every layer, one layer held at a time; the layer is chosen for every label set on its own."""
    n, sets = split.labels.shape
    inside = [split.folds == fold for fold in range(FOLDS)]
    selecting, held_wins = np.full((FOLDS, sets), -1.0), np.zeros((FOLDS, sets))
    scores, known = np.zeros(n), np.zeros((FOLDS, n))
    chosen: list[int | str] = [states.layers[0]] * FOLDS
    by_layer = []
    for layer in states.layers:
        regression = FoldRidge(states.layer(layer), split.folds)
        inner, inner_known = np.zeros((FOLDS, sets)), np.zeros((FOLDS, n))
        wins, plain = np.zeros((FOLDS, sets)), np.zeros(n)
        for fold in range(FOLDS):
            predicted = regression.predict(split.labels, [fold])[fold]
            wins[fold], plain[inside[fold]] = split.wins(predicted, fold), predicted[:, 0]
        for pair in combinations(range(FOLDS), 2):
            for asked, predicted in regression.predict(split.labels, pair).items():
                fold = sum(pair) - asked
                inner[fold] += split.wins(predicted, asked)
                inner_known[fold, inside[asked]] = predicted[:, 0]
        by_layer.append(HeldOut(wins, plain, np.empty(0), np.empty(0), []))
        for fold in range(FOLDS):
            area = inner[fold] / np.delete(split.pairs, fold).sum()
            better = area > selecting[fold]
            selecting[fold, better] = area[better]
            held_wins[fold, better] = wins[fold, better]
            if better[0]:
                chosen[fold] = layer
                scores[inside[fold]] = plain[inside[fold]]
                known[fold] = inner_known[fold]
    return ProbeFit(states.layers, by_layer, HeldOut(held_wins, scores, known, selecting, chosen))


def choose_signal(signals: Mapping[str, np.ndarray], probe: HeldOut | None, split: Split) -> HeldOut:
    """The signal of the highest AUROC in the other folds, whatever it is: raw signals (more of them means right), and the
    probe. All are of the split's tasks."""
    wins = {
        name: np.stack([split.wins(-values[split.folds == fold, None], fold) for fold in range(FOLDS)])
        for name, values in signals.items()
    }
    total = split.pairs.sum()
    areas = {name: (won.sum(0) - won) / (total - split.pairs)[:, None] for name, won in wins.items()}
    known = {name: np.tile(-values, (FOLDS, 1)) for name, values in signals.items()}
    scores = {name: -values for name, values in signals.items()}
    if probe is not None:
        wins[PROBE], areas[PROBE], scores[PROBE], known[PROBE] = (
            probe.wins,
            probe.selecting,
            probe.scores,
            probe.known,
        )
    names = list(wins)
    stacked = np.stack([areas[name] for name in names])
    best = stacked.argmax(0)
    held_wins = np.take_along_axis(np.stack([wins[name] for name in names]), best[None], 0)[0]
    chosen: list[int | str] = [names[best[fold, 0]] for fold in range(FOLDS)]
    merged, merged_known = np.zeros(len(split.folds)), np.zeros((FOLDS, len(split.folds)))
    for fold, name in enumerate(chosen):
        inside = split.folds == fold
        merged[inside] = scores[str(name)][inside]
        merged_known[fold] = known[str(name)][fold]
    return HeldOut(held_wins, merged, merged_known, stacked.max(0), chosen)


def ranks_within(scores: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """[task]: share of its fold that scores lower, so that tasks of different fits can be put in one order."""
    from scipy.stats import rankdata

    out = np.zeros(len(scores))
    for fold in np.unique(folds):
        inside = folds == fold
        out[inside] = (rankdata(scores[inside]) - 0.5) / inside.sum()
    return out


def probability_of(scores: np.ndarray, wrong: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """P(wrong) of the asked scores by a logistic regression on a standardized score, fitted on others (Platt 1999)."""
    from sklearn.linear_model import LogisticRegression

    mean, std = scores.mean(), scores.std() or 1.0
    fit = LogisticRegression().fit(((scores - mean) / std)[:, None], wrong)
    return fit.predict_proba(((asked - mean) / std)[:, None])[:, 1]
