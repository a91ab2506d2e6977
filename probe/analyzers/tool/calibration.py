"""The temperature τ of P(tool|context) = softmax(log P(name)/τ), and how far its probabilities can be believed.

τ divides summed log-probabilities: it acts on the choice among candidates, not on the tokens that generation
draws. It changes no choice, only how sure the choice is.

Confidence is the probability of the most probable candidate, no-tool included; it is right where that candidate
is. `brier` is (confidence − right)², between 0 and 1; `brier_multiclass` is of all candidates, between 0 and 2; `ece` Σ_b n_b/n · |accuracy_b − confidence_b| (Guo
et al. 2017, eq. 3), which is never negative and so too large for few tasks. Nothing is fitted on fewer than
`MIN_TASKS` tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from probe.analyzers.registry import FOLDED, MEAN, SHARE, WILSON, Figure, Measure, measure
from probe.analyzers.rows import WHOLE_RUN, Row
from probe.maths.folds import FOLDS, folds
from probe.maths.intervals import Estimate, Interval, folded_interval, mean_interval, percentiles
from probe.runs.views.choice import Choice, choices

if TYPE_CHECKING:
    from probe.runs import Run

TAUS = tuple(2.0 ** (k / 2) for k in range(-6, 11))
"""1/8 … 32, half a power of two apart."""
TAU_RANGE = (0.01, 100.0)
MIN_TASKS = 10
TAU_TASKS = 20
"""Tasks below which the fitted τ has no interval."""
BINS = 10
PER_BIN = 10
_NEEDS = (f"{MIN_TASKS} tasks",)
_BINS = Figure(kind="curve", x="bin", by="rule", card="certainty")
_SCORES = Figure(kind="table", by="rule", card="certainty")


def _swept(name: str, unit: str, means: str, interval: str = MEAN) -> Measure:
    return measure(
        "tool",
        name,
        unit=unit,
        of="run",
        axes="temperature",
        means=means,
        interval=interval,
        figure=Figure(kind="curve", x="temperature", card="certainty"),
    )


TAU_ENTROPY = _swept("tau_entropy", "nats", "Mean entropy of P_τ = softmax(log P / τ) over the candidates.")
TAU_TOP1 = _swept("tau_top1", "probability", "Mean of the largest P_τ.", SHARE)
TAU_ACCURACY = _swept(
    "tau_accuracy",
    "probability",
    "Mean P_τ of the right candidates: the expected accuracy of drawing the choice.",
    SHARE,
)
TAU_LOG_LOSS = _swept("tau_log_loss", "nats", "Mean −log P_τ(right).")
TAU_FITTED = measure(
    "tool",
    "tau_fitted",
    unit="temperature",
    of="run",
    axes="rule?",
    means=f"The τ of least `tau_log_loss` between {TAU_RANGE[0]:g} and {TAU_RANGE[1]:g}; rule `bound` where that is an end "
    "of the range, which means that there is none.",
    source="Guo et al. 2017, section 4.2",
    interval=f"95 %: every τ at which the mean slope of the loss may be 0, from {TAU_TASKS} tasks on",
    needs=_NEEDS,
    figure=Figure(kind="text", card="certainty"),
)
TAU_FOLD = measure(
    "tool",
    "tau_fold",
    unit="temperature",
    of="run",
    axes="fold",
    means="The τ fitted without the tasks of a fold; n are the tasks that it was fitted on.",
    needs=_NEEDS,
    figure=Figure(kind="text", card="certainty"),
)
LOG_LOSS = measure(
    "tool",
    "log_loss",
    unit="nats",
    of="run",
    axes="rule",
    means="Mean −log P(right) of held-out tasks: `raw` with τ = 1, `fitted` with the τ of the folds that a task is not in.",
    interval=MEAN,
    needs=_NEEDS,
    figure=_SCORES,
)
LOG_LOSS_GAIN = measure(
    "tool",
    "log_loss_gain",
    unit="nats",
    of="run",
    means="`log_loss` with τ = 1 minus that with the fitted τ.",
    interval=MEAN,
    needs=_NEEDS,
    figure=_SCORES,
)
BRIER = measure(
    "tool",
    "brier",
    unit="probability",
    of="run",
    axes="rule",
    means="The top-label Brier score: mean (confidence − right)² of held-out tasks, where confidence is the probability of "
    "the most probable candidate and right is 1 where that is right. It is not the score over all candidates, which is "
    "`brier_multiclass`.",
    interval=SHARE,
    needs=_NEEDS,
    figure=_SCORES,
)
BRIER_MULTICLASS = measure(
    "tool",
    "brier_multiclass",
    unit="score, 0 to 2",
    of="run",
    axes="rule",
    means="The Brier score over all candidates: mean (1 − P(right))² + Σ_wrong P² of held-out tasks, where several right "
    "candidates count as one.",
    source="Brier 1950",
    interval=MEAN,
    needs=_NEEDS,
    figure=_SCORES,
)
ECE = measure(
    "tool",
    "ece",
    unit="probability",
    of="run",
    axes="rule binning",
    means="Σ_b n_b/n · |accuracy_b − confidence_b| over bins b of equal `width` or `mass`; never negative, so too large for "
    "few tasks: compare it with `ece_floor`.",
    source="Guo et al. 2017, eq. 3",
    interval=FOLDED,
    needs=_NEEDS,
    figure=_SCORES,
)
ECE_FLOOR = measure(
    "tool",
    "ece_floor",
    unit="probability",
    of="run",
    axes="rule binning",
    means="Mean `ece` of a model that is as confident and calibrated: what chance alone gives.",
    source="Bröcker and Smith 2007",
    interval="95 % range of draws",
    needs=_NEEDS,
    figure=_SCORES,
)
RELIABILITY_ACCURACY = measure(
    "tool",
    "reliability_accuracy",
    unit="share of tasks",
    of="run",
    axes="rule binning bin",
    means="Share of right choices among the n tasks whose confidence is in the bin; an empty bin has no row.",
    interval=WILSON,
    needs=_NEEDS,
    figure=_BINS,
)
RELIABILITY_CONFIDENCE = measure(
    "tool",
    "reliability_confidence",
    unit="probability",
    of="run",
    axes="rule binning bin",
    means="Mean confidence of the tasks in the bin.",
    interval=SHARE,
    needs=_NEEDS,
    figure=_BINS,
)
_GRID = np.geomspace(*TAU_RANGE, 401)
_DRAWN = 1 << 21
"""Numbers drawn at a time."""


def measures(run: Run) -> Iterator[Row]:
    """The sweep of τ, the fitted τ, and calibration before and after fitting."""
    known = choices(run)
    if not known:
        return
    scores, right = stacked(known)
    yield from _sweep(scores, right)
    if len(known) >= MIN_TASKS:
        yield from _fitted(scores, right)
        yield from _held_out(scores, right)


def stacked(known: Sequence[Choice]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities, −inf beyond a task's candidates, and whether each is right; both [task, candidate]."""
    width = max(len(case.names) for case in known)
    scores = np.full((len(known), width), -np.inf)
    right = np.zeros((len(known), width), dtype=bool)
    for row, case in enumerate(known):
        scores[row, : len(case.names)] = case.log_probs
        right[row, : len(case.names)] = case.is_right
    return scores, right


def log_loss(scores: np.ndarray, right: np.ndarray, tau: float | np.ndarray) -> np.ndarray:
    """−log P_τ(right candidates) of each task, nats; `tau` is one number or one a task."""
    return _lse(scores, tau) - _lse(np.where(right, scores, -np.inf), tau)


def _lse(scores: np.ndarray, tau: float | np.ndarray) -> np.ndarray:
    scaled = scores / np.asarray(tau).reshape(-1, 1)
    top = scaled.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(scaled - top).sum(-1))


def fit_tau(scores: np.ndarray, right: np.ndarray) -> float:
    """The τ in `TAU_RANGE` of least mean log-loss. With several right candidates it may have two minima, so
    the grid is searched first."""
    from scipy.optimize import minimize_scalar

    best = int(np.argmin(_losses(scores, right).mean(0)))
    low, high = np.log(_GRID[max(best - 1, 0)]), np.log(_GRID[min(best + 1, len(_GRID) - 1)])
    minimum = minimize_scalar(
        lambda log_tau: float(log_loss(scores, right, np.exp(log_tau)).mean()),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return float(np.exp(minimum.x))  # type: ignore[attr-defined]


def tau_interval(scores: np.ndarray, right: np.ndarray) -> Interval | None:
    """Of the fitted τ: every τ of the grid at which the interval of the mean slope of the loss over tasks holds 0; an end
    of TAU_RANGE where none beyond it is refused. None where every τ is."""
    kept = []
    for tau in _GRID:
        interval = mean_interval(_slopes(scores, right, tau))
        if interval is not None and interval[0] <= 0 <= interval[1]:
            kept.append(float(tau))
    return (kept[0], kept[-1]) if kept else None


def _slopes(scores: np.ndarray, right: np.ndarray, tau: float) -> np.ndarray:
    """[task]: slope of the log-loss on 1/τ, the mean score under P_τ less that of the right candidates alone."""
    finite = np.where(np.isfinite(scores), scores, 0.0)
    means = [
        (_probabilities(kept, tau) * finite).sum(-1) for kept in (scores, np.where(right, scores, -np.inf))
    ]
    return means[0] - means[1]


def _losses(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[task, τ of the grid]."""
    return np.stack([log_loss(scores, right, tau) for tau in _GRID], axis=1)


# -- the sweep -------------------------------------------------------------------------------------------------


def _probabilities(scores: np.ndarray, tau: float | np.ndarray) -> np.ndarray:
    scaled = scores / np.asarray(tau).reshape(-1, 1)
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _sweep(scores: np.ndarray, right: np.ndarray) -> Iterator[Row]:
    for tau in TAUS:
        p = _probabilities(scores, tau)
        surprise = -np.log(np.where(p > 0, p, 1.0))
        yield TAU_ENTROPY.mean((p * surprise).sum(-1), temperature=tau)
        yield TAU_TOP1.share(p.max(-1), temperature=tau)
        yield TAU_ACCURACY.share((p * right).sum(-1), temperature=tau)
        yield TAU_LOG_LOSS.mean(log_loss(scores, right, tau), temperature=tau)


# -- the fit ---------------------------------------------------------------------------------------------------


def _fitted(scores: np.ndarray, right: np.ndarray) -> Iterator[Row]:
    tau = fit_tau(scores, right)
    interval = tau_interval(scores, right) if len(scores) >= TAU_TASKS else None
    at_bound = not _GRID[1] < tau < _GRID[-2]
    rule = "bound" if at_bound else None
    yield TAU_FITTED.row(WHOLE_RUN, tau, n=len(scores), interval=interval, rule=rule)


def _held_out(scores: np.ndarray, right: np.ndarray) -> Iterator[Row]:
    fold = folds(len(scores))
    tau = np.ones(len(scores))
    for number in range(FOLDS):
        held = fold == number
        tau[held] = fit_tau(scores[~held], right[~held])
        yield TAU_FOLD.row(WHOLE_RUN, tau[held][0], n=int((~held).sum()), fold=number)
    hits = np.take_along_axis(right, scores.argmax(-1)[:, None], 1)[:, 0].astype(float)
    losses = {}
    for rule, taus in (("raw", np.ones(len(scores))), ("fitted", tau)):
        losses[rule] = log_loss(scores, right, taus)
        yield LOG_LOSS.mean(losses[rule], rule=rule)
        p = _probabilities(scores, taus)
        confidence = p.max(-1)
        yield BRIER.share((confidence - hits) ** 2, rule=rule)
        missed = 1 - (p * right).sum(-1)
        yield BRIER_MULTICLASS.mean(missed**2 + np.square(p * ~right).sum(-1), rule=rule)
        for binning, bins in (("width", equal_width(confidence)), ("mass", equal_mass(confidence))):
            yield from _reliability(confidence, hits, bins, rule=rule, binning=binning)
    yield LOG_LOSS_GAIN.mean(losses["raw"] - losses["fitted"])


# -- reliability -----------------------------------------------------------------------------------------------


def equal_width(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: `BINS` of equal width, each without its lower edge."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)


def equal_mass(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence: bounded by quantiles, so that equal confidences stay together."""
    n_bins = max(1, min(BINS, len(confidence) // PER_BIN))
    return np.searchsorted(np.quantile(confidence, np.linspace(0, 1, n_bins + 1)[1:-1]), confidence)


def calibrated_ece(confidence: np.ndarray, bins: np.ndarray, draws: int = 1999, seed: int = 0) -> np.ndarray:
    """[draw]: ECE of a model that is right exactly as often as it is confident, with as many tasks in the same
    bins (consistency resampling, Bröcker & Smith 2007)."""
    n, generator, inside = len(confidence), np.random.default_rng(seed), np.eye(BINS)[bins]
    rows = max(1, _DRAWN // n)
    return np.concatenate(
        [
            np.abs(
                ((generator.random((min(rows, draws - start), n)) < confidence) - confidence) @ inside
            ).sum(1)
            / n
            for start in range(0, draws, rows)
        ]
    )


def calibration_error(
    confidence: np.ndarray, hits: np.ndarray, bins: np.ndarray
) -> tuple[Estimate, Estimate]:
    """ECE of some tasks in their bins, and what a calibrated model has: the mean and the middle 95 % of `calibrated_ece`."""
    n = len(bins)
    gaps = np.zeros((n, BINS))
    gaps[np.arange(n), bins] = hits - confidence
    interval = folded_interval(gaps, lambda means: np.abs(means).sum(-1))
    floor = calibrated_ece(confidence, bins)
    ece = Estimate(float(np.abs(gaps.sum(0)).sum() / n), interval)
    return ece, Estimate(float(floor.mean()), percentiles(floor))


def _reliability(confidence: np.ndarray, hits: np.ndarray, bins: np.ndarray, **place: str) -> Iterator[Row]:
    ece, floor = calibration_error(confidence, hits, bins)
    yield ECE.row(WHOLE_RUN, ece.value, n=len(bins), interval=ece.interval, **place)
    yield ECE_FLOOR.row(WHOLE_RUN, floor.value, n=len(bins), interval=floor.interval, **place)
    for number in np.unique(bins):
        inside = bins == number
        yield RELIABILITY_ACCURACY.share(hits[inside], bin=int(number), **place)
        yield RELIABILITY_CONFIDENCE.share(confidence[inside], bin=int(number), **place)
