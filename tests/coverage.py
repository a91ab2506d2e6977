"""How often each kind of interval holds what it estimates, by simulation, and how many tasks an effect needs.

`python -m tests.coverage docs/intervals.md` writes the tables of that page anew; tests/test_intervals.py holds them.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probe.analyzers.prompting.bias import Products
from probe.analyzers.prompting.pattern import cosine_sums, pair_mean
from probe.analyzers.tool import calibration
from probe.analyzers.tool.estimates import half_sum
from probe.analyzers.tool.intention import average, mutual_information
from probe.maths.auroc import auroc
from probe.maths.intervals import (
    Interval,
    folded_interval,
    mean_interval,
    ratio_interval,
    share_interval,
    share_ratio,
    wilson,
)
from probe.maths.paired import difference_interval
from probe.maths.rank_correlation import spearman, spearman_within

NOMINAL = (0.93, 0.97)
Sample = tuple[Interval | None, float]
"""An interval of one simulated run, and the truth."""


class Case(NamedTuple):
    """An estimator under a law, at numbers of tasks."""

    estimator: str
    law: str
    tasks: tuple[int, ...]
    draw: Callable[[np.random.Generator, int], Sample]
    samples: int = 2000


def coverage(case: Case, n: int, samples: int | None = None) -> tuple[float, float]:
    """Share of simulated runs of n tasks that have an interval and whose interval holds the truth, and of those that
    have one."""
    generator = np.random.default_rng([zlib.crc32(f"{case.estimator}{case.law}".encode()), n])
    drawn = [case.draw(generator, n) for _ in range(samples or case.samples)]
    held = [interval[0] <= truth <= interval[1] for interval, truth in drawn if interval is not None]
    return (float(np.mean(held)) if held else float("nan")), len(held) / len(drawn)


# -- laws ----------------------------------------------------------------------------------------------------------


def _of_mean(values: Callable[[np.random.Generator, int], np.ndarray], truth: float):
    return lambda generator, n: (mean_interval(values(generator, n)), truth)


def _of_share(values: Callable[[np.random.Generator, int], np.ndarray], truth: float):
    return lambda generator, n: (share_interval(values(generator, n)), truth)


def _any_share(generator: np.random.Generator, n: int) -> Sample:
    truth = generator.random()
    return wilson(generator.binomial(n, truth) / n, n), truth


def _mixed_orders(generator: np.random.Generator, n: int) -> np.ndarray:
    """Shares of 6 orders in which a tool is the choice, alike within a task."""
    return generator.binomial(6, generator.beta(1, 2, n)) / 6


def _pairs(generator: np.random.Generator, n: int) -> Sample:
    """Pairs of tools that flip, 1 to 6 a task, alike within a task."""
    pairs = generator.integers(1, 7, n)
    return share_interval(generator.binomial(pairs, generator.beta(1, 1, n)), pairs), 0.5


def _quarters(low: float, high: float):
    """Errors in two quarters of the tasks, and the ratio of their shares."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        size = n // 4
        hits = generator.binomial(size, (low, high))
        return share_ratio(hits[0], size, hits[1], size), low / high

    return draw


def _turned(gained: float, lost: float):
    """Tasks that turn right and wrong between two runs, half of the others right in both."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        at = generator.random(n)
        gain, loss = at < gained, at > 1 - lost
        before = np.where(gain, 0, np.where(loss, 1, at > 0.5))
        after = np.where(gain, 1, np.where(loss, 0, before))
        return difference_interval(before, after), gained - lost

    return draw


def _target_wins(generator: np.random.Generator, n: int) -> Sample:
    """Pairs that a target wins, among 3 to 5 others: an AUROC of 0.5."""
    others = generator.integers(3, 6, n)
    return share_interval(generator.integers(0, others + 1), others), 0.5


def _best_of_heads(generator: np.random.Generator, n: int) -> Sample:
    """The highest of 100 heads that know nothing."""
    others = generator.integers(3, 6, n)
    wins = generator.integers(0, others[:, None] + 1, (n, 100))
    return share_interval(wins[:, wins.sum(0).argmax()], others, family=100), 0.5


def _signal(truth: float, spread: float):
    """A signal of which the wrong choices, two in five, have less, `spread` times as widely spread: a binormal AUROC."""
    from scipy.stats import norm

    shift = norm.ppf(truth) * np.sqrt(1 + spread**2)

    def draw(generator: np.random.Generator, n: int) -> Sample:
        wrong = generator.random(n) < 0.4
        area = auroc(
            np.where(wrong, shift + spread * generator.normal(size=n), generator.normal(size=n)), wrong
        )
        return (None if area is None else area.interval), truth

    return draw


def _best_effect(generator: np.random.Generator, n: int) -> Sample:
    """The largest mean effect of 100 heads without one."""
    effects = generator.normal(size=(n, 100))
    return mean_interval(effects[:, effects.mean(0).argmax()], family=100), 0.0


def _recovery(generator: np.random.Generator, n: int) -> Sample:
    """1 − Σ KL(patched) / Σ KL(unpatched): sizes of a skewed law, 0.6 recovered on average."""
    sizes = generator.gamma(2, size=n)
    return ratio_interval(sizes * generator.beta(3, 2, n), sizes), 0.6


def _slope(generator: np.random.Generator, n: int) -> Sample:
    """Slope of a change on a difference, through the origin, of 1 to 4 pairs a task."""
    pairs = generator.integers(1, 5, n)
    task = np.repeat(np.arange(n), pairs)
    x = generator.normal(size=len(task))
    y = (0.3 + 0.4 * generator.normal(size=n))[task] * x + generator.normal(size=len(task))
    return ratio_interval(np.bincount(task, x * y), np.bincount(task, x * x)), 0.3


def _explained(noise: float):
    """Vectors of 50 directions about one of length 1."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        shifts = generator.normal(size=(n, 50)) * noise / np.sqrt(50)
        shifts[:, 0] += 1
        products = Products(shifts @ shifts.sum(0)[:, None], (shifts**2).sum(1), np.zeros(n, dtype=int))
        return products.within().interval, 1 / (1 + noise**2)

    return draw


def _cosines(generator: np.random.Generator, n: int) -> Sample:
    """Mean cosine of pairs of tasks, of vectors of 20 directions about one; the truth from 2,000 of them."""
    steps = generator.normal(size=(n, 20))
    steps[:, 0] += 4
    unit = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    return pair_mean(*cosine_sums(unit, np.zeros(n, dtype=int))[0]).interval, _COSINE


def _mean_cosine() -> float:
    steps = np.random.default_rng(0).normal(size=(200_000, 20))
    steps[:, 0] += 4
    mean = (steps / np.linalg.norm(steps, axis=1, keepdims=True)).mean(0)
    return float(mean @ mean)


def _ranks(rho: float, within: bool):
    """Four pairs a task with a normal correlation, whose Spearman is 6/π asin(ρ/2); within tasks the same in a pool of
    many tasks of four."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        x, y, task = correlated(generator, n, rho)
        estimate = (spearman_within if within else spearman)(x, y, task)
        truth = _WITHIN[rho] if within else 6 / np.pi * np.arcsin(rho / 2)
        return (estimate.interval if estimate else None), truth

    return draw


def correlated(
    generator: np.random.Generator, n: int, rho: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and task of four pairs in each of n tasks."""
    x, noise = generator.normal(size=(2, 4 * n))
    return x, rho * x + np.sqrt(1 - rho**2) * noise, np.repeat(np.arange(n), 4)


def _within(rho: float) -> float:
    x, y, _ = correlated(np.random.default_rng(0), 200_000, rho)
    a, b = (v.reshape(-1, 4).argsort(1).argsort(1) - 1.5 for v in (x, y))
    return float((a * b).sum() / (a * a).sum())


def _bias(shift: float, places: int):
    """δ of the choices of one of `places`, the first liked by so much more."""
    p = np.full(places, (1 - shift) / places)
    p[0] += shift
    truth = float(np.abs(p - 1 / places).sum() / 2)

    def draw(generator: np.random.Generator, n: int) -> Sample:
        gaps = np.eye(places)[generator.choice(places, n, p=p)] - 1 / places
        return folded_interval(gaps, half_sum), truth

    return draw


def _soft_bias(shift: float):
    """δ of probabilities over 8 tools."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        scores = generator.normal(size=(n, 8))
        p = (1 - shift) * np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        p[:, 0] += shift
        return folded_interval(p - 1 / 8, half_sum), shift * 7 / 8

    return draw


def _spread(gap: float):
    """Highest less lowest accuracy of three wordings."""
    accuracy = np.array([0.6, 0.6 + gap / 2, 0.6 + gap])

    def draw(generator: np.random.Generator, n: int) -> Sample:
        hard = generator.normal(size=(n, 1))
        scores = (hard + generator.normal(size=(n, 3)) < np.sqrt(2) * _probit(accuracy)).astype(float)
        return folded_interval(scores, lambda means: np.ptp(means, axis=-1)), gap

    return draw


def _probit(p: np.ndarray) -> np.ndarray:
    import scipy.stats

    return scipy.stats.norm.ppf(p)


def _calibration(overconfidence: float):
    """ECE in five bins of equal mass of a model that is so much less often right than it is confident."""

    def draw(generator: np.random.Generator, n: int) -> Sample:
        bins = generator.integers(5, size=n)
        confidence = 0.35 + 0.13 * bins
        hits = generator.random(n) < confidence - overconfidence
        gaps = np.zeros((n, 5))
        gaps[np.arange(n), bins] = hits - confidence
        return folded_interval(gaps, lambda means: np.abs(means).sum(-1)), overconfidence

    return draw


def _temperature(generator: np.random.Generator, n: int) -> Sample:
    """Choices among 5 candidates drawn at a τ of 2."""
    scores = 3 * generator.normal(size=(n, 5))
    scores -= np.log(np.exp(scores).sum(1, keepdims=True))
    chosen = (scores / 2 + generator.gumbel(size=(n, 5))).argmax(1)
    return calibration.tau_interval(scores, np.eye(5, dtype=bool)[chosen]), 2.0


def _information(generator: np.random.Generator, n: int) -> Sample:
    """I(I; A) of intentions that favour one of four actions more or less."""
    return mutual_information(_conditional(generator, n)).interval, _INFORMATION


def _action(generator: np.random.Generator, n: int) -> Sample:
    """P(action | state) of the first of four actions from n draws of such intentions."""
    return average(_conditional(generator, n))[0].interval, _ACTION


def _conditional(generator: np.random.Generator, n: int) -> np.ndarray:
    scores = np.exp(1.5 * generator.normal(size=(n, 4)) + [1, 0.5, 0, -1])
    return scores / scores.sum(1, keepdims=True)


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(-1)


_MANY = _conditional(np.random.default_rng(0), 400_000)
_INFORMATION, _ACTION = float(_entropy(_MANY.mean(0)) - _entropy(_MANY).mean()), float(_MANY[:, 0].mean())
_COSINE = _mean_cosine()
_WITHIN = {rho: _within(rho) for rho in (0.0, 0.5)}

CASES = (
    Case("share of tasks", "any share", (3, 8, 20, 72), _any_share),
    Case("share, in parts", "uniform", (8, 20, 72), _of_share(lambda g, n: g.random(n), 0.5)),
    Case("share, in parts", "Beta(2, 5)", (8, 20, 72), _of_share(lambda g, n: g.beta(2, 5, n), 2 / 7)),
    Case("share, in parts", "6 orders a task", (8, 20, 72), _of_share(_mixed_orders, 1 / 3)),
    Case("share of pairs", "1 to 6 pairs a task", (8, 20, 72), _pairs),
    Case("ratio of two shares", "quarters, .6 and .3", (40, 72), _quarters(0.6, 0.3)),
    Case("ratio of two shares", "quarters, .4 and .1", (40, 72), _quarters(0.4, 0.1)),
    Case("difference of paired shares", "none turns more often", (8, 20, 72), _turned(0.15, 0.15)),
    Case("difference of paired shares", ".3 turn right, .1 wrong", (8, 20, 72), _turned(0.3, 0.1)),
    Case("AUROC", "a head that knows nothing", (8, 20, 72), _target_wins),
    Case("AUROC", "the best of 100 such heads", (8, 20, 72), _best_of_heads, 1000),
    Case("AUROC of a signal", "0.5", (20, 72), _signal(0.5, 1), 1000),
    Case("AUROC of a signal", "0.8", (20, 72), _signal(0.8, 1), 1000),
    Case("AUROC of a signal", "0.8, wrong choices spread twice as wide", (20, 72), _signal(0.8, 2), 1000),
    Case("mean", "normal", (8, 20, 72), _of_mean(lambda g, n: g.normal(size=n), 0)),
    Case("mean", "uniform", (8, 20, 72), _of_mean(lambda g, n: g.random(n), 0.5)),
    Case("mean", "exponential", (8, 20, 72), _of_mean(lambda g, n: g.exponential(size=n), 1)),
    Case("mean", "the largest of 100 effects of 0", (8, 20, 72), _best_effect, 1000),
    Case("ratio", "recovered share of KL", (8, 20, 72), _recovery),
    Case("ratio", "slope over 1 to 4 pairs a task", (8, 20, 72), _slope),
    Case("R²", "half explained", (8, 20, 36), _explained(1.0), 1000),
    Case("R²", "a tenth explained", (8, 20, 36), _explained(3.0), 1000),
    Case("mean of pairs", "cosines of 20 directions", (8, 20, 36), _cosines, 1000),
    Case("rank correlation", "ρ = 0, pooled", (20, 72), _ranks(0.0, False), 400),
    Case("rank correlation", "ρ = 0.5, pooled", (20, 72), _ranks(0.5, False), 400),
    Case("rank correlation", "ρ = 0, within tasks", (20, 72), _ranks(0.0, True), 400),
    Case("rank correlation", "ρ = 0.5, within tasks", (20, 72), _ranks(0.5, True), 400),
    Case("bias δ", "4 slots, δ = 0", (20, 72), _bias(0, 4), 400),
    Case("bias δ", "4 slots, δ = 0.15", (20, 72), _bias(0.2, 4), 400),
    Case("bias δ", "4 slots, δ = 0.45", (20, 72), _bias(0.6, 4), 400),
    Case("bias δ", "8 tools, δ = 0", (20, 60), _bias(0, 8), 400),
    Case("bias δ", "8 tools, δ = 0.067", (20, 60), _soft_bias(0.067 * 8 / 7), 400),
    Case("spread of accuracy", "3 wordings, 0", (20, 36), _spread(0.0), 400),
    Case("spread of accuracy", "3 wordings, 0.2", (20, 36), _spread(0.2), 400),
    Case("calibration error", "calibrated", (20, 72), _calibration(0.0), 400),
    Case("calibration error", "0.2 overconfident", (20, 72), _calibration(0.2), 400),
    Case("fitted τ", "τ = 2", (20, 72), _temperature, 400),
    Case("information, jackknifed", "draws", (8, 16, 32), _information),
    Case("P(action given state)", "draws", (8, 16, 32), _action),
)


# -- power ---------------------------------------------------------------------------------------------------------

EFFECTS = (0.1, 0.2, 0.3, 0.5)
POWERS = (0.5, 0.7, 0.8, 0.9)


def tasks_for_correlation(rho: float, power: float) -> int:
    """Tasks of four tools at which a rank correlation within tasks of this size differs from 0 so often.

    A task adds three degrees of freedom; by Fisher's transformation of the correlation of ranks.
    """
    import scipy.stats

    target = scipy.stats.norm.ppf(0.975) + scipy.stats.norm.ppf(power)
    return int(np.ceil((target / np.arctanh(rho)) ** 2 / 3))


def tasks_for_mean(effect: float, power: float) -> int:
    """Tasks at which a mean of `effect` standard deviations differs from 0 so often, by Student's t."""
    import scipy.stats

    n = 2
    while True:
        bound = scipy.stats.t.ppf(0.975, n - 1)
        if scipy.stats.nct.sf(bound, n - 1, effect * np.sqrt(n)) >= power:
            return n
        n += 1


def tasks_for_share(gap: float, power: float) -> int:
    """Tasks at which a share of ½ + gap has an interval without ½ so often."""
    import scipy.stats

    n = 2
    while True:
        hits = np.arange(n + 1)
        lows = np.array([wilson(k / n, n)[0] for k in hits])
        if scipy.stats.binom.pmf(hits, n, 0.5 + gap)[lows > 0.5].sum() >= power:
            return n
        n += 1


# -- the page ------------------------------------------------------------------------------------------------------


def coverage_lines() -> Iterator[str]:
    yield "| estimator | law | tasks | holds the truth | has an interval |"
    yield "|---|---|---|---|---|"
    for case in CASES:
        for n in case.tasks:
            held, given = coverage(case, n)
            yield f"| {case.estimator} | {case.law} | {n} | {held:.3f} | {given:.0%} |"


def power_lines() -> Iterator[str]:
    yield "| effect | " + " | ".join(f"power {power:g}" for power in POWERS) + " |"
    yield "|---|" + "---|" * len(POWERS)
    for name, needed in (
        ("rank correlation within tasks of {}", tasks_for_correlation),
        ("mean of {} standard deviations", tasks_for_mean),
        ("share of ½ + {}", tasks_for_share),
    ):
        for effect in EFFECTS[: 3 if needed is tasks_for_share else 4]:
            cells = " | ".join(str(needed(effect, power)) for power in POWERS)
            yield f"| {name.format(effect)} | {cells} |"


def renewed(page: str, name: str, lines: Iterator[str]) -> str:
    """The page with these lines between `<!-- name -->` and `<!-- end -->`."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda match: match[1] + "".join(f"{line}\n" for line in lines) + match[2],
        page,
        flags=re.DOTALL,
    )


def main(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    page = renewed(page, "power", power_lines())
    path.write_text(renewed(page, "coverage", coverage_lines()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
